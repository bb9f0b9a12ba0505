"""Statistics that some losses carry from step to step; part of every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from prefopt.objective.quantities import Quantities


class Running:
    """A mean over everything seen so far, or with `momentum` a moving average over steps.

    `of`: values of a step and their weights, those of their rows: a row of weight 2 counts like two rows.
    """

    def __init__(self, of: Callable[[Quantities], tuple[Tensor, Tensor]], momentum: float | None = None) -> None:
        self.of = of
        self.momentum = momentum
        self.value = 0.0
        self.count = 0.0

    def update(self, step: Quantities) -> float:
        """Take in a step and return the statistic."""
        values, weights = self.of(step)
        count = float(weights.sum())
        if count == 0:
            return self.value
        mean = float((values.detach() * weights).sum()) / count
        if self.momentum is not None and self.count:
            share = 1 - self.momentum
        else:
            share = count / (self.count + count)
        self.value += (mean - self.value) * share
        self.count += count
        return self.value

    def state(self) -> dict[str, float]:
        return {"value": self.value, "count": self.count}

    def load(self, state: Mapping[str, float]) -> None:
        self.value, self.count = state["value"], state["count"]


def running_of(inputs: Sequence[str], beta: float, knobs: Mapping[str, Any]) -> dict[str, Running]:
    """The running statistics that a formula with these inputs names."""
    found: dict[str, Running] = {}
    if "reward_mean" in inputs:
        found["reward_mean"] = Running(lambda step: (beta * step.ratio_S, step.rows.weight_G[step.rows.group_S]))
    if "margin_mean" in inputs:
        momentum = float(knobs.get("momentum", 0.9))
        found["margin_mean"] = Running(
            lambda step: (step["chosen_G"] - step["rejected_G"], step.rows.weight_G), momentum=momentum
        )
    return found
