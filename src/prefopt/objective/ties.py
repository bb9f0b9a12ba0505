"""Losses of pairs some of which are ties (`tie_G` is 1 there, else 0). Shape (G,), in nats.

arXiv 2409.17431 puts models of comparisons with ties in the place of Bradley-Terry's. d = beta (c - r), c and r being
log(policy / reference) of the chosen and of the rejected response; of a tie, of either.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rao_kupper(chosen_G: Tensor, rejected_G: Tensor, tie_G: Tensor, *, beta: float = 0.1, nu: float = 3.0) -> Tensor:
    """-log P of each pair: P(win) = s(d - log nu), P(tie) = (nu^2 - 1) s(d - log nu) s(-d - log nu).

    `nu` > 1. Where policy == reference a tie has P = (nu - 1) / (nu + 1). Ties pull d to 0, wins push it up.
    """
    logit_G, lead = beta * (chosen_G - rejected_G), math.log(nu)
    tied_G = -F.logsigmoid(-logit_G - lead) - math.log(nu**2 - 1)
    return -F.logsigmoid(logit_G - lead) + tie_G * tied_G


def davidson(chosen_G: Tensor, rejected_G: Tensor, tie_G: Tensor, *, beta: float = 0.1, nu: float = 1.0) -> Tensor:
    """-log P of each pair: P(win) = 1 / (1 + exp(-d) + 2 nu exp(-d / 2)), P(tie) = 2 nu exp(-d / 2) P(win).

    `nu` > 0. Where policy == reference a tie has P = nu / (1 + nu). Ties pull d to 0, wins push it up.
    """
    logit_G, log_2nu = beta * (chosen_G - rejected_G), math.log(2 * nu)
    tie_odds_G = log_2nu - logit_G / 2
    win_G = torch.logsumexp(torch.stack([torch.zeros_like(logit_G), -logit_G, tie_odds_G]), dim=0)
    return win_G - tie_G * tie_odds_G
