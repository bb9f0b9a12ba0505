"""Losses that compare the distributions of a whole step, quantile by quantile (AOT, arXiv 2406.05882)."""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.objective.pairs import dpo


def aot(
    chosen_logp_G: Tensor,
    rejected_logp_G: Tensor,
    chosen_reference_G: Tensor,
    rejected_reference_G: Tensor,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT loss of paired rows, shape (G,), one value a quantile, in nats.

    The log-prob of chosen minus that of rejected, summed over tokens, is sorted over the step for the policy and for the
    reference; the loss is (c)DPO's of their difference at each quantile. A value belongs to no pair. ln 2 where
    policy == reference.
    """
    policy_G = torch.sort(chosen_logp_G - rejected_logp_G).values
    reference_G = torch.sort(chosen_reference_G - rejected_reference_G).values
    return dpo(policy_G, reference_G, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired(ratio_S: Tensor, desirable_S: Tensor, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT loss of desirable and undesirable responses, shape (Q,), one value a quantile, in nats; Q: the smaller class.

    Both classes' log-ratios are sorted over the step; the larger class is read at the smaller one's quantile levels
    (i + 1/2) / n, linearly interpolated. A step of one class alone compares nothing: one value of 0, gradient 0.
    """
    good, bad = torch.sort(ratio_S[desirable_S]).values, torch.sort(ratio_S[~desirable_S]).values
    count = min(len(good), len(bad))
    if count == 0:
        return 0.0 * ratio_S[:1]
    return dpo(_quantiles(good, count), _quantiles(bad, count), beta=beta, label_smoothing=label_smoothing)


def _quantiles(ordered: Tensor, count: int) -> Tensor:
    """`count` quantiles of ascending values, at levels (i + 1/2) / count; the values themselves where there are as many."""
    if count == len(ordered):
        return ordered
    levels = (torch.arange(count, dtype=ordered.dtype, device=ordered.device) + 0.5) / count
    place = (levels * len(ordered) - 0.5).clamp(0, len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
