"""What one optimizer step did: immutable, and all that observers get to see. Metric names follow TRL's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PairValues:
    """Per-pair results in the order of `sources`. Log-probs in nats, summed over tokens; rewards are beta * log-ratio."""

    sources: tuple[str, ...]
    loss: Values
    chosen_reward: Values
    rejected_reward: Values
    chosen_logp: Values
    rejected_logp: Values
    chosen_tokens: Values
    rejected_tokens: Values

    @property
    def margin(self) -> Values:
        return self.chosen_reward - self.rejected_reward

    def metrics(self) -> dict[str, float]:
        """Means over the pairs, under TRL's names. A margin of exactly 0 counts as half right."""
        right = (self.margin > 0) + 0.5 * (self.margin == 0)
        named = {
            "loss": self.loss,
            "rewards/chosen": self.chosen_reward,
            "rewards/rejected": self.rejected_reward,
            "rewards/margins": self.margin,
            "rewards/accuracies": right,
            "logps/chosen": self.chosen_logp,
            "logps/rejected": self.rejected_logp,
            "lengths/chosen": self.chosen_tokens,
            "lengths/rejected": self.rejected_tokens,
        }
        return {name: float(np.mean(value, dtype=np.float64)) for name, value in named.items()}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: `step` counts from 1, `num_tokens` are unique tokens since the start of the run."""

    step: int
    epoch: float
    pairs: PairValues
    beta: float
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    num_tokens: int
    reference_is_initial: bool

    def metrics(self) -> dict[str, float]:
        """Everything that is logged of this step."""
        values = self.pairs.metrics()
        if self.reference_is_initial:
            values["drift/chosen"] = values["rewards/chosen"] / self.beta
            values["drift/rejected"] = values["rewards/rejected"] / self.beta
        return {
            **values,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "epoch": self.epoch,
            "num_tokens": float(self.num_tokens),
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds,
        }
