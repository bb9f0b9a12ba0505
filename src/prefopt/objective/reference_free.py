"""Losses of a chosen and a rejected response under the policy alone: log-probs in nats, no reference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def simpo(chosen_mean_logp_G: Tensor, rejected_mean_logp_G: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO loss of each pair, shape (G,), in nats. Log-probs are averaged over tokens. arXiv 2405.14734 eq. 6.

    `gamma` is a difference of rewards; TRL's loss has it as the same number, and divides by beta inside
    (gamma_logratios). Where both are equally likely it is log(1 + exp(gamma)).
    """
    return -F.logsigmoid(beta * (chosen_mean_logp_G - rejected_mean_logp_G) - gamma)


def cpo(
    chosen_logp_G: Tensor, rejected_logp_G: Tensor, chosen_tokens_G: Tensor, *, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    """CPO loss of each pair, shape (G,): DPO under a uniform reference, plus imitation. arXiv 2401.08417 eq. 3 and 4.

    Log-probs are summed over tokens. `alpha` weighs the chosen response's mean negative log-prob, in nats per token: the
    paper sums it, which ties its weight to the length. TRL averages it over all tokens of a batch: alpha = 0 and sft.
    """
    preference_G = -F.logsigmoid(beta * (chosen_logp_G - rejected_logp_G))
    return preference_G - alpha * chosen_logp_G / chosen_tokens_G


def orpo(chosen_mean_logp_G: Tensor, rejected_mean_logp_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """ORPO loss of each pair, shape (G,), in nats: imitation of chosen, and `beta` times the odds-ratio term.

    Log-probs are averaged over tokens. arXiv 2403.07691 eq. 6 and 7; beta is their lambda. The odds-ratio term is ln 2
    where both are equally likely. Only response tokens are imitated; TRL imitates the prompt's too.
    """
    log_odds_ratio_G = log_odds(chosen_mean_logp_G) - log_odds(rejected_mean_logp_G)
    return -chosen_mean_logp_G - beta * F.logsigmoid(log_odds_ratio_G)


def unlikelihood(chosen_mean_logp_G: Tensor, rejected_mean_log_complement_G: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Unlikelihood loss of each pair, shape (G,), in nats per token: imitate chosen, make each token of rejected unlikely.

    arXiv 1908.04319 eq. 4 with the token of the rejected response as the only negative candidate: the baseline of arXiv
    2305.18290 section 6, where "minimize the probability" leaves open how. -log(1 - p) is at least 0 and lets go of a
    token once it is unlikely; log p would fall for ever. `alpha` is from 0 (imitation alone) to 1.
    """
    return -chosen_mean_logp_G - alpha * rejected_mean_log_complement_G


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-prob in nats: logp - log(1 - exp(logp)), any shape.

    expm1 keeps the digits of 1 - p where p is near 1, and cannot overflow where p is tiny. p = 1 has infinite odds;
    it counts as 1 - eps of the dtype, without a gradient.
    """
    below_0 = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return below_0 - torch.log(-torch.expm1(below_0))


def log_complement(logp: Tensor) -> Tensor:
    """log(1 - p) of a log-prob in nats, any shape. Its slope is -p / (1 - p) in logp, and -p in the logit of p.

    expm1 and log1p keep the digits where p is near 1 and near 0. p = 1 counts as 1 - eps of the dtype, without a gradient.
    """
    below_0 = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    likely = below_0 > -math.log(2)  # the branch that is not taken gets a harmless value: its slope must not be 0 * inf
    of_likely = torch.log(-torch.expm1(below_0.masked_fill(~likely, -1.0)))
    return torch.where(likely, of_likely, torch.log1p(-torch.exp(below_0.masked_fill(likely, -1.0))))
