"""Plain-language findings: each rule is a small function of what is known about a run, with its threshold beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.core.events import Event
from prefopt.report import data_rules, diagnosis_rules, evaluation_rules, round_rules, training_rules
from prefopt.report.history import History
from prefopt.report.known import Finding, Known, Rule

RULES: tuple[Rule, ...] = (
    training_rules.start_differs,
    round_rules.reward_of_rounds,
    round_rules.collapsed,
    round_rules.length_played,
    round_rules.steps_too_large,
    evaluation_rules.reward_change,
    evaluation_rules.win_rate,
    training_rules.heldout_evidence,
    training_rules.imitation,
    training_rules.overfitted,
    training_rules.loss_stuck,
    evaluation_rules.kl_large,
    training_rules.log_probs_fell,
    evaluation_rules.longer,
    evaluation_rules.less_diverse,
    evaluation_rules.unfinished,
    diagnosis_rules.length_explains,
    diagnosis_rules.likelihood_displaced,
    diagnosis_rules.labels_denied,
    diagnosis_rules.satisfied_before,
    diagnosis_rules.price_of_reward,
    data_rules.leakage,
    data_rules.length_bias,
    data_rules.contradictions,
    data_rules.duplicates,
    data_rules.refused,
    data_rules.overlong,
    data_rules.partly_cut,
    data_rules.rare_class,
    training_rules.past_best,
    training_rules.clipped,
)


def findings(
    events: Sequence[Event],
    evaluation: Mapping[str, Any] | None,
    audit: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> list[Finding]:
    """Everything worth saying about a run: warnings first, then what went well, then notes. Pure."""
    known = Known(History(events), evaluation or {}, audit or {}, config or {})
    found = [finding for rule in RULES if (finding := rule(known)) is not None]
    return sorted(found, key=lambda finding: ("warning", "good", "note").index(finding.level))
