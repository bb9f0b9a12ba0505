"""Every rule fires just past its threshold, and is silent at it and where the numbers are absent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from prefopt.report import data_rules, diagnosis_rules, evaluation_rules, round_rules, training_rules
from prefopt.report.findings import RULES, findings
from prefopt.report.history import History
from prefopt.report.known import Finding, Known

Rule = Callable[[Known], Finding | None]
LN2 = math.log(2)
SFT = {"loss": {"name": "sft"}}
KTO = {"loss": {"name": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}}
DPO = {"loss": {"name": "dpo", "beta": 0.1}, "train": {"max_grad_norm": 1.0}, "reference": {"model": None}}


def steps(count: int = 20, first: int = 1, **metrics: Any) -> list[dict[str, Any]]:
    named = {key.replace("__", "/"): value for key, value in metrics.items()}
    return [{"kind": "step", "step": first + index, **named} for index in range(count)]


def evals(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"kind": "eval", "step": 10 * index + 10, **row} for index, row in enumerate(rows)]


def known(
    events: list[dict[str, Any]] | None = None, *, evaluation: Any = None, audit: Any = None, config: Any = None
) -> Known:
    return Known(History(events or []), evaluation or {}, audit or {}, config or DPO)


def span(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 100}


def heldout(value: float, low: float, high: float) -> dict[str, Any]:
    return {"heldout": {"accuracy": span(value, low, high)}}


def fell(chosen: float, rejected: float, tokens: float = 100.0) -> list[dict[str, Any]]:
    return steps(drift__chosen=chosen, drift__rejected=rejected, lengths__chosen=tokens)


def sides(section: str, policy: Any, reference: Any) -> dict[str, Any]:
    return {section: {"policy": policy, "reference": reference}}


def rounds(*scores: float, std: float = 0.1, **metrics: tuple[float, float]) -> list[dict[str, Any]]:
    """Rounds with these mean rewards of 100 samples; of other metrics the first and the last round's value."""
    found = [
        {"kind": "round", "step": 4 * at, "round": at, "objective/scores": score, "objective/scores_std": std}
        | {"objective/responses": 100.0, "objective/kl": 2.0 * at}
        for at, score in enumerate(scores)
    ]
    for name, ends in metrics.items():
        found[0][f"objective/{name}"], found[-1][f"objective/{name}"] = ends
    return found


def diagnosis(**sections: Any) -> dict[str, Any]:
    return {"diagnosis": sections}


def displaced(share: tuple[float, float, float]) -> dict[str, Any]:
    tokens = [{"token": " the", "change": -1.5, "count": 9}]
    return diagnosis(displacement={"chosen_fell": span(*share), "chosen": span(-3, -4, -2), "tokens_that_fell": tokens})


def explained(share: float) -> dict[str, Any]:
    return diagnosis(length={"explained": share, "nats_per_token": 0.2, "margin_at_equal_length": 1.0})


def denied(probability: float) -> dict[str, Any]:
    return diagnosis(contradicted=[{"source": "rows:3", "margin": -4.0, "probability_of_label": probability}])


SATISFIED = diagnosis(satisfied={"by_reference": span(0.6, 0.5, 0.7), "gradient_weight": {"mean": 0.31}})


def kl(nats: float) -> dict[str, Any]:
    return {"kl": {"per_response": {"value": nats, "standard_error": 1.0, "n": 10}}}


def reward(value: float, low: float, high: float) -> dict[str, Any]:
    return {"reward": {"name": "r", "difference": span(value, low, high)}}


def wins(value: float, low: float, high: float) -> dict[str, Any]:
    return {"win_rate": {"wins": 1, "losses": 1, "ties": 0, "rate": span(value, low, high)}}


def counted(name: str, count: int) -> dict[str, Any]:
    return {"rows": 1000, "groups": 1000, name: {"count": count, "examples": []}}


def over(groups: int) -> dict[str, Any]:
    return {"rows": 1000, "groups": 1000, "truncation": {"groups_over": groups, "on_overlong": "drop"}}


def cut(partly: int, on_overlong: str = "truncate") -> dict[str, Any]:
    said = {"partly_over": partly, "on_overlong": on_overlong, "max_response_tokens": 64}
    return {"rows": 1000, "groups": 1000, "truncation": said}


def refusals(count: int) -> dict[str, Any]:
    return {"rows": 1000, "refused": {"empty response": {"count": count, "examples": []}}}


def labels(desirable: int, undesirable: int) -> dict[str, Any]:
    return {"shape": "label", "feedback": {"labels": {"desirable": desirable, "undesirable": undesirable}}}


def losses(*values: float) -> list[dict[str, Any]]:
    """Held-out evaluations, the first of them before the first step."""
    return [{"kind": "eval", "step": 10 * index, "eval/loss": value} for index, value in enumerate(values)]


def norms(above: int) -> list[dict[str, Any]]:
    return steps(above, grad_norm=1.5) + steps(20 - above, grad_norm=1.0)


FIRES: list[tuple[str, Rule, str, Known]] = [
    ("start", training_rules.start_differs, "warning", known(steps(1, loss=LN2 + 0.02))),
    (
        "start ipo",
        training_rules.start_differs,
        "warning",
        known(steps(1, loss=LN2), config={"loss": {"name": "ipo", "beta": 0.1}}),
    ),
    ("stuck in training", training_rules.loss_stuck, "warning", known(steps(loss=LN2))),
    (
        "stuck held out",
        training_rules.loss_stuck,
        "warning",
        known(steps(loss=0.2) + evals({"eval/loss": LN2}, {"eval/loss": 0.7})),
    ),
    ("imitates", training_rules.imitation, "good", known(losses(3.0, 2.9), config=SFT)),
    ("past its best", training_rules.past_best, "note", known(losses(LN2, LN2 - 0.1, LN2 - 0.079))),
    (
        "overfit to chance",
        training_rules.overfitted,
        "warning",
        known(steps(rewards__accuracies=0.9), evaluation=heldout(0.66, 0.5, 0.8)),
    ),
    (
        "overfit by gap",
        training_rules.overfitted,
        "warning",
        known(steps(rewards__accuracies=1.0), evaluation=heldout(0.74, 0.7, 0.8)),
    ),
    ("learned", training_rules.heldout_evidence, "good", known(evaluation=heldout(0.6, 0.501, 0.7))),
    ("not learned", training_rules.heldout_evidence, "warning", known(evaluation=heldout(0.6, 0.5, 0.7))),
    ("swapped", training_rules.heldout_evidence, "warning", known(evaluation=heldout(0.4, 0.3, 0.499))),
    ("both fell", training_rules.log_probs_fell, "note", known(fell(-1, -2))),
    ("chosen fell far", training_rules.log_probs_fell, "warning", known(fell(-20.1, -50))),
    ("better reward", evaluation_rules.reward_change, "good", known(evaluation=reward(0.2, 0.001, 0.4))),
    ("worse reward", evaluation_rules.reward_change, "warning", known(evaluation=reward(-0.2, -0.4, -0.001))),
    ("same reward", evaluation_rules.reward_change, "note", known(evaluation=reward(0.2, 0.0, 0.4))),
    ("wins", evaluation_rules.win_rate, "good", known(evaluation=wins(0.6, 0.501, 0.7))),
    ("loses", evaluation_rules.win_rate, "warning", known(evaluation=wins(0.4, 0.3, 0.499))),
    ("far", evaluation_rules.kl_large, "warning", known(evaluation=kl(25.1))),
    ("longer", evaluation_rules.longer, "warning", known(evaluation=sides("length", span(126, 0, 0), span(100, 0, 0)))),
    (
        "same-ish",
        evaluation_rules.less_diverse,
        "warning",
        known(evaluation=sides("diversity", {"distinct_2": 0.34}, {"distinct_2": 0.5})),
    ),
    ("unfinished", evaluation_rules.unfinished, "warning", known(evaluation=sides("finished", 0.84, 0.9))),
    ("clipped", training_rules.clipped, "note", known(norms(11))),
    ("length bias", data_rules.length_bias, "warning", known(audit={"length_bias": {"auc": 0.61}})),
    ("short bias", data_rules.length_bias, "note", known(audit={"length_bias": {"auc": 0.39}})),
    ("few desirable", data_rules.rare_class, "note", known(audit=labels(99, 901), config=KTO)),
    (
        "few undesirable, weighted",
        data_rules.rare_class,
        "note",
        known(audit=labels(800, 200), config={"loss": {"name": "kto", "desirable_weight": 2.3}}),
    ),
    ("few duplicates", data_rules.duplicates, "note", known(audit=counted("duplicates", 10))),
    ("many duplicates", data_rules.duplicates, "warning", known(audit=counted("duplicates", 11))),
    ("few contradictions", data_rules.contradictions, "note", known(audit=counted("contradictions", 1))),
    ("contradictions", data_rules.contradictions, "warning", known(audit=counted("contradictions", 11))),
    ("leak", data_rules.leakage, "warning", known(audit={"leakage": {"against": "eval.jsonl", "prompts": 1, "groups": 0}})),
    ("refused", data_rules.refused, "warning", known(audit=refusals(51))),
    ("overlong", data_rules.overlong, "warning", known(audit=over(51))),
    ("cut beside whole", data_rules.partly_cut, "warning", known(audit=cut(51))),
    ("rounds gained", round_rules.reward_of_rounds, "good", known(rounds(0.1, 0.2))),
    ("rounds lost", round_rules.reward_of_rounds, "warning", known(rounds(0.2, 0.1))),
    ("rounds level", round_rules.reward_of_rounds, "note", known(rounds(0.1, 0.128))),
    ("entropy below half", round_rules.collapsed, "warning", known(rounds(0, 1, entropy=(40.0, 19.0), length=(10.0, 10.0)))),
    ("length 1.5", round_rules.length_played, "warning", known(rounds(0, 1, length=(100.0, 150.0)))),
    ("clipped 0.31", round_rules.steps_too_large, "warning", known(steps(policy__clipfrac_avg=0.31))),
    ("chosen fell", diagnosis_rules.likelihood_displaced, "note", known(evaluation=displaced((0.6, 0.51, 0.7)))),
    ("length explains", diagnosis_rules.length_explains, "warning", known(evaluation=explained(0.26))),
    ("label denied", diagnosis_rules.labels_denied, "note", known(evaluation=denied(0.09))),
    ("weights", diagnosis_rules.satisfied_before, "note", known(evaluation=SATISFIED)),
    ("price", diagnosis_rules.price_of_reward, "note", known(evaluation=reward(0.1, 0.05, 0.2) | kl(3))),
]
SILENT: list[tuple[str, Rule, Known]] = [
    ("start exact", training_rules.start_differs, known(steps(1, loss=LN2))),
    ("start ipo", training_rules.start_differs, known(steps(1, loss=25.0), config={"loss": {"name": "ipo", "beta": 0.1}})),
    ("start resumed", training_rules.start_differs, known(steps(1, first=50, loss=0.3))),
    (
        "start other reference",
        training_rules.start_differs,
        known(steps(1, loss=0.3), config={**DPO, "reference": {"model": "other"}}),
    ),
    ("start unknown loss", training_rules.start_differs, known(steps(1, loss=0.3), config={"loss": {"name": "new"}})),
    ("falling", training_rules.loss_stuck, known(steps(loss=0.69))),
    ("one step", training_rules.loss_stuck, known(steps(1, loss=LN2))),
    ("no imitation", training_rules.imitation, known(losses(3.0, 2.9))),
    ("imitates no better", training_rules.imitation, known(losses(3.0, 3.0), config=SFT)),
    ("about its best", training_rules.past_best, known(losses(LN2, LN2 - 0.1, LN2 - 0.081))),
    (
        "its best against a reference that moved",
        training_rules.past_best,
        known(losses(LN2, 0.5, LN2), config={**DPO, "reference": {"kind": "ema"}}),
    ),
    ("generalises", training_rules.overfitted, known(steps(rewards__accuracies=1.0), evaluation=heldout(0.75, 0.7, 0.8))),
    ("modest", training_rules.overfitted, known(steps(rewards__accuracies=0.89), evaluation=heldout(0.5, 0.4, 0.6))),
    ("chosen rose", training_rules.log_probs_fell, known(fell(3, -9))),
    ("rejected fell less", training_rules.log_probs_fell, known(fell(-9, -3))),
    ("level rate", evaluation_rules.win_rate, known(evaluation=wins(0.6, 0.5, 0.7))),
    ("near", evaluation_rules.kl_large, known(evaluation=kl(25.0))),
    ("a little longer", evaluation_rules.longer, known(evaluation=sides("length", span(125, 0, 0), span(100, 0, 0)))),
    ("varied", evaluation_rules.less_diverse, known(evaluation=sides("diversity", {"distinct_2": 0.36}, {"distinct_2": 0.5}))),
    ("finished", evaluation_rules.unfinished, known(evaluation=sides("finished", 0.85, 0.9))),
    ("half clipped", training_rules.clipped, known(norms(10))),
    ("no bias", data_rules.length_bias, known(audit={"length_bias": {"auc": 0.6}})),
    ("a tenth is desirable", data_rules.rare_class, known(audit=labels(100, 900), config=KTO)),
    (
        "weights make up for it",
        data_rules.rare_class,
        known(audit=labels(50, 950), config={"loss": {"name": "kto", "desirable_weight": 19.0}}),
    ),
    ("reward of one round", round_rules.reward_of_rounds, known(rounds(0.1))),
    ("entropy halved", round_rules.collapsed, known(rounds(0, 1, entropy=(40.0, 20.0), length=(10.0, 10.0)))),
    ("length 1.49", round_rules.length_played, known(rounds(0, 1, length=(100.0, 149.0)))),
    ("clipped 0.3", round_rules.steps_too_large, known(steps(policy__clipfrac_avg=0.3))),
    ("chosen fell in half", diagnosis_rules.likelihood_displaced, known(evaluation=displaced((0.6, 0.5, 0.7)))),
    ("length explains a quarter", diagnosis_rules.length_explains, known(evaluation=explained(0.25))),
    ("label at 10 %", diagnosis_rules.labels_denied, known(evaluation=denied(0.1))),
    ("nothing gained", diagnosis_rules.price_of_reward, known(evaluation=reward(0.1, 0.0, 0.2) | kl(3))),
    ("no leak", data_rules.leakage, known(audit={"leakage": {"against": "e", "prompts": 0, "groups": 0}})),
    ("no duplicates", data_rules.duplicates, known(audit=counted("duplicates", 0))),
    ("no contradictions", data_rules.contradictions, known(audit=counted("contradictions", 0))),
    ("few refused", data_rules.refused, known(audit=refusals(50))),
    ("few overlong", data_rules.overlong, known(audit=over(50))),
    ("few cut beside whole", data_rules.partly_cut, known(audit=cut(50))),
    ("dropped instead of cut", data_rules.partly_cut, known(audit=cut(500, "drop"))),
    ("an audit that did not count them", data_rules.partly_cut, known(audit=over(500))),
]


@pytest.mark.parametrize(("rule", "level", "given"), [case[1:] for case in FIRES], ids=[case[0] for case in FIRES])
def test_a_rule_fires_past_its_threshold(rule: Rule, level: str, given: Known) -> None:
    found = rule(given)
    assert found is not None
    assert found.level == level
    assert found.text.endswith(".")
    assert any(character.isdigit() for character in found.evidence)


@pytest.mark.parametrize(("rule", "given"), [case[1:] for case in SILENT], ids=[case[0] for case in SILENT])
def test_a_rule_is_silent_up_to_its_threshold(rule: Rule, given: Known) -> None:
    assert rule(given) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_is_silent_where_nothing_is_known(rule: Rule) -> None:
    assert rule(known()) is None
    assert rule(Known(History([{"kind": "step", "step": 1, "loss": None}]))) is None


def test_every_rule_has_a_case_that_fires() -> None:
    assert {case[1] for case in FIRES} == set(RULES)


def test_long_responses_alone_are_not_over_optimised() -> None:
    short, long = (
        training_rules.log_probs_fell(known(fell(-21, -50, tokens=100))),
        training_rules.log_probs_fell(known(fell(-21, -50, tokens=1000))),
    )
    assert short is not None
    assert long is not None
    assert (short.level, long.level) == ("warning", "note")


def test_log_probs_on_the_same_heldout_rows_come_before_drift_in_training() -> None:
    rows = evals(
        {"eval/logps/chosen": -100.0, "eval/logps/rejected": -100.0},
        {"eval/logps/chosen": -103.0, "eval/logps/rejected": -109.0},
    )
    found = training_rules.log_probs_fell(known(fell(-40, -50) + rows))
    assert found is not None
    assert "−3.00" in found.evidence


def test_evaluation_comes_before_what_training_saw() -> None:
    event = {"eval/rewards/accuracies": 0.5, "eval/rewards/accuracies_low": 0.4, "eval/rewards/accuracies_high": 0.6}
    in_training = training_rules.heldout_evidence(known(evals(event)))
    evaluated = training_rules.heldout_evidence(known(evals(event), evaluation=heldout(0.7, 0.6, 0.8)))
    assert in_training is not None
    assert evaluated is not None
    assert (in_training.level, evaluated.level) == ("warning", "good")


def test_findings_are_pure_and_put_warnings_first() -> None:
    events, audit = steps(loss=0.8), counted("duplicates", 1)
    evaluation = {**kl(99), **reward(0.2, 0.1, 0.3)}
    before = copy.deepcopy((events, evaluation, audit, DPO))
    found = findings(events, evaluation, audit, DPO)
    assert (events, evaluation, audit, DPO) == before
    assert found == findings(events, evaluation, audit, DPO)
    levels = [finding.level for finding in found]
    assert levels == sorted(levels, key=("warning", "good", "note").index)
    assert set(levels) == {"warning", "good", "note"}


def test_the_evaluation_before_the_first_step_says_nothing_about_training() -> None:
    row = {
        "kind": "eval",
        "eval/rewards/accuracies": 0.5,
        "eval/rewards/accuracies_low": 0.4,
        "eval/rewards/accuracies_high": 0.6,
    }
    assert training_rules.heldout_evidence(known([{**row, "step": 0}])) is None
    assert training_rules.heldout_evidence(known([{**row, "step": 1}])) is not None


def test_nothing_known_means_nothing_said() -> None:
    assert findings([], None, None, None) == []
