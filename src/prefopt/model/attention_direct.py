"""Attention on a CPU by torch's flash kernel itself, all segments of a layer in one autograd function.

One call of SDPA a segment, as `attention_segments` makes it, has autograd keep every output twice and handle several small
tensors a segment. And the kernel's backward in bf16 prepares each of its small products anew: with segments of some fifty tokens
it takes twice as long as in fp32, with some hundreds as long (benchmarks/RESULTS.md). So there the backward is computed in fp32,
which is closer.

Shapes: H query heads, h key/value heads, T tokens, E head size; Q queries and K keys of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt.model.attention_request import Request
from prefopt.model.layout import Layout, Segment

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FP32_BACKWARD = 768  # queries of a segment up to which its backward in fp32 takes no longer than in bf16
_KNOWS_SHARED_KEYS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)  # else each is given to each head


def unsupported(request: Request) -> str | None:
    """Why this backend cannot serve `request`, or None."""
    if request.device.type != "cpu":
        return f"it is for the CPU, not for {request.device.type}"
    if request.softcap or request.sinks:
        return "torch's kernel knows neither soft caps nor sinks"
    if request.dtype not in _DTYPES:
        return f"torch's kernel does not compute in {str(request.dtype).removeprefix('torch.')}"
    if request.value_size not in (None, request.head_size):
        return f"torch's kernel needs values of the keys' size, not {request.value_size} and {request.head_size}"
    if not all(hasattr(torch.ops.aten, name) for name in (_FORWARD, _BACKWARD)):
        return "this torch has no such kernel"
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
    """Attention of `query` (1, H, T, E) over `key`, `value` (1, h, T, E), shape (1, T, H, E).

    `scaling` of the scores is 1 / sqrt(E) where None; `window` is in positions, the own one counted.
    """
    assert softcap is None and s_aux is None, "refused by unsupported()"
    assert query.shape[2] == layout.tokens, "the layout is of another batch"
    query, key, value = (_with_whole_rows(tensor) for tensor in (query, key, value))
    segments = layout.segments(window, query.device)
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(query, key, value, _with_added_masks(layout, segments, window, _accumulated(query.dtype)), scaling)


# A segment, and its mask (Q, K) as what is added to the scores, 0 or -inf; None where it is plainly causal.
_Masked = tuple[Segment, Tensor | None]


def _with_added_masks(layout: Layout, segments: list[Segment], window: int | None, dtype: torch.dtype) -> list[_Masked]:
    """`dtype`: what the kernel adds up in. It takes a mask of its inputs' dtype as well, and reads any other one wrongly."""

    def added(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

    return layout.once(("direct", window, dtype), lambda: [(segment, added(segment.mask)) for segment in segments])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: list[_Masked], scaling: float | None) -> Tensor:
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size)
        logsumexp = torch.empty(1, tokens, heads, dtype=_accumulated(query.dtype))
        kernel = getattr(torch.ops.aten, _FORWARD)
        for segment, mask in segments:
            queries = slice(segment.query_start, segment.query_end)
            keys, values = (_repeated(_of_keys(tensor, segment), heads) for tensor in (key, value))
            of_segment, sums = kernel(query[:, :, queries], keys, values, 0.0, mask is None, attn_mask=mask, scale=scaling)
            out[:, queries] = of_segment.transpose(1, 2)
            logsumexp[:, queries] = sums.transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.segments, ctx.scaling = segments, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        heads, wide = query.shape[1], _accumulated(query.dtype)
        given = (_with_whole_rows(grads[0]).transpose(1, 2), query, key, value, out.transpose(1, 2))
        in_fp32 = [segment.query_end - segment.query_start <= _FP32_BACKWARD for segment, _ in ctx.segments]
        widened = tuple(tensor.to(wide) for tensor in given) if any(in_fp32) else given
        sums = logsumexp.transpose(1, 2)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        kernel = getattr(torch.ops.aten, _BACKWARD)
        idle = (
            key.shape[1] < torch.get_num_threads()
        )  # a thread takes whole heads of keys: repeated, there is more to share out
        for (segment, mask), is_wide in zip(ctx.segments, in_fp32, strict=True):
            incoming, q, k, v, o = widened if is_wide else given
            queries = slice(segment.query_start, segment.query_end)
            of_query, of_keys, of_values = kernel(
                incoming[:, :, queries],
                q[:, :, queries],
                _repeated(_of_keys(k, segment), heads, always=idle),
                _repeated(_of_keys(v, segment), heads, always=idle),
                o[:, :, queries],
                sums[:, :, queries],
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scaling,
            )
            grad_query[:, :, queries] = of_query
            _add_of_keys(grad_key, of_keys, segment)
            _add_of_keys(grad_value, of_values, segment)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """The kernel takes any strides but that of the last dimension to be as they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """What the kernel adds up in, and gives its log-sum-exp in."""
    return torch.promote_types(dtype, torch.float32)


def _of_keys(tensor: Tensor, segment: Segment) -> Tensor:
    """The rows of `tensor` (1, h, T, E) at the keys of a segment, shape (1, h, K, E)."""
    pieces = [tensor[:, :, start:end] for start, end in segment.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _repeated(keys: Tensor, heads: int, *, always: bool = False) -> Tensor:
    """(1, h, K, E) -> (1, H, K, E), each key head for all query heads that share it; unchanged where the kernel does that,
    unless `always`."""
    if (_KNOWS_SHARED_KEYS and not always) or keys.shape[1] == heads:
        return keys
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _add_of_keys(total: Tensor, gradient: Tensor, segment: Segment) -> None:
    """Add the gradient of a segment's keys, (1, H or h, K, E), to those of all tokens, (1, h, T, E), in place."""
    _, heads, keys, size = gradient.shape
    shared = gradient
    if heads != total.shape[1]:
        shared = gradient.to(total.dtype).view(1, total.shape[1], heads // total.shape[1], keys, size).sum(dim=2)
    place = 0
    for start, end in segment.keys:
        total[:, :, start:end] += shared[:, :, place : place + end - start]
        place += end - start
