"""Activations in the CPU's memory between forward and backward, copied beside the GPU's work."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from prefopt.core.errors import ConfigError

_SMALLEST_BYTES = 1 << 20  # a smaller tensor costs more to move than to keep
_LEAVING = 2  # tensors on their way to the CPU that are still held on the device
_AHEAD = 3  # tensors on their way back before backward asks for them


class _Moved:
    """A tensor away from its device; `line`: all that left in the same forward, in order, and `place` its number there."""

    __slots__ = ("__weakref__", "away", "back", "line", "place", "ready")

    def __init__(self, away: Tensor, line: list[weakref.ref[_Moved]]) -> None:
        self.away = away
        self.back: Tensor | None = None
        self.ready: Any = None
        self.line = line
        self.place = len(line)
        line.append(weakref.ref(self))


class ActivationOffload:
    """Moves what autograd saves for backward out of the device's memory, and back before it is needed.

    On CUDA the copies run on a stream of their own, from and into pinned memory: out while later layers compute, back a few
    tensors ahead of backward. A tensor that several operations save moves once. Weights and small tensors stay. Values are
    copied bit by bit, so gradients are unchanged. On another device, and without `beside` (where there is nothing to copy),
    the copies are plain ones.
    """

    def __init__(
        self, device: torch.device, weights: Sequence[Tensor], *, smallest_bytes: int = _SMALLEST_BYTES, beside: bool = True
    ) -> None:
        self.device = device
        self.weights = weights
        self.smallest_bytes = smallest_bytes
        self.moved_bytes = 0  # since it was made
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and beside else None
        self._line: list[weakref.ref[_Moved]] = []
        self._fixed: set[int] = set()
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._seen: weakref.WeakKeyDictionary[Any, dict[Any, weakref.ref[_Moved]]] = weakref.WeakKeyDictionary()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a forward pass: what it saves for backward leaves the device."""
        if not torch.is_grad_enabled():
            yield
            return
        self._line = []
        self._fixed = {weight.untyped_storage().data_ptr() for weight in self.weights}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._wait_for_leaving(0)

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.itemsize
        stays = size < self.smallest_bytes or size > storage.nbytes() or storage.data_ptr() in self._fixed
        if stays or tensor.device.type != self.device.type:
            return tensor
        views = self._seen.setdefault(storage, {})
        key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = views[key]() if key in views else None
        if known is None:
            known = _Moved(self._to_cpu(tensor), self._line)
            views[key] = weakref.ref(known)
            self.moved_bytes += size
        return known

    def _to_cpu(self, tensor: Tensor) -> Tensor:
        away = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            return away.copy_(tensor)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            away.copy_(tensor, non_blocking=True)
            self._leaving.append((self.stream.record_event(), tensor))
        self._wait_for_leaving(_LEAVING)
        return away

    def _wait_for_leaving(self, most: int) -> None:
        """Let go of tensors that have left. The compute stream waits, not the program: what it allocates there comes after."""
        while len(self._leaving) > most:
            left, tensor = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(left)

    def _unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed)
        for place in range(packed.place - 1, max(-1, packed.place - 1 - _AHEAD), -1):
            before = packed.line[place]()
            if before is not None and self.stream is not None:
                self._fetch(before)
        if packed.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(packed.ready)
        assert packed.back is not None
        return packed.back

    def _fetch(self, moved: _Moved) -> None:
        """Begin the way back of `moved`, unless it has begun."""
        if moved.back is not None:
            return
        moved.back = torch.empty_like(moved.away, device=self.device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            moved.back.copy_(moved.away, non_blocking=self.stream is not None)
            if self.stream is not None:
                moved.back.record_stream(self.stream)
                moved.ready = self.stream.record_event()


def check_offload(device: torch.device) -> None:
    """ConfigError where there is no memory besides the device's own to move activations to."""
    if device.type != "cuda":
        raise ConfigError(
            f"train.offload_activations moves activations from a CUDA device to the CPU's memory, and this run is on {device.type}",
            todo="Remove it; train.activation_checkpointing=full lowers memory here.",
        )
