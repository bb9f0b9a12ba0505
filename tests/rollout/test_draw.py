"""Tokens are drawn with exactly the probabilities of the policy: uniform numbers on a grid count them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from prefopt.rollout.draw import _inverse, next_tokens, uniforms_of

GRID = 20_000


def counted(logits: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """How many of evenly spread uniform numbers give each token, as a share; exact to 1 / GRID."""
    spread = (np.arange(GRID) + 0.5) / GRID
    tokens = next_tokens(logits.expand(GRID, -1), spread, temperature=temperature, top_p=top_p)
    return torch.bincount(tokens, minlength=len(logits)) / GRID


def some_logits(vocabulary: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_its_probability(temperature: float, dtype: torch.dtype) -> None:
    logits = some_logits(50).to(dtype)
    exact = torch.softmax(logits.double() / temperature, dim=-1)
    assert (counted(logits, temperature=temperature) - exact).abs().max() < 1.01 / GRID


@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.99])
def test_the_nucleus_is_that_of_transformers_and_keeps_its_proportions(top_p: float) -> None:
    logits = some_logits(50)
    kept = TopPLogitsWarper(top_p=top_p)(torch.empty(1, 0), logits[None])[0]
    assert 1 <= int(kept.isfinite().sum()) < 50
    assert (counted(logits, top_p=top_p) - torch.softmax(kept.double(), dim=-1)).abs().max() < 1.01 / GRID


def test_a_wide_nucleus_is_whole() -> None:
    """Of 2,000 equally likely tokens 90 % are far more than are looked at first."""
    spread = (np.arange(2000) + 0.5) / 2000
    tokens = next_tokens(torch.zeros(2000).expand(2000, -1), spread, top_p=0.9)
    assert 1800 <= len(set(tokens.tolist())) <= 1801


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    for top_p in (1.0, 0.999):
        ends = next_tokens(logits.expand(4, -1), np.array([0.0, 0.5 - 2**-30, 0.5 + 2**-30, 1 - 2**-53]), top_p=top_p).tolist()
        assert set(ends) == {1, 3}
        assert ends[0] == ends[1] != ends[2] == ends[3]


def test_a_number_that_rounds_up_to_1_takes_the_last_token_with_probability() -> None:
    """In fp32, as on devices without fp64, the largest uniform number below 1 is 1."""
    assert _inverse(torch.tensor([[0.25, 0.5, 0.5]]), np.array([1 - 2**-53])).tolist() == [1]


def test_temperature_0_takes_the_most_likely_token() -> None:
    logits = torch.stack([some_logits(50), -some_logits(50)])
    assert next_tokens(logits, np.array([0.1, 0.9]), temperature=0).tolist() == [int(row.argmax()) for row in logits]


def test_streams_are_apart_and_longer_ones_begin_like_shorter_ones() -> None:
    keys = [(seed, prompt, response) for seed in (0, 1, -1) for prompt in range(4) for response in range(4)]
    drawn = np.stack([uniforms_of(*key, 50) for key in keys])
    assert len(np.unique(drawn)) == drawn.size
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert np.array_equal(uniforms_of(1, 2, 3, 9), uniforms_of(1, 2, 3, 50)[:9])
