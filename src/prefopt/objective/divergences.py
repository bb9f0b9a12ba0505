"""What takes the place of the log-ratio where the policy is held to its reference by another divergence than reverse KL."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def divergence_score(ratio: Tensor, *, divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(t) of f-divergence DPO at t = policy / reference, any shape. `ratio` is log t, in nats, summed over tokens.

    arXiv 2309.16240: under the constraint D_f(policy || reference) = E_reference[f(t)] the implicit reward is
    beta f'(t) + a constant of the prompt, which cancels between two responses; so the difference of two scores takes
    the place of DPO's margin. Up to such a constant, chosen to make the score 0 at t = 1:

        divergence   f(t)                                     f'(t)                        TRL 1.16's name
        reverse_kl   t log t                                  log t                        reverse_kl
        forward_kl   -log t                                   1 - 1/t                      forward_kl
        js           t log t - (t + 1) log((t + 1) / 2)       log(2 t / (1 + t))           js_divergence
        alpha        (t^a - a t - (1 - a)) / (a (a - 1))      (t^(a - 1) - 1) / (a - 1)    alpha_divergence

    The names are the paper's: reverse is KL(policy || reference), which plain DPO has, and forward is
    KL(reference || policy). js is twice the Jensen-Shannon divergence: its slope in log t is 1/2 at t = 1, all others'
    is 1. `alpha` (a above) is TRL's f_alpha_divergence_coef, which is 1 minus the alpha of the paper, whose f' is
    (1 - t^-alpha) / alpha: here 1 is reverse KL and 0 forward KL. The paper's proof needs f' without a bound at t -> 0,
    so alpha <= 1.

    Powers of t leave the dtype's range for log-ratios that training does reach (1/t in fp32 at log t = -88.7). They are
    not clamped: such a score is infinite and its own gradient 0. In -log sigmoid(beta m), m the difference of two
    scores, that is loss 0 with gradient 0 where the pair is in the right order, which is the limit; it is a loss of
    infinity where it is in the wrong one and NaN where both scores are infinite, for the caller to refuse.
    ValueError for another divergence.
    """
    match divergence:
        case "reverse_kl":
            return ratio
        case "forward_kl":
            return _power_score(ratio, -1.0)
        case "js":
            return math.log(2) + F.logsigmoid(ratio)
        case "alpha":
            return _power_score(ratio, alpha - 1.0)
    raise ValueError(f'divergence is "{divergence}"; it must be one of {", ".join(DIVERGENCES)}')


def _power_score(ratio: Tensor, power: float) -> Tensor:
    """(t^power - 1) / power, which is log t at power 0; infinite without a gradient where t^power overflows."""
    if power == 0:
        return ratio
    exponent = power * ratio
    # The mask cuts the gradient: that of expm1 would be infinite, and NaN behind a loss whose own gradient is 0.
    overflow = torch.isposinf(torch.expm1(exponent.detach()))
    return torch.expm1(exponent.masked_fill(overflow, math.inf)) / power
