"""Random packed layouts, tensors for them, and attention by definition, for tests of the backends."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from prefopt.model.layout import GroupSpan, Layout

# Groups as (prompt tokens, tokens of each response); a prompt may be empty.
SHAPES = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=4
)
WINDOWS = (None, 1, 3, 100)


def layout_of(shapes: list[tuple[int, tuple[int, ...]]]) -> Layout:
    spans, start = [], 0
    for prompt, responses in shapes:
        spans.append(GroupSpan(start, prompt, responses))
        start += spans[-1].tokens
    return Layout(tuple(spans))


def allowed_pairs(layout: Layout, window: int | None) -> Tensor:
    """The definition, shape (T, T): same group, a key of the prompt or of the same response, not after, within reach."""
    group, owner, position = [], [], []
    for number, span in enumerate(layout.spans):
        for part, length in enumerate((span.prompt, *span.responses)):
            group += [number] * length
            owner += [part] * length
            position += list(range(span.prompt if part else 0, (span.prompt if part else 0) + length))
    group_T, owner_T, position_T = torch.tensor(group), torch.tensor(owner), torch.tensor(position)
    distance = position_T[:, None] - position_T[None, :]
    same = (group_T[:, None] == group_T) & ((owner_T[:, None] == owner_T) | (owner_T == 0))
    return same & (distance >= 0) & (distance < (window or len(group) + 1))


def tensors(
    layout: Layout,
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value that ask for gradients, strided as transformers' models have them."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randn(1, layout.tokens, count, size, generator=random) for count in (heads[0], heads[1], heads[1])]
    query, key, value = (row.to(device, dtype).transpose(1, 2).requires_grad_() for row in rows)
    return query, key, value


def with_gradients(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], *args: Any, **options: Any) -> list[Tensor]:
    """The result of a backend, and the gradients of a fixed mix of it."""
    output = attend(*inputs[:3], *args, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, each tensor relative to its largest value (1 where that is smaller)."""
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in wanted]
    return max(
        float((a.double() - b.double()).abs().max()) / max(1.0, float(b.double().abs().max()))
        for a, b in zip(found, wanted, strict=True)
    )


def flash_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """What a variable-length flash kernel is documented to compute, and what it is documented to be given.

    A query at place i of a sequence sees the keys at places i + keys - queries - left to i + keys - queries + right.
    """
    for ends, rows, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        lengths = ends.diff()
        assert ends.dtype == torch.int32 and ends.is_contiguous() and int(ends[0]) == 0
        assert int(ends[-1]) == len(rows) and int(lengths.max()) == longest and int(lengths.min()) > 0
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (query, key, value))
    left, right = window_size
    pieces = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        grouped = query.shape[1] // key.shape[1]
        keys, values = (tensor[k0:k1].repeat_interleave(grouped, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query[q0:q1], keys) * (scale if scale is not None else query.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if left >= 0:
            seen &= torch.arange(k1 - k0) >= place - left
        if right >= 0:
            seen &= torch.arange(k1 - k0) <= place + right
        pieces.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(pieces)


def torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of torch 2.11's kernel: grouped heads are read from the tensors."""
    return flash_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The signature of torch 2.13's kernel: unequal numbers of heads are refused without `enable_gqa`."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_k is not None
    return flash_by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    """The signature of the package flash-attn: `causal` closes the window on the right."""
    assert dropout_p == 0.0
    window = (window_size[0], 0) if causal else window_size
    return flash_by_definition(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=window,
        softcap=softcap,
    )
