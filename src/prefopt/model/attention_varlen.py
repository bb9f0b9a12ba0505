"""Attention by one variable-length flash kernel a layer, for CUDA.

Queries stay in packed order, cut into [prompt + first response] and each further response. The keys of a further response
are gathered behind a copy of its prompt, so that query and key lengths differ and the kernels' causal mask, which is
aligned at the last query and the last key, is the one that is wanted. Distances are right for sliding windows as well,
because positions of a response directly follow its prompt.

Shapes: H query heads, h key/value heads, T packed tokens, U gathered keys (U >= T), E head size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.model.attention_request import Request
from prefopt.model.layout import GroupSpan, Layout
from prefopt.model.transfer import to_device

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gather:
    """Where gathered keys come from, and how their gradients go back.

    `source_U`: packed place of each gathered key. `own_T`: where each token's own key, not a copy of it, was gathered to.
    `copies`: per further response of the groups, (packed places, gathered places) of the copied prompts. No packed place
    is twice in one entry, so adding entry by entry gives the same bits every time.
    """

    source_U: Tensor
    own_T: Tensor
    copies: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of the kernel that depend on the layout alone.

    `queries`, `keys`: cumulative lengths of the sequences, int32, from 0 to T and to U. `longest_query`, `longest_key`:
    tokens. `gather` is None where no group has a second response: the keys are then the packed ones.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    gather: Gather | None


def unsupported(request: Request) -> str | None:
    """Why no variable-length kernel can serve `request`, or None."""
    if request.device.type != "cuda":
        return f"variable-length flash kernels run on CUDA, not on {request.device.type}"
    if torch.version.hip is not None:
        return "variable-length flash kernels were not tried on ROCm"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels compute in fp16 and bf16, not in {str(request.dtype).removeprefix('torch.')}"
    if request.sinks:
        return "attention sinks need the gradient of the log-sum-exp, which flash kernels do not give"
    return _unsupported_size(request) or _unsupported_build(request)


def _unsupported_size(request: Request) -> str | None:
    head, value = request.head_size, request.value_size
    if head is not None and value is not None and head != value:
        return f"flash kernels need values of the keys' head size; here {value} and {head}"
    if head is not None and (head % 8 or head > 256 or 192 < head <= 224):
        return f"flash kernels take head sizes in steps of 8 up to 192 and from 232 to 256, not {head}"
    return None


def _unsupported_build(request: Request) -> str | None:
    capability = _capability(request.device)
    if capability < (8, 0):
        return f"flash kernels need compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    if request.softcap:
        return None if _soft_capped() is not None else "soft-capped scores need the package flash-attn (2.6 or newer)"
    if _windowed() is None:
        return "neither this torch nor a package flash-attn has a variable-length kernel with windows"
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

    `scaling` of the scores is 1 / sqrt(E) where None; `window` is in positions, the own one counted. What `unsupported`
    refuses is an error here.
    """
    kernel = _soft_capped() if softcap is not None else _windowed()
    assert kernel is not None and s_aux is None, "asked in spite of unsupported()"
    # Tokens outside of every sequence would get NaN as their gradient (pytorch issue 176793).
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == layout.tokens, "the layout is of another batch"
    plan = layout.once(("varlen", window, query.device), lambda: plan_of(layout.spans, window, query.device))
    keys, values = _rows(key), _rows(value)
    if plan.gather is not None:
        keys, values = _gathered(keys, plan.gather), _gathered(values, plan.gather)
    return kernel(_rows(query), keys, values, plan, scaling, window, softcap)[None]


def _rows(tensor: Tensor) -> Tensor:
    """(1, heads, T, E) as (T, heads, E), whose last dimension the kernels want contiguous."""
    rows = tensor[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _gathered(tokens: Tensor, gather: Gather) -> Tensor:
    rows: Tensor = _Gathered.apply(tokens, gather)  # type: ignore[no-untyped-call]
    return rows


class _Gathered(torch.autograd.Function):
    """Rows (T, h, E) -> (U, h, E). Backward sums the copies of a prompt in a fixed order, three or more of them in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return tokens.index_select(0, gather.source_U)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gather: Gather = ctx.gather
        total = gradient.index_select(0, gather.own_T)
        if len(gather.copies) > 1:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        for packed, gathered in gather.copies:
            total.index_add_(0, packed, gradient.index_select(0, gathered).to(total.dtype))
        return total.to(gradient.dtype), None


def plan_of(spans: Sequence[GroupSpan], window: int | None, device: torch.device) -> Plan:
    """The plan of `spans`, which fill the packed axis in order, for keys at most `window` positions back.

    With a window, only the keys of a prompt that some token of the response reaches are copied.
    """
    query_lengths: list[int] = []
    sources: list[Places] = []
    own: list[Places] = []
    copies: dict[int, list[tuple[Places, Places]]] = {}
    gathered = 0
    for span in spans:
        end = span.start + span.prompt
        reach = span.prompt if window is None else min(span.prompt, window - 1)
        first = span.start
        for number, length in enumerate(span.responses or (0,)):
            copied = np.arange(end - reach, end) if number else np.arange(0)
            last = first + length + (0 if number else span.prompt)
            if last == first:
                continue
            if len(copied):
                copies.setdefault(number, []).append((copied, gathered + np.arange(len(copied))))
            own.append(gathered + len(copied) + np.arange(last - first))
            sources += [copied, np.arange(first, last)]
            query_lengths.append(last - first)
            gathered += len(copied) + last - first
            first = last
    key_lengths = [len(before) + len(after) for before, after in zip(sources[0::2], sources[1::2], strict=True)]
    queries = _cumulative(query_lengths, device)
    if not copies:
        return Plan(queries, queries, max(query_lengths), max(query_lengths), None)
    pairs = [tuple(to_device(np.concatenate(side), device) for side in zip(*copies[k], strict=True)) for k in sorted(copies)]
    gather = Gather(
        source_U=to_device(np.concatenate(sources), device),
        own_T=to_device(np.concatenate(own), device),
        copies=tuple((packed, places) for packed, places in pairs),
    )
    return Plan(queries, _cumulative(key_lengths, device), max(query_lengths), max(key_lengths), gather)


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(np.cumsum([0, *lengths]).astype(np.int32), device)


class _Kernel(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def _window_size(window: int | None) -> tuple[int, int]:
    """How flash kernels write it: keys to the left and to the right of the own position, -1 without a limit."""
    return (-1 if window is None else window - 1, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _windowed() -> _Kernel | None:
    """The kernel for plain scores: torch's own, else that of the package flash-attn."""
    function = _torch_function()
    return _torch_kernel(function) if function is not None else _soft_capped()


def _soft_capped() -> _Kernel | None:
    """The kernel that can cap scores as well: that of the package flash-attn, if it is installed."""
    function = _package_function()
    return _package_kernel(function) if function is not None else None


@cache
def _torch_kernel(function: Callable[..., Any]) -> _Kernel:
    # torch 2.11 has grouped heads without an option for them: its kernel reads both numbers of heads from the tensors.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        result: Tensor = function(
            query,
            key,
            value,
            plan.queries,
            plan.keys,
            plan.longest_query,
            plan.longest_key,
            scale=scaling,
            window_size=_window_size(window),
            **(grouped if query.shape[1] != key.shape[1] else {}),
        )
        return result

    return kernel


@cache
def _package_kernel(function: Callable[..., Any]) -> _Kernel:
    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        result: Tensor = function(
            query,
            key,
            value,
            cu_seqlens_q=plan.queries,
            cu_seqlens_k=plan.keys,
            max_seqlen_q=plan.longest_query,
            max_seqlen_k=plan.longest_key,
            softmax_scale=scaling,
            causal=True,
            window_size=_window_size(window),
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return result

    return kernel


def _torch_function() -> Callable[..., Any] | None:
    if not torch.backends.cuda.is_flash_attention_available():  # a torch that was built without it
        return None
    return _function_with("torch.nn.attention.varlen", "varlen_attn", "window_size")


def _package_function() -> Callable[..., Any] | None:
    return _function_with("flash_attn", "flash_attn_varlen_func", "softcap")


@cache
def _function_with(module: str, name: str, parameter: str) -> Callable[..., Any] | None:
    """The function, or None where it is not installed, does not load, or has no such parameter."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError):
        return None
    return function if parameter in inspect.signature(function).parameters else None
