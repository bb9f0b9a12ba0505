"""Losses of responses that are desirable or not. `ratio_S`: log(policy / reference) of each, summed over tokens, in nats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto(
    ratio_S: Tensor,
    desirable_S: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO loss of each response, shape (S,), from 0 to the weight of its class. arXiv 2402.01306 eq. 8.

    `kl` (nats, no gradient) is the paper's z0: the point from which a ratio is a gain or a loss. Half the class's weight
    where the ratio equals it, as where policy == reference.
    """
    gain_S = beta * (ratio_S - kl)
    return torch.where(desirable_S, desirable_weight * torch.sigmoid(-gain_S), undesirable_weight * torch.sigmoid(gain_S))


def bco(ratio_S: Tensor, desirable_S: Tensor, reward_mean: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO loss of each response, shape (S,), in nats: a classifier whose logit is the reward. arXiv 2404.04656.

    `reward_mean` is the reward shift, delta of the paper: here the mean of beta * log-ratio over all responses of
    the steps so far, this one included, as in TRL. Without a gradient. ln 2 where policy == reference.
    """
    logit_S = beta * ratio_S - reward_mean
    return -F.logsigmoid(torch.where(desirable_S, logit_S, -logit_S))


def apo_zero_unpaired(
    ratio_S: Tensor,
    desirable_S: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero of each response, shape (S,), from 0 to the weight of its class: KTO anchored at 0 instead of at the KL.

    arXiv 2408.06266 eq. 7, whose two terms need no partner. Half the class's weight where policy == reference.
    """
    gain_S = beta * ratio_S
    return torch.where(desirable_S, desirable_weight * torch.sigmoid(-gain_S), undesirable_weight * torch.sigmoid(gain_S))
