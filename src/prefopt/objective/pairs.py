"""Losses of a chosen and a rejected response. `chosen_G`, `rejected_G`: log(policy / reference) of each response, in nats.

Below, c and r are these, m = c - r, and s is the logistic sigmoid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO loss of each pair, shape (G,), in nats.

    Log-ratios are summed over tokens. arXiv 2305.18290 eq. 7; with `label_smoothing` > 0 it is cDPO, the expected
    loss when that share of labels is flipped. ln 2 where policy == reference.
    """
    logit_G = beta * (chosen_G - rejected_G)
    return -(1 - label_smoothing) * F.logsigmoid(logit_G) - label_smoothing * F.logsigmoid(-logit_G)


def robust(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO loss of each pair, shape (G,), in nats: ((1 - e) l(m) - e l(-m)) / (1 - 2 e), l(m) = -log s(beta m).

    arXiv 2403.00409. Its mean over labels of which a share e = `label_smoothing` < 0.5 is flipped is DPO's on the clean
    ones. ln 2 where policy == reference; without a lower bound for e > 0, and it falls in m everywhere.
    """
    logit_G = beta * (chosen_G - rejected_G)
    kept_G, flipped_G = -F.logsigmoid(logit_G), -F.logsigmoid(-logit_G)
    return ((1 - label_smoothing) * kept_G - label_smoothing * flipped_G) / (1 - 2 * label_smoothing)


def ipo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO loss of each pair, shape (G,), in nats squared.

    arXiv 2310.12036 eq. 17, with their tau called beta: the margin is pulled to 1 / (2 beta). Log-ratios are summed
    over tokens in the paper and averaged in TRL; the caller decides (`reduce`).
    """
    return (chosen_G - rejected_G - 1 / (2 * beta)) ** 2


def hinge(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """Hinge loss of each pair, shape (G,), in reward: max(0, 1 - beta m).

    The hinge-norm of arXiv 2309.06657: SLiC-HF's (arXiv 2305.10425) on log-ratios, with its margin of 1. It is 1 where
    policy == reference and 0, without a gradient, from m = 1 / beta on.
    """
    return F.relu(1 - beta * (chosen_G - rejected_G))


def exo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO loss of each pair, shape (G,), in nats: KL between Bernoulli(s(beta m)) and Bernoulli(1 - e).

    arXiv 2402.00856 eq. 16 with K = 2, e = `label_smoothing` > 0. 0 at m = log((1 - e) / e) / beta. Where policy ==
    reference: -ln 2 - 0.5 ln(e (1 - e)). Its slope beta^2 p (1 - p) (m - that target) vanishes for pairs far off.
    """
    logit_G = beta * (chosen_G - rejected_G)
    right_G = F.logsigmoid(logit_G) - math.log1p(-label_smoothing)
    wrong_G = F.logsigmoid(-logit_G) - math.log(label_smoothing)
    return torch.sigmoid(logit_G) * right_G + torch.sigmoid(-logit_G) * wrong_G


def discopop(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """DiscoPOP loss of each pair, shape (G,): (1 - w) (-log s(beta m)) + w exp(-beta m), w = s(beta m / tau).

    arXiv 2406.08414 eq. 5; (ln 2 + 1) / 2 where policy == reference. Not monotonic: with tau = 0.05 it rises in m
    around 0. w exp(-beta m) is one exponential here, which stays finite for pairs far in the wrong order (tau <= 1).
    """
    logit_G = beta * (chosen_G - rejected_G)
    logistic_G = -torch.sigmoid(-logit_G / tau) * F.logsigmoid(logit_G)
    return logistic_G + torch.exp(F.logsigmoid(logit_G / tau) - logit_G)


def nca(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.01) -> Tensor:
    """NCA loss of each pair, shape (G,), in nats: -log s(beta c) - 0.5 log s(-beta c) - 0.5 log s(-beta r).

    arXiv 2402.05369 with K = 2 responses and preference labels. 2 ln 2 where policy == reference. The chosen response
    is held at c = ln(2) / beta, and both matter by themselves, not only their difference.
    """
    chosen_reward_G, rejected_reward_G = beta * chosen_G, beta * rejected_G
    noise_G = F.logsigmoid(-chosen_reward_G) + F.logsigmoid(-rejected_reward_G)
    return -F.logsigmoid(chosen_reward_G) - 0.5 * noise_G


def bco_pair(chosen_G: Tensor, rejected_G: Tensor, reward_mean: Tensor, *, beta: float = 0.1) -> Tensor:
    """BCO loss of each pair, shape (G,), in nats: -log s(beta c - d) - log s(-(beta r - d)).

    arXiv 2404.04656. d = `reward_mean`, a number: the mean of beta * log-ratio over all responses so far, this step's
    among them; no gradient. TRL 1.16's bco_pair leaves d out. 2 ln 2 where policy == reference and d = 0.
    """
    return -F.logsigmoid(beta * chosen_G - reward_mean) - F.logsigmoid(reward_mean - beta * rejected_G)


def sppo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """SPPO loss of each pair with hard labels, shape (G,), in nats squared: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    arXiv 2405.00675 eq. 4.7 with the winner's probability 1, the loser's 0 and eta = 1 / beta. 1 / (2 beta^2) where
    policy == reference.
    """
    target = 1 / (2 * beta)
    return (chosen_G - target) ** 2 + (rejected_G + target) ** 2


def apo_zero(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero loss of each pair, shape (G,), from 0 to 2: 1 - s(beta c) + s(beta r).

    arXiv 2408.06266 eq. 7, plus 1 as in TRL. 1 where policy == reference.
    """
    return torch.sigmoid(-beta * chosen_G) + torch.sigmoid(beta * rejected_G)


def apo_down(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-down loss of each pair, shape (G,), from 0 to 2: s(beta c) + 1 - s(beta (c - r)).

    arXiv 2408.06266 eq. 8, plus 1 as in TRL. 1 where policy == reference, and there its slope in c is 0: only the
    rejected response is pushed down, then both are, the rejected one further.
    """
    return torch.sigmoid(beta * chosen_G) + torch.sigmoid(beta * (rejected_G - chosen_G))
