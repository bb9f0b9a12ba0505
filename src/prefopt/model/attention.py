"""Shared-prefix attention, registered with transformers under the name "prefopt": any decoder that uses its interface.

Inside `use_layout` it follows the packed layout. Outside it is transformers' own SDPA, so that the same model can
generate and can be compared with its plain forward.

Shapes: H query heads, h key/value heads, T tokens, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.model.layout import Segment, active_layout

NAME = "prefopt"
calls_in_layout = 0  # how often attention has followed a layout: a model that never asks is not trained packed


def register() -> None:
    """Make `attn_implementation="prefopt"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return None if active_layout() is not None else sdpa_mask(*args, **kwargs)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (1, H, T, E) over `key`, `value` (1, h, T, E); returns (1, T, H, E) as transformers expects."""
    global calls_in_layout
    layout = active_layout()
    special = softcap is not None or s_aux is not None
    if layout is None:
        if special:
            mask = attention_mask if attention_mask is not None else _plain_causal(query, key)
            return _explicit(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    calls_in_layout += 1
    segments = layout.segments(sliding_window, query.device)
    pieces = []
    for segment, (q, k, v) in zip(segments, _split(query, key, value, segments), strict=True):
        if special:
            mask = segment.mask if segment.mask is not None else _plain_causal(q, k)
            pieces.append(_explicit(q, k, v, mask, scaling, softcap, s_aux))
            continue
        pieces.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=segment.mask,
                is_causal=segment.mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _split(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each segment.

    Every tensor is split once at all boundaries and put together again, because slicing it once per segment makes
    autograd fill and add a whole tensor for each slice (twice the time of a step, measured).
    """
    bounds = sorted({0, query.shape[2], *(edge for segment in segments for key_range in segment.keys for edge in key_range)})
    sizes = [after - before for before, after in zip(bounds, bounds[1:], strict=False)]
    index = {edge: place for place, edge in enumerate(bounds)}
    parts = [tensor.split(sizes, dim=2) for tensor in (query, key, value)]

    def ranges(number: int, wanted: tuple[tuple[int, int], ...]) -> Tensor:
        chosen = [part for start, end in wanted for part in parts[number][index[start] : index[end]]]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)

    return [
        (ranges(0, ((segment.query_start, segment.query_end),)), ranges(1, segment.keys), ranges(2, segment.keys))
        for segment in segments
    ]


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """Attention written out, for soft-capped scores (Gemma 2) and attention sinks (gpt-oss); softmax in fp32."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    scores = scores.float()
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(value.dtype) @ value


def _plain_causal(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
