"""Shared-prefix attention, registered with transformers under the name "prefopt": any decoder that uses its interface.

Inside `use_layout` it follows the packed layout, by the first of the device's backends that can serve the call. Outside it
is transformers' own SDPA, so that the same model can generate and can be compared with its plain forward.

Shapes: H query heads, h key/value heads, T tokens, E head size.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefopt.core.errors import ConfigError, ModelError, nearest
from prefopt.model import attention_direct, attention_flex, attention_segments, attention_varlen
from prefopt.model.attention_request import Request, request_of
from prefopt.model.attention_segments import explicit, plain_causal
from prefopt.model.layout import Layout, active_layout, in_force, wanted_backend

NAME = "prefopt"
VARIABLE = "PREFOPT_ATTENTION"  # environment variable that names the backend to use, for reports of faults
calls_in_layout = 0  # how often attention has followed a layout: a model that never asks is not trained packed
calls: Counter[str] = Counter()  # the same, by backend


class Backend(NamedTuple):
    """A way to compute attention along a layout.

    `attend(query, key, value, layout, *, scaling, window, softcap, s_aux)` returns (1, T, H, E). `unsupported(request)`
    says why it cannot serve, or returns None.
    """

    attend: Callable[..., Tensor]
    unsupported: Callable[[Request], str | None]


BACKENDS = {
    "varlen": Backend(attention_varlen.attend, attention_varlen.unsupported),
    "flex": Backend(attention_flex.attend, attention_flex.unsupported),
    "direct": Backend(attention_direct.attend, attention_direct.unsupported),
    "segments": Backend(attention_segments.attend, attention_segments.unsupported),
}
# Which ones a device tries by itself, in this order.
_ORDER = {"cuda": ("varlen", "flex", "segments"), "cpu": ("direct", "segments")}
_ORDER_ELSEWHERE = ("segments",)


def register() -> None:
    """Make `attn_implementation="prefopt"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return None if active_layout() is not None else sdpa_mask(*args, **kwargs)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Compute attention along a layout by this backend only, within the block; None leaves the choice open again.

    ConfigError for an unknown name. Where the backend cannot serve a call, that call is a ModelError.
    """
    if name is not None:
        _known(name, "use_backend")
    with in_force(active_layout(), name):
        yield


def backends_for(
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_size: int | None = None,
    value_size: int | None = None,
    softcap: bool = False,
    sinks: bool = False,
) -> list[str]:
    """Names of the backends that `device` can train with by itself, the preferred one first; "segments" is always last.

    Sizes that are None are not checked here, but at each call.
    """
    request = Request(device, dtype, head_size, value_size, softcap=softcap, sinks=sinks, gradient=True)
    return [name for name in _ORDER.get(device.type, _ORDER_ELSEWHERE) if BACKENDS[name].unsupported(request) is None]


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
    layout = active_layout()
    if layout is not None:
        return _follow(layout, query, key, value, scaling, sliding_window, softcap, s_aux), None
    if softcap is not None or s_aux is not None:
        mask = attention_mask if attention_mask is not None else plain_causal(query, key)
        return explicit(query, key, value, mask, scaling, softcap, s_aux).transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


def _follow(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    global calls_in_layout
    name = _chosen(request_of(query, key, value, softcap, s_aux))
    calls_in_layout += 1
    calls[name] += 1
    return BACKENDS[name].attend(query, key, value, layout, scaling=scaling, window=window, softcap=softcap, s_aux=s_aux)


def _chosen(request: Request) -> str:
    """The backend that was asked for, else the first of the device's that can serve."""
    name, asked_by = wanted_backend(), "use_backend"
    if name is None and os.environ.get(VARIABLE):
        name, asked_by = os.environ[VARIABLE], VARIABLE
    if name is None:
        order = _ORDER.get(request.device.type, _ORDER_ELSEWHERE)
        return next(name for name in order if BACKENDS[name].unsupported(request) is None)
    reason = BACKENDS[_known(name, asked_by)].unsupported(request)
    if reason is not None:
        raise ModelError(
            f'{asked_by}: the attention backend "{name}" cannot serve this model here: {reason}',
            todo=f"Leave {VARIABLE} unset, and the first backend that can is taken.",
        )
    return name


def _known(name: str, asked_by: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(
            f'{asked_by}: "{name}" is not an attention backend',
            todo=f"{nearest(name, BACKENDS)}all of them: {', '.join(BACKENDS)}",
        )
    return name
