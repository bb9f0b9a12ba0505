"""Who may attend to whom on a packed token axis: the one description that every attention backend reads.

Each response attends, causally by position, to its prompt and to itself; a prompt to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefopt.model.transfer import to_device

Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]
Made = TypeVar("Made")

# What another call of a kernel costs, as a number of query-key pairs: measured on a CPU, estimated for a GPU
# (benchmarks/RESULTS.md).
_CALL_COST = {"cpu": 2**12}
_CALL_COST_ELSEWHERE = 2**18


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where a group lies on the token axis: first token, prompt length, length of each response."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)

    def is_square(self, device: torch.device) -> bool:
        """Whether one masked square over the whole group is cheaper than a call for each response.

        The first response goes with the prompt, plainly causal, which a kernel computes by halves; the others see all of the
        prompt, and their own square is masked.
        """
        first, *others = self.responses
        apart = (self.prompt + first) ** 2 / 2 + sum(length * (self.prompt + length) for length in others)
        return self.tokens**2 <= apart + _CALL_COST.get(device.type, _CALL_COST_ELSEWHERE) * len(others)


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries `[query_start, query_end)` against keys made of token ranges, in order.

    `mask` is (queries, keys), True where attention is allowed, or None where it is plainly causal from a common start.
    """

    query_start: int
    query_end: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None


@dataclass(frozen=True)
class Layout:
    """The groups of one packed batch, and what each backend makes of them once per sliding window, for all layers."""

    spans: tuple[GroupSpan, ...]
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False)

    @property
    def tokens(self) -> int:
        """Length of the packed axis."""
        return self.spans[-1].start + self.spans[-1].tokens if self.spans else 0

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made at the first call with this key and kept as long as the layout."""
        if key not in self.made:
            self.made[key] = make()
        found: Made = self.made[key]
        return found

    def segments(self, window: int | None, device: torch.device) -> list[Segment]:
        """Segments that cover every query once, in token order. `window`: keys at most that many positions back."""
        return self.once(
            ("segments", window, device),
            lambda: [segment for span in self.spans for segment in _segments(span, window, device)],
        )


def _segments(span: GroupSpan, window: int | None, device: torch.device) -> Iterator[Segment]:
    end = span.start + span.prompt
    if span.is_square(device):
        last = span.start + span.tokens
        yield Segment(span.start, last, ((span.start, last),), _square_mask(span, window, device))
        return
    first = end + span.responses[0]
    yield Segment(span.start, first, ((span.start, first),), _causal_mask(0, first - span.start, window, device))
    for length in span.responses[1:]:
        mask = _causal_mask(span.prompt, span.prompt + length, window, device, always=True)
        yield Segment(first, first + length, ((span.start, end), (first, first + length)), mask)
        first += length


def _square_mask(span: GroupSpan, window: int | None, device: torch.device) -> Tensor | None:
    if len(span.responses) == 1:
        return _causal_mask(0, span.tokens, window, device)
    owner = np.repeat(np.arange(1 + len(span.responses)), [span.prompt, *span.responses])
    position = np.concatenate([np.arange(span.prompt), *(span.prompt + np.arange(length) for length in span.responses)])
    allowed = (owner[None, :] == owner[:, None]) | (owner[None, :] == 0)
    return to_device(allowed & _in_reach(position, position, window), device)


def _causal_mask(first: int, last: int, window: int | None, device: torch.device, *, always: bool = False) -> Tensor | None:
    """Mask of queries at positions [first, last) against keys at positions [0, last); None where plainly causal."""
    if not always and (window is None or window >= last):
        return None
    keys = np.arange(last)
    return to_device(_in_reach(keys[first:], keys, window), device)


def _in_reach(queries: Positions, keys: Positions, window: int | None) -> Mask:
    distance = queries[:, None] - keys[None, :]
    reach: Mask = distance >= 0
    return reach if window is None else reach & (distance < window)


# Module state, because backward may run on other threads.
_active: Layout | None = None
_backend: str | None = None


def active_layout() -> Layout | None:
    """The layout of the packed batch that is going through a model, or None outside of one."""
    return _active


def wanted_backend() -> str | None:
    """The backend that `attention.use_backend` asked for, or None."""
    return _backend


def use_layout(layout: Layout | None) -> AbstractContextManager[None]:
    """Make `layout` the active one within the block, and keep the backend that is wanted where this is called.

    So a layer that is computed again in backward takes the backend of its forward.
    """
    return in_force(layout, _backend)


@contextmanager
def in_force(layout: Layout | None, backend: str | None) -> Iterator[None]:
    """Both, within the block; a backend of None leaves the choice open."""
    global _active, _backend
    before = (_active, _backend)
    _active, _backend = layout, backend
    try:
        yield
    finally:
        _active, _backend = before
