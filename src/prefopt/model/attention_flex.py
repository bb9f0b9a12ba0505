"""Attention by torch's FlexAttention: one block-sparse Triton kernel a layer, compiled at its first use, for CUDA.

Each query may see two ranges of keys, one of its own sequence and one of its prompt; the mask is those four numbers a
query. Windows are in the ranges, so that every layer of a model shares one compiled kernel.

Shapes: H query heads, h key/value heads, T packed tokens, B blocks of tokens, E head size, F head size of the values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from prefopt.model.attention_request import Request
from prefopt.model.layout import GroupSpan, Layout
from prefopt.model.transfer import to_device

BLOCK = 128  # tokens; what torch's kernels are tuned for
_SMALLEST_HEAD = 16  # Triton multiplies no narrower matrices


def unsupported(request: Request) -> str | None:
    """Why FlexAttention cannot serve `request`, or None. On the CPU it is for tests: it writes out all scores."""
    kind = request.device.type
    if kind == "cpu":
        return "FlexAttention has no backward pass on the CPU" if request.gradient else None
    if kind != "cuda":
        return f"FlexAttention was not tried on {kind}"
    if torch.version.hip is not None:
        return "FlexAttention was not tried on ROCm"
    if not _has_triton():
        return "FlexAttention needs the package triton, which is not installed"
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention computes in fp16, bf16 and fp32, not in {str(request.dtype).removeprefix('torch.')}"
    narrow = [size for size in (request.head_size, request.value_size) if size is not None and size < _SMALLEST_HEAD]
    return f"FlexAttention needs a head size of at least {_SMALLEST_HEAD}, not {narrow[0]}" if narrow else None


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

    `scaling` of the scores is 1 / sqrt(E) where None; `window` is in positions, the own one counted. A sink is one more
    score without a value: it scales the result by exp(lse) / (exp(lse) + exp(sink)), lse being that of the real scores.
    """
    on_cuda = query.device.type == "cuda"
    function: Any = _compiled() if on_cuda else flex_attention
    result = function(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=layout.once(("flex", window, query.device), lambda: block_mask(layout.spans, window, query.device)),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # The decoding kernel, which torch would take for fewer than 128 tokens, would be one more to compile and to trust.
        kernel_options={"BACKEND": "TRITON"} if on_cuda else None,
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )
    if s_aux is None:
        output: Tensor = result
    else:
        output, aux = result
        share = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype).reshape(1, -1, 1))
        output = (output * share[..., None]).to(value.dtype)
    return output.transpose(1, 2)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled for the first lengths, then for any; a block mask with windows is no new one.

    Torch's limit of 8 variants is near: there are some with and without gradients, for a single block of tokens, and for
    a first layer whose keys need no gradient, each per dtype and head size. Beyond it torch would write out all scores.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, 32)
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Kept, so that the compiled kernel meets the same function again."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def block_mask(spans: Sequence[GroupSpan], window: int | None, device: torch.device) -> BlockMask:
    """The mask of `spans`, which fill the packed axis in order, for keys at most `window` positions back.

    Which blocks are empty, full or mixed is counted on `device` from the ranges, in T x B numbers instead of T x T.
    """
    ranges = to_device(_ranges(spans, window), device)
    tokens = ranges.shape[1]
    allowed = _pairs_per_block(ranges)
    full = allowed == BLOCK * BLOCK
    mixed = (allowed > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(mixed), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=_mask(*ranges.unbind()), seq_lengths=(tokens, tokens)
    )


def _ranges(spans: Sequence[GroupSpan], window: int | None) -> np.ndarray[Any, np.dtype[np.int32]]:
    """For each query its first key in its own sequence, and the range of keys in its prompt, shape (3, T).

    The prompt and the first response are one sequence; there, as everywhere, the last key is the query itself.
    """
    columns: list[np.ndarray[Any, Any]] = []
    for span in spans:
        end = span.start + span.prompt
        first = span.start
        for number, length in enumerate(span.responses or (0,)):
            last = first + length + (0 if number else span.prompt)
            queries = np.arange(first, last)
            distance = len(queries) + span.prompt if window is None else window
            own = np.maximum(first, queries - distance + 1)
            position = span.prompt + queries - first
            shared = span.start + np.maximum(0, position - distance + 1) if number else np.full(len(queries), end)
            columns.append(np.stack([own, np.minimum(shared, end), np.full(len(queries), end)]))
            first = last
    return np.concatenate(columns, axis=1).astype(np.int32)


def _mask(own_T: Tensor, shared_T: Tensor, end_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= own_T[query]) & (key <= query)
        in_prompt = (key >= shared_T[query]) & (key < end_T[query])
        return in_own | in_prompt

    return mask


def _pairs_per_block(ranges: Tensor) -> Tensor:
    """How many (query, key) pairs the ranges allow in each block, shape (B, B)."""
    tokens = ranges.shape[1]
    blocks = -(-tokens // BLOCK)
    own, shared, end = ranges[:, :, None]
    after = torch.arange(1, tokens + 1, dtype=torch.int32, device=ranges.device)[:, None]
    start = BLOCK * torch.arange(blocks, dtype=torch.int32, device=ranges.device)
    pairs_TB = _overlap(own, after, start) + _overlap(shared, end, start)
    padded = torch.nn.functional.pad(pairs_TB, (0, 0, 0, blocks * BLOCK - tokens))
    return padded.view(blocks, BLOCK, blocks).sum(1)


def _overlap(first: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """Tokens that `[first, end)` has in the block that begins at `start`."""
    return (torch.minimum(end, start + BLOCK) - torch.maximum(first, start)).clamp(min=0)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row chooses and which ones come first, shapes (1, 1, B) and (1, 1, B, B), int32."""
    flags = chosen.to(torch.int8)
    count = flags.sum(-1, dtype=torch.int32)
    order = torch.argsort(flags, dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order.contiguous()[None, None]
