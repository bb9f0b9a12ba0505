"""What one optimizer step did: immutable, and all that observers get to see. Metric names follow TRL's.

Shapes: G groups of the step, S responses, K responses of one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepValues:
    """Results by group, in the order of `sources`. Log-probs and log-ratios in nats, summed over scored tokens.

    `responses`: responses of each group. `target`: how good each response is said to be (see Rows.target_S). `loss`:
    the value of each group before it is divided by the step's totals; NaN where a formula's values belong to no group. `parts`: the loss of each
    part, averaged over its units; `total` their weighted sum. `statistics`: numbers of the step as a whole. `compares`:
    whether responses were compared with each other, good ones with others.
    """

    sources: tuple[str, ...]
    kinds: tuple[str, ...]
    responses: NDArray[np.int64]
    target: Values
    total: float
    parts: Mapping[str, float]
    loss: Values
    ratio: Values
    reward: Values
    logp: Values
    tokens: Values
    statistics: Mapping[str, float] = field(default_factory=dict)
    compares: bool = True

    def __post_init__(self) -> None:
        assert len(self.target) == len(self.reward) == self.responses.sum()

    @property
    def group(self) -> NDArray[np.int64]:
        """Group of each response."""
        return np.repeat(np.arange(len(self.responses)), self.responses)

    @property
    def has_rewards(self) -> bool:
        return not bool(np.isnan(self.reward).all())

    @property
    def margins(self) -> Values:
        """Reward of the best response less the mean of the others, of each group with at least two; ties left out.

        Single responses have none: nothing says which desirable one would be compared with which undesirable one.
        """
        if (self.responses == 1).all():
            return np.empty(0)
        good, others = self._sides(self.reward)
        return good - others

    def accuracy(self) -> tuple[float, int]:
        """(share of orderings that the rewards have right, a tie counting half; how many units it is a mean of).

        Within groups of two or more: the mean over groups of the share of their ordered pairs. For single labelled
        responses: over all (desirable, undesirable) pairs of them, which is the area under the ROC curve.
        """
        if (self.responses == 1).all():
            return area_under_curve(self.reward, self.target)
        return self._concordance(self.reward)

    def _concordance(self, values: Values) -> tuple[float, int]:
        shares = [
            share
            for of_group, targets in zip(self._split(values), self._split(self.target), strict=True)
            if (share := concordance(of_group, targets)) is not None
        ]
        return (float(np.mean(shares)), len(shares)) if shares else (float("nan"), 0)

    def metrics(self) -> dict[str, float]:
        """Means over groups, under TRL's names; what the rows or the loss do not have is absent."""
        named = {"loss": self.total}
        if len(self.parts) > 1:
            named.update({f"loss/{name}": value for name, value in self.parts.items()})
        if self.has_rewards:
            good, others = self._sides(self.reward)
            named["rewards/chosen"] = _mean(good)
            named["rewards/rejected"] = _mean(others)
            named["rewards/margins"] = _mean(good) - _mean(others)
            named["rewards/accuracies"] = self.accuracy()[0]
        if self.compares:
            named |= self._compared()
        named.update(self.statistics)
        return {name: value for name, value in named.items() if np.isfinite(value)}

    def _compared(self) -> dict[str, float]:
        named: dict[str, float] = {}
        for name, values in (("logps", self.logp), ("lengths", self.tokens)):
            good, others = self._sides(values)
            named[f"{name}/chosen"], named[f"{name}/rejected"] = _mean(good), _mean(others)
        if (self.responses > 1).any():
            named["logps/accuracies"] = self._concordance(self.logp)[0]
        return named

    def drift(self) -> dict[str, float]:
        """Mean log(policy / reference) of the good and of the other responses, nats."""
        if np.isnan(self.ratio).all() or not self.compares:
            return {}
        good, others = self._sides(self.ratio)
        found = {"drift/chosen": _mean(good), "drift/rejected": _mean(others)}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def _sides(self, values: Values) -> tuple[Values, Values]:
        """(good, other) values: of each group with two or more responses its best and the mean of the rest; of single
        responses the desirable or demonstrated, and the undesirable."""
        if (self.responses == 1).all():
            good = np.isnan(self.target) | (self.target > 0.5)
            return values[good], values[~good]
        best, rest = [], []
        for of_group, targets in zip(self._split(values), self._split(self.target), strict=True):
            if len(of_group) < 2 or (targets == targets[0]).all():
                continue
            place = int(np.argmax(targets))
            best.append(of_group[place])
            rest.append(np.delete(of_group, place).mean())
        return np.array(best), np.array(rest)

    def _split(self, values: Values) -> list[Values]:
        return np.split(values, np.cumsum(self.responses)[:-1])


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else float("nan")


def concordance(values: Values, targets: Values) -> float | None:
    """Share of the pairs with different `targets` that `values` order the same way, a tie counting half; None without any."""
    first, second = np.triu_indices(len(values), k=1)
    wanted = np.sign(targets[first] - targets[second])
    counted = np.isfinite(wanted) & (wanted != 0)
    if not counted.any():
        return None
    found = np.sign(values[first] - values[second])
    return float(((1 + wanted * found) / 2)[counted].mean())


def area_under_curve(values: Values, targets: Values) -> tuple[float, int]:
    """(probability that a desirable response has the larger value than an undesirable one, ties half; responses)."""
    good, bad = values[targets > 0.5], values[targets <= 0.5]
    if not len(good) or not len(bad):
        return float("nan"), 0
    order = np.sort(bad)
    below = np.searchsorted(order, good, side="left")
    upto = np.searchsorted(order, good, side="right")
    return float(((below + upto) / 2).mean() / len(bad)), len(good) + len(bad)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: `step` counts from 1, `num_tokens` are unique tokens since the start of the run.

    `mfu`: model FLOPs utilisation, the operations that the step cannot do without over those of a plain matrix product in
    the same time; None where that speed was not measured.
    """

    step: int
    epoch: float
    values: StepValues
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    num_tokens: int
    reference_is_initial: bool
    mfu: float | None = None

    def metrics(self) -> dict[str, float]:
        """Everything that is logged of this step."""
        return {
            **self.values.metrics(),
            **(self.values.drift() if self.reference_is_initial else {}),
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "epoch": self.epoch,
            "num_tokens": float(self.num_tokens),
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds,
            **({} if self.mfu is None else {"mfu": self.mfu}),
        }
