"""Losses of the policy's own samples: how likely a response is made, by how much better it was than expected.

Shapes: S responses, N scored tokens. An advantage is positive where a response (or token) was better than expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def ppo(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    value_N: Tensor,
    old_value_N: Tensor,
    return_N: Tensor,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
) -> Tensor:
    """Clipped policy loss plus `value_weight` times the value head's, of each token, shape (N,), in units of the reward.

    arXiv 1707.06347 eq. 7 and 9; the value counts within `value_clip` of the old one, where that makes the loss larger.
    """
    policy_N = clipped(logp_N - old_logp_N, advantage_N, clip)
    return policy_N + value_weight * value_loss(value_N, old_value_N, return_N, value_clip)


def rloo(sampled_logp_S: Tensor, old_logp_S: Tensor, advantage_S: Tensor, *, clip: float = 0.2) -> Tensor:
    """Clipped policy loss of each response as one action, shape (S,): on the first pass its gradient is REINFORCE's."""
    return clipped(sampled_logp_S - old_logp_S, advantage_S, clip)


def grpo(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip: float = 0.2) -> Tensor:
    """Clipped policy loss of each token, shape (N,); every token of a response has the response's advantage."""
    return clipped(logp_N - old_logp_N, advantage_N, clip)


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log_ratio): no reward for leaving the old policy further."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, value_clip: float) -> Tensor:
    """Half the squared error of the value, or of the value within `value_clip` of the old one where that is larger."""
    near_N = old_value_N + (value_N - old_value_N).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((value_N - return_N) ** 2, (near_N - return_N) ** 2)


def _of_ratio(log_ratio: Tensor, advantage: Tensor, clip: float) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    outside = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantage != 0)
    return {
        "loss/policy_avg": clipped(log_ratio, advantage, clip),
        "policy/approxkl_avg": ratio - 1 - log_ratio,  # an estimate of KL(old || policy) that is never negative
        "policy/clipfrac_avg": outside.to(ratio.dtype),
        "val/ratio": ratio,
    }


def _watch_ppo(of: Mapping[str, Tensor], *, clip: float, value_clip: float, value_weight: float) -> dict[str, Tensor]:
    value_N, old_value_N, return_N = of["value_N"], of["old_value_N"], of["return_N"]
    error_N = (value_N - return_N) ** 2
    loss_N = value_loss(value_N, old_value_N, return_N, value_clip)
    return {
        **_of_ratio(of["logp_N"] - of["old_logp_N"], of["advantage_N"], clip),
        "loss/value_avg": loss_N,
        "val/clipfrac_avg": (2 * loss_N > error_N).to(value_N.dtype),
    }


def _watch_rloo(of: Mapping[str, Tensor], *, clip: float) -> dict[str, Tensor]:
    return _of_ratio(of["sampled_logp_S"] - of["old_logp_S"], of["advantage_S"], clip)


def _watch_grpo(of: Mapping[str, Tensor], *, clip: float) -> dict[str, Tensor]:
    return _of_ratio(of["logp_N"] - of["old_logp_N"], of["advantage_N"], clip)


# What is logged of each step besides the loss, one value a unit of the loss, averaged as the loss is.
WATCHED: dict[str, Callable[..., dict[str, Any]]] = {"ppo": _watch_ppo, "rloo": _watch_rloo, "grpo": _watch_grpo}
