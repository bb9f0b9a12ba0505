"""Which groups make a step, and how a step falls into micro-batches. Pure functions of a seed and of lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def total_steps(groups: int, *, epochs: float, groups_per_step: int, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` where given, else enough for `epochs` passes (the last may be smaller)."""
    return max_steps if max_steps is not None else max(1, math.ceil(round(groups * epochs) / groups_per_step))


def groups_of_step(step: int, *, groups: int, groups_per_step: int, total_groups: int, seed: int) -> list[int]:
    """Indices of the groups of optimizer step `step` (from 0), drawn without replacement within each epoch.

    A function of its arguments alone, so that a resumed run sees the same groups as an unbroken one. `total_groups`
    bounds the last step of a run that is measured in epochs.
    """
    first = step * groups_per_step
    wanted = range(first, min(first + groups_per_step, total_groups))
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(groups) for epoch in {place // groups for place in wanted}
    }
    return [int(orders[place // groups][place % groups]) for place in wanted]


def micro_batches(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `budget_tokens`, by first fit, longest first.

    Every place is in exactly one bin. A single group over the budget has a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[place]
        for number, free in enumerate(room):
            if length <= free:
                bins[number].append(place)
                room[number] -= length
                break
        else:
            bins.append([place])
            room.append(budget_tokens - length)
    return [sorted(members) for members in bins]


def draw_held_out(rows: int, *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(train, held-out) row numbers, each ascending, drawn with `seed`."""
    order = np.random.default_rng((seed, 2**31)).permutation(rows)
    return sorted(int(row) for row in order[held_out:]), sorted(int(row) for row in order[:held_out])
