"""What the rules of a report look at, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from prefopt.core.losses.starts import start_loss
from prefopt.report.history import History, Interval, interval, part
from prefopt.report.wording import PAIRS, Wording, wording

FEWEST_STEPS = 10  # a shorter run has had no time to show anything

Level = Literal["good", "note", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a run: how serious it is, what it means and what to do, and the numbers behind it."""

    level: Level
    text: str
    evidence: str


@dataclass(frozen=True)
class Known:
    """All that the rules look at. `evaluation` and `audit` are empty where the run has none."""

    history: History
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def wording(self) -> Wording:
        return wording(self.config, self.audit)

    @cached_property
    def start(self) -> float | None:
        return known_start(self.history, self.config, self.wording)

    def heldout_accuracy(self) -> tuple[Interval, Wording] | None:
        """Held-out accuracy and how to speak of it: from `prefopt evaluate`, which measures pairs, else from training."""
        evaluated = interval(part(self.evaluation, "heldout", "accuracy"))
        if evaluated is not None:
            return evaluated, PAIRS
        seen = self.history.heldout_accuracy()
        return None if seen is None else (seen, self.wording)


def known_start(history: History, config: Mapping[str, Any], said: Wording) -> float | None:
    """The loss at which the run must start; of a reward model only where it did: another head or margins start elsewhere."""
    start = start_loss(part(config, "loss") or {})
    if start is None or not said.reward_model:
        return start
    began = history.at_start("eval/loss") if history.evals else history.first("loss")
    return start if began is not None and abs(began - start) < 1e-3 else None


Rule = Callable[[Known], Finding | None]
