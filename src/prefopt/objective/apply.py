"""From log-probs of responses to losses and rewards of groups, by the facts of the chosen loss.

Shapes: G pairs, S = 2 G responses in the order chosen, rejected, chosen, rejected ...
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.core.facts import loss_facts, resolve_knobs
from prefopt.objective.pairs import dpo


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss of each pair, and its implicit rewards beta * log(policy / reference), detached. Shapes (G,)."""

    loss_G: Tensor
    chosen_reward_G: Tensor
    rejected_reward_G: Tensor


class Objective:
    """A loss of the table with its options, as a function of log-probs. Unknown options raise ConfigError."""

    def __init__(self, name: str, options: Mapping[str, float | str] | None = None) -> None:
        self.facts = loss_facts(name)
        knobs = resolve_knobs(name, dict(options or {}))
        module, _, function = self.facts.function.partition(":")
        self.function: Callable[..., Tensor] = getattr(importlib.import_module(module), function)
        self.reduce = str(knobs.pop("reduce", self.facts.reduce))
        self.knobs = knobs
        self.beta = float(knobs.get("beta", 1.0))

    def __call__(self, policy_S: Tensor, reference_S: Tensor, tokens_S: Tensor) -> Outcome:
        """Losses and rewards. Log-probs are sums over the `tokens_S` scored tokens of each response, in nats."""
        ratio_S = policy_S - reference_S
        used_S = ratio_S / tokens_S if self.reduce == "mean" else ratio_S
        loss_G = self.function(used_S[0::2], used_S[1::2], **self.knobs)
        reward_S = self.beta * ratio_S.detach()
        return Outcome(loss_G, reward_S[0::2], reward_S[1::2])


def dpo_loss(
    policy_logps: tuple[Tensor, Tensor],
    reference_logps: tuple[Tensor, Tensor],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO on log-probs that are already there: (loss, rewards of the chosen, rewards of the rejected).

    Each argument is (chosen, rejected): log-probs in nats summed over the response's tokens, shape (G,) or scalars.
    `reduction` is "mean" or "none" (loss per pair). Rewards are beta * (policy - reference), detached.
    Raises ValueError for another reduction, a beta that is not positive or a label_smoothing outside [0, 0.5]. arXiv 2305.18290 eq. 7.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is "{reduction}"; it must be "mean" or "none"')
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be from 0 to 0.5")
    chosen, rejected = (
        torch.as_tensor(policy) - torch.as_tensor(reference)
        for policy, reference in zip(policy_logps, reference_logps, strict=True)
    )
    loss = dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return (loss.mean() if reduction == "mean" else loss), beta * chosen.detach(), beta * rejected.detach()
