"""Which token comes next: the policy's distribution, its temperature, its nucleus, and one random stream a response.

Shapes: S rows (responses in progress), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Uniforms = NDArray[np.float64]
_FIRST_NUCLEUS = 512  # most likely tokens that are sorted first; a nucleus seldom has more, and a whole sort takes longest


def uniforms_of(seed: int, prompt: int, response: int, tokens: int) -> Uniforms:
    """The numbers in [0, 1) that decide the tokens of response `response` to prompt number `prompt`, shape (tokens,).

    They depend on nothing else: not on the batch, the order of computation, or how many responses are drawn.
    """
    return np.random.default_rng([seed % 2**64, prompt, response]).random(tokens)


def next_tokens(logits_SV: Tensor, uniform_S: Uniforms, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The token of each row, shape (S,), from logits of any dtype; the most likely one at temperature 0.

    Token v of a row is taken where its uniform number falls between the cumulative probabilities before and behind v, so
    that v has its probability under softmax(logits / temperature). Sums are in fp64 (fp32 where a device has no fp64), for
    fp32 sums over a large vocabulary would lose rare tokens. `top_p` below 1 keeps the smallest set of most likely tokens
    whose probabilities reach it (arXiv 1904.09751). A token without probability is never taken.
    """
    if temperature == 0:
        return logits_SV.float().argmax(dim=-1)
    probability_SV = torch.softmax(logits_SV.float() / temperature, dim=-1)
    if top_p < 1:
        return _from_nucleus(probability_SV, uniform_S, top_p)
    return _inverse(_cumulative(probability_SV), uniform_S)


def _from_nucleus(probability_SV: Tensor, uniform_S: Uniforms, top_p: float) -> Tensor:
    vocabulary, count = probability_SV.shape[1], _FIRST_NUCLEUS
    while True:
        count = min(count, vocabulary)
        likely, token_SK = probability_SV.topk(count, dim=-1)
        cumulative = _cumulative(likely)
        if count == vocabulary or bool((cumulative[:, -1] >= top_p).all()):
            break
        count *= 8
    last_S = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=count - 1)
    within = torch.minimum(cumulative, cumulative.gather(1, last_S))
    return token_SK.gather(1, _inverse(within, uniform_S)[:, None])[:, 0]


def _cumulative(probability: Tensor) -> Tensor:
    wide: Any = torch.float32 if probability.device.type == "mps" else torch.float64
    return probability.cumsum(dim=-1, dtype=wide)


def _inverse(cumulative: Tensor, uniform_S: Uniforms) -> Tensor:
    """First column of each row of `cumulative` (S, K) that is above the row's uniform share of its last one, shape (S,)."""
    total = cumulative[:, -1:]
    wanted = torch.from_numpy(uniform_S).to(total.dtype).to(total.device)[:, None] * total
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach the total itself
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]
