"""The reward that a DPO policy stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluate.intervals import Floats


@dataclass(frozen=True, slots=True)
class ImplicitReward:
    """beta * log(policy / reference) of one response: `total`, and `tokens`, which sum to it."""

    total: float
    tokens: Floats


def implicit_reward(policy_logps: NDArray[Any], reference_logps: NDArray[Any], beta: float = 0.1) -> ImplicitReward:
    """The reward of one response from its token log-probs (nats) under policy and reference.

    arXiv 2305.18290 eq. 5 without the term of the prompt alone: only differences between responses to the same prompt
    mean something.
    """
    policy, reference = (np.asarray(logps, dtype=np.float64) for logps in (policy_logps, reference_logps))
    if policy.shape != reference.shape or policy.ndim != 1:
        raise ValueError(f"log-probs of the same tokens are needed, found shapes {policy.shape} and {reference.shape}")
    tokens = beta * (policy - reference)
    return ImplicitReward(float(tokens.sum()), tokens)


def implicit_rewards(
    policy_scores: Sequence[tuple[NDArray[Any], ...]], reference_scores: Sequence[tuple[NDArray[Any], ...]], beta: float = 0.1
) -> list[tuple[ImplicitReward, ...]]:
    """`implicit_reward` of every response of every group, from what `LanguageModel.score` gives for both models."""
    return [
        tuple(implicit_reward(policy, reference, beta) for policy, reference in zip(ours, theirs, strict=True))
        for ours, theirs in zip(policy_scores, reference_scores, strict=True)
    ]
