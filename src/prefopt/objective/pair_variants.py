"""Losses of a pair that look at more than its two log-ratios, or at them in another way than their difference.

`chosen_G`, `rejected_G`: log(policy / reference) of each response, in nats; below c and r, m = c - r, and s is the
logistic sigmoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def odpo(
    chosen_G: Tensor, rejected_G: Tensor, margin_G: Tensor, *, beta: float = 0.1, alpha: float = 1.0, scaling: str = "log"
) -> Tensor:
    """DPO with an offset, loss of each pair, shape (G,), in nats: -log s(beta m - alpha f(margin)).

    arXiv 2402.10571. f is the logarithm with `scaling` "log", for which every `margin_G` has to be above 0 (nothing is
    clamped: 0 gives a loss of 0 and a negative margin NaN), and the margin itself, any number, with "identity".
    """
    offset_G = torch.log(margin_G) if scaling == "log" else margin_G
    return -F.logsigmoid(beta * (chosen_G - rejected_G) - alpha * offset_G)


def dpop(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPO-Positive, loss of each pair, shape (G,), in nats: -log s(beta (m - penalty max(0, -c))).

    arXiv 2402.13228, `penalty` is its lambda. ln 2 where policy == reference; there the slope in c jumps, and the one
    used is that of c > 0, DPO's.
    """
    return -F.logsigmoid(beta * (chosen_G - rejected_G - penalty * F.relu(-chosen_G)))


def r_dpo(
    chosen_G: Tensor,
    rejected_G: Tensor,
    chosen_tokens_G: Tensor,
    rejected_tokens_G: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> Tensor:
    """Length-regularised DPO, loss of each pair, shape (G,), in nats: -log s(beta m + alpha (|y_w| - |y_l|)).

    arXiv 2403.19159. The best policy for reward R(y) - alpha |y| is reference * exp((R - alpha |y|) / beta) / Z, so
    R = beta log-ratio + alpha |y| + const: length that explains the preference is not learned. `alpha` is in reward a
    token, |y| counts scored tokens.
    """
    longer_G = chosen_tokens_G - rejected_tokens_G
    return -F.logsigmoid(beta * (chosen_G - rejected_G) + alpha * longer_G)


def beta_dpo(
    chosen_G: Tensor,
    rejected_G: Tensor,
    step_margin: Tensor,
    margin_mean: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
) -> Tensor:
    """DPO with a dynamic beta, loss of each pair, shape (G,), in nats: -log s(b m), b = beta (1 + alpha (mean m - M)).

    arXiv 2407.08639, batch level, without its filter of pairs. mean m = `step_margin` of the step; M = `margin_mean`, a
    moving average over steps that keeps `momentum` of itself (the caller's part) and has taken in this step. No gradient
    through b, which is at least beta / 100: the authors' floor of 0.001 at beta = 0.1. As in their code m is in nats,
    without beta, and M has this step in it; theirs starts at 0, here it starts at the first step's mean.
    """
    factor = (1 + alpha * (step_margin - margin_mean)).clamp(min=0.01)
    return -F.logsigmoid(beta * factor * (chosen_G - rejected_G))


def cal_dpo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """Calibrated DPO, loss of each pair, shape (G,): -log s(m) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    arXiv 2412.14516 algorithm 1; nats plus nats squared. ln 2 + 1 / (2 beta^2) where policy == reference.
    """
    target = 1 / (2 * beta)
    return -F.logsigmoid(chosen_G - rejected_G) + (chosen_G - target) ** 2 + (rejected_G + target) ** 2


def tdpo(
    chosen_G: Tensor,
    rejected_G: Tensor,
    chosen_kl_G: Tensor,
    rejected_kl_G: Tensor,
    *,
    beta: float = 0.1,
    version: str = "tdpo2",
    alpha: float = 0.5,
) -> Tensor:
    """Token-level DPO, loss of each pair, shape (G,), in nats: -log s(beta (m - d)).

    arXiv 2404.11999. `chosen_kl_G`, `rejected_kl_G`: KL(reference || policy) of the next token, summed over the
    response. d = KL(rejected) - KL(chosen) for "tdpo1"; for "tdpo2" `alpha` times that, without a gradient through
    KL(chosen).
    """
    weight, chosen_kl_G = (1.0, chosen_kl_G) if version == "tdpo1" else (alpha, chosen_kl_G.detach())
    return -F.logsigmoid(beta * (chosen_G - rejected_G - weight * (rejected_kl_G - chosen_kl_G)))


def soft_dpo(chosen_G: Tensor, rejected_G: Tensor, probability_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO on soft labels, loss of each pair, shape (G,), in nats: -p log s(beta m) - (1 - p) log s(-beta m).

    cDPO with 1 - p of each row as its share of flipped labels; p = `probability_G`, from 0 to 1. Smallest, the entropy
    of p, at m = log(p / (1 - p)) / beta. ln 2 where policy == reference.
    """
    logit_G = beta * (chosen_G - rejected_G)
    return -probability_G * F.logsigmoid(logit_G) - (1 - probability_G) * F.logsigmoid(-logit_G)
