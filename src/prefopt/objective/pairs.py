"""Losses of a chosen and a rejected response. `chosen_G`, `rejected_G`: log(policy / reference) of each response, in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO loss of each pair, shape (G,), in nats.

    Log-ratios are summed over tokens. arXiv 2305.18290 eq. 7; with `label_smoothing` > 0 it is cDPO, the expected
    loss when that share of labels is flipped. ln 2 where policy == reference.
    """
    logit_G = beta * (chosen_G - rejected_G)
    return -(1 - label_smoothing) * F.logsigmoid(logit_G) - label_smoothing * F.logsigmoid(-logit_G)


def ipo(chosen_G: Tensor, rejected_G: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO loss of each pair, shape (G,), in nats squared.

    arXiv 2310.12036 eq. 17, with their tau called beta: the margin is pulled to 1 / (2 beta). Log-ratios are summed
    over tokens in the paper and averaged in TRL; the caller decides (`reduce`).
    """
    return (chosen_G - rejected_G - 1 / (2 * beta)) ** 2
