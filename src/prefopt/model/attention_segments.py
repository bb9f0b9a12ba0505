"""Attention by one call of torch's SDPA a segment: the plain backend, for every device, dtype and head size.

Shapes: H query heads, h key/value heads, T tokens, E head size, F head size of the values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.model.attention_request import Request
from prefopt.model.layout import Layout, Segment


def unsupported(request: Request) -> str | None:
    """Why this backend cannot serve: it always can."""
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of `query` (1, H, T, E) over `key` (1, h, T, E) and `value` (1, h, T, F), shape (1, T, H, F).

    `scaling` of the scores is 1 / sqrt(E) where None; `window` is in positions, the own one counted.
    """
    segments = layout.segments(window, query.device)
    pieces = []
    for segment, (q, k, v) in zip(segments, _split(query, key, value, segments), strict=True):
        if softcap is not None or s_aux is not None:
            mask = segment.mask if segment.mask is not None else plain_causal(q, k)
            pieces.append(explicit(q, k, v, mask, scaling, softcap, s_aux))
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
    return torch.cat(pieces, dim=2).transpose(1, 2)


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


def explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, s_aux: Tensor | None
) -> Tensor:
    """Attention written out, for soft-capped scores (Gemma 2) and attention sinks (gpt-oss); softmax in at least fp32."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(value.dtype) @ value


def plain_causal(query: Tensor, key: Tensor) -> Tensor:
    """True where a query may see a key, shape (queries, keys), the last of both at the same position."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
