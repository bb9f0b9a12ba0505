"""Rows and log-probs made by hand, and what an objective says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.objective.apply import Objective, Outcome
from prefopt.objective.measured import Measured, measured

PAIR = Feedback("pair")
DEMONSTRATION = Feedback("demonstration")


def label(desirable: bool) -> Feedback:
    return Feedback("label", label=desirable)


def scores(*values: float) -> Feedback:
    return Feedback("scores", scores=values)


def ranking(*ranks: int) -> Feedback:
    return Feedback("ranking", ranking=ranks)


def group(feedback: Feedback, *tokens: int, weight: float = 1.0) -> TokenGroup:
    """A group whose responses have that many scored tokens."""
    return TokenGroup(
        np.zeros(1, np.int32),
        tuple(np.zeros(count, np.int32) for count in tokens),
        tuple(np.ones(count, np.bool_) for count in tokens),
        replace(feedback, weight=weight),
    )


def pairs(count: int, *tokens: int) -> list[TokenGroup]:
    """`count` pairs, of 1 token a response unless said otherwise."""
    return [group(PAIR, *(tokens or (1, 1))) for _ in range(count)]


def responses(groups: Sequence[TokenGroup]) -> int:
    return sum(len(each.response_ids) for each in groups)


def tokens(groups: Sequence[TokenGroup]) -> int:
    return sum(len(ids) for each in groups for ids in each.response_ids)


def said(groups: Sequence[TokenGroup], policy_N: Tensor, reference_N: Tensor | None = None, **more: Any) -> Measured:
    """What a model said of these groups, token by token."""
    lengths = torch.tensor([len(ids) for each in groups for ids in each.response_ids])
    response_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return measured(groups, response_N, policy_N, reference_N=reference_N, **more)


def scored(groups: Sequence[TokenGroup], score_S: Tensor) -> Measured:
    """What a reward model said of these groups: one score a response, and no log-probs."""
    return measured(groups, torch.zeros(0, dtype=torch.int64), score_S.new_zeros(0), score_S=score_S)


def judged(options: Any, groups: Sequence[TokenGroup], *args: Tensor, learn: bool = False, **more: Any) -> Outcome:
    """What the objective with these options says of a whole step."""
    objective = Objective(options)
    of = scored if objective.trains_reward_model else said
    return objective(of(groups, *args, **more), totals=objective.totals(groups), learn=learn)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def randoms(count: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Log-probs: negative numbers of about `scale`."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-scale * (drawn + 0.05)).requires_grad_()
