"""Losses of K responses, from best to worst, one value a group. A group may have fewer responses: `present_GK` says which.

`ranked_GK`: log(policy / reference) of each response, summed over tokens, in nats. `value_GK`: how good each is said to be.
Shapes: G groups, K places; [g, i, j] of a (G, K, K) tensor is about place i against place j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plackett_luce(ranked_GK: Tensor, present_GK: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO loss of each ranking, shape (G,), in nats: summed over places, -log of its Plackett-Luce probability.

    arXiv 2305.18290 appendix A.3 eq. 20. A sum, not a mean over places: exp(-loss) is what the model gives to this of
    the K! rankings. log(K!) where policy == reference; dpo for K = 2; 0 for K = 1.
    """
    not_better_KK = torch.ones(ranked_GK.shape[1], ranked_GK.shape[1], device=ranked_GK.device).triu().bool()
    rivals_GKK = not_better_KK & present_GK[:, None, :]
    place_GK = torch.logsumexp(_only(rivals_GKK, beta * lead(ranked_GK)), dim=2)
    return place_GK.masked_fill(~present_GK, 0.0).sum(1)


def all_pairs(
    ranked_GK: Tensor, value_GK: Tensor, present_GK: Tensor, *, beta: float = 0.1, weighting: str = "uniform"
) -> Tensor:
    """Weighted mean of dpo over the pairs of a group with a better and a worse response, shape (G,), in nats.

    `weighting`: uniform, gap (by the difference of values) or lambda (`lambda_weight`). Weights add up to 1 in each
    group, so K = 2 is dpo under all three. ln 2 where policy == reference; 0 where all values are equal.
    """
    pairs_GKK = better(value_GK, present_GK)
    weight_GKK = pairs_GKK.to(ranked_GK.dtype)
    if weighting == "gap":
        weight_GKK = weight_GKK * -lead(value_GK)
    elif weighting == "lambda":
        weight_GKK = weight_GKK * lambda_weight(ranked_GK.detach(), value_GK, present_GK)
    return mean_of_pairs(-F.logsigmoid(-beta * lead(ranked_GK)), weight_GKK)


def best_of_k(ranked_GK: Tensor, value_GK: Tensor, present_GK: Tensor, *, beta: float = 0.1) -> Tensor:
    """S-DPO loss of each group, shape (G,), in nats: the best against all others in one softmax. arXiv 2406.09215.

    The order of the others does not matter. Several responses with the highest value are not set against each other:
    the loss is the mean over them, each against the worse ones. ln K where policy == reference and one is best; dpo for
    K = 2; 0 where all are equally good.
    """
    best_GK = present_GK & (value_GK == value_GK[:, :1])
    rivals_GKK = (present_GK & ~best_GK)[:, None, :].expand(-1, best_GK.shape[1], -1)
    loss_GK = -F.logsigmoid(-torch.logsumexp(_only(rivals_GKK, beta * lead(ranked_GK)), dim=2))
    return loss_GK.masked_fill(~best_GK, 0.0).sum(1) / best_GK.sum(1)


def lead(values_GK: Tensor) -> Tensor:
    """By how much place j is ahead of place i, shape (G, K, K)."""
    return values_GK[:, None, :] - values_GK[:, :, None]


def better(value_GK: Tensor, present_GK: Tensor) -> Tensor:
    """Whether place i is better than place j and both are there, shape (G, K, K)."""
    return (lead(value_GK) < 0) & present_GK[:, :, None] & present_GK[:, None, :]


def mean_of_pairs(loss_GKK: Tensor, weight_GKK: Tensor) -> Tensor:
    """Weighted mean over the pairs of each group, shape (G,); 0 where no pair has a weight."""
    total_G = weight_GKK.sum((1, 2))
    return (weight_GKK * loss_GKK).sum((1, 2)) / total_G.masked_fill(total_G == 0, 1.0)


def lambda_weight(ranked_GK: Tensor, value_GK: Tensor, present_GK: Tensor) -> Tensor:
    """LiPO's lambda weight of each pair of a group up to a factor of the group, shape (G, K, K). arXiv 2402.01878.

    |G_i - G_j| |1/D(i) - 1/D(j)|: gains G = 2^value - 1, discounts D = log(1 + rank) with the rank under the policy. What
    a swap of the two would change in the discounted gain of the policy's order. Gains are relative to the best one's,
    which cancels in a mean and cannot overflow.
    """
    gain_GK = torch.exp2((value_GK - value_GK[:, :1]).masked_fill(~present_GK, -torch.inf))
    order_GK = ranked_GK.masked_fill(~present_GK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_GK = order_GK.argsort(dim=1) + 1
    return lead(gain_GK).abs() * lead(1 / torch.log1p(rank_GK.to(gain_GK.dtype))).abs()


def _only(rivals_GKK: Tensor, leads_GKK: Tensor) -> Tensor:
    """Leads of the rivals; elsewhere the lowest finite number, which adds nothing to a sum of exponentials."""
    return leads_GKK.masked_fill(~rivals_GKK, torch.finfo(leads_GKK.dtype).min)
