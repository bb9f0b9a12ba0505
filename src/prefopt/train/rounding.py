"""Rounding to bf16 that is right on average: an update below the resolution of bf16 is made with the probability of its share.

bf16 is fp32 without its low 16 bits. Adding 16 random bits to an fp32 number and cutting the low 16 off moves it away from
zero with probability (low bits / 65536), so that the expected result is the fp32 number itself, exactly; a number that
bf16 can hold stays what it is. Rounding to nearest instead loses every update below 1/512 of a weight, always.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefopt.core.files import digest

PIECE = 1 << 20  # numbers that are held in fp32 at once on a CPU, whose caches hold them: half the time of 4 million


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` as bf16 numbers (still of dtype fp32), in place: rounded away from zero where low bits + 32768 + `bits`
    carry. `bits`: int16 of the same shape, uniform over all 65536 values for an unbiased result."""
    raw = values.view(torch.int32)
    raw.add_(bits).add_(1 << 15).bitwise_and_(-(1 << 16))
    return values


class Noise:
    """Random bits as a function of a seed and of what they are for, and of nothing that was drawn before.

    A run that is resumed at a step, or makes it again in smaller pieces, then needs no state but the seed and the step.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.generator = torch.Generator(device)

    def begin(self, *purpose: object) -> None:
        """Make the draws from here on a function of the seed and `purpose`."""
        key = digest("rounding", str(self.seed), *map(str, purpose))
        self.generator.manual_seed(int(key[:12], 16))

    def bits(self, like: Tensor) -> Tensor:
        """int16 of the shape of `like`, uniform over all 65536 values; four of them from each number that is drawn."""
        words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
        words.random_(-(2**63), None, generator=self.generator)
        return words.view(torch.int16)[: like.numel()].view(like.shape)

    def store(self, values: Tensor, into: Tensor) -> None:
        """Round fp32 `values`, which are used up, into the bf16 tensor `into`, of the same shape."""
        into.copy_(rounded(values, self.bits(values)))


def piece_numbers(device: torch.device) -> int:
    """Numbers of a weight that are updated at once. A GPU has more memory, and each kernel that it starts costs time."""
    return PIECE if device.type == "cpu" else 8 * PIECE


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of equally shaped tensors, about `piece_numbers` at a time, cut along the first dimension."""
    first = tensors[0]
    if first.ndim == 0:
        yield tuple(tensor[None] for tensor in tensors)
        return
    rows = max(1, piece_numbers(first.device) * len(first) // max(1, first.numel()))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
