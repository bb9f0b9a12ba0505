"""What one call of attention asks of a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """The facts by which a backend can or cannot serve. Head sizes are None where they are not known yet.

    `softcap`: scores go through tanh (Gemma 2). `sinks`: a learned logit takes part of each softmax (gpt-oss).
    `gradient`: a backward pass follows.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int | None = None
    value_size: int | None = None
    softcap: bool = False
    sinks: bool = False
    gradient: bool = False


def request_of(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, s_aux: Tensor | None) -> Request:
    """The request of `query` (1, H, T, E), `key` (1, h, T, E) and `value` (1, h, T, F)."""
    return Request(
        device=query.device,
        dtype=query.dtype,
        head_size=query.shape[-1],
        value_size=value.shape[-1],
        softcap=softcap is not None,
        sinks=s_aux is not None,
        gradient=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
    )
