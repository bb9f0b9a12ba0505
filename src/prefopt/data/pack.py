"""Which groups make a step, and how a step falls into micro-batches. Pure functions of a seed and of lengths."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def total_steps(groups: int, *, epochs: float, groups_per_step: int, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` where given, else enough for `epochs` passes (the last may be smaller)."""
    return max_steps if max_steps is not None else max(1, math.ceil(round(groups * epochs) / groups_per_step))


def groups_of_step(
    step: int,
    *,
    groups: int,
    groups_per_step: int,
    total_groups: int,
    seed: int,
    strata: Sequence[int] | None = None,
    together: NDArray[np.int64] | None = None,
) -> list[int]:
    """Indices of the groups of optimizer step `step` (from 0), drawn without replacement within each epoch.

    A function of its arguments alone, so that a resumed run sees the same groups as an unbroken one. `total_groups`
    bounds the last step of a run that is measured in epochs. With `strata`, a number for each group, every epoch spreads
    the groups of each number evenly, so that each step holds them in nearly their proportion (`_spread` says how nearly).
    With `together`, numbers from 0 on, groups of the same number follow each other in every epoch.
    """
    first = step * groups_per_step
    wanted = range(first, min(first + groups_per_step, total_groups))
    orders = {epoch: _order(groups, seed, epoch, strata, together) for epoch in {place // groups for place in wanted}}
    return [int(orders[place // groups][place % groups]) for place in wanted]


def _order(
    groups: int, seed: int, epoch: int, strata: Sequence[int] | None, together: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    if strata is None and together is None:
        return _shuffled(groups, seed, epoch)
    random = np.random.default_rng((seed, epoch))
    if together is not None:
        return in_order_of(together, random)
    assert strata is not None
    return _spread(random.permutation(groups), strata, random)


def in_order_of(together: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Places of `together`, numbers from 0 on, so that equal numbers follow each other: numbers in random order, and the
    places of each. Without equal numbers it is a permutation as any other."""
    if len(np.unique(together)) == len(together):
        return random.permutation(len(together))
    place = random.permutation(int(together.max()) + 1)
    return np.lexsort((random.random(len(together)), place[together]))


@lru_cache(maxsize=2)  # the steps of an epoch ask for the same order, and one step may lie in two epochs
def _shuffled(groups: int, seed: int, epoch: int) -> NDArray[np.int64]:
    shuffled = np.random.default_rng((seed, epoch)).permutation(groups)
    shuffled.flags.writeable = False
    return shuffled


def _spread(shuffled: NDArray[np.int64], strata: Sequence[int], random: np.random.Generator) -> NDArray[np.int64]:
    """`shuffled` with the n_s members of each stratum s, in their order there, at the times (j + u_s) / n_s of [0, 1].

    u_s is drawn from [0, 1), j counts from 0. A law of this order: with K strata, any n places in a row hold n * p_s
    members of a stratum whose share is p_s, up to 1 + (K - 2) * p_s: at most 1 with two strata. The n places are an
    interval of time of some length d. Neighbours of a stratum are 1 / n_s apart, so its count there is n_s * d + e_s
    with |e_s| <= 1. All counts add up to n, so n = N * d + the sum of all e, and the count less n * p_s is
    (1 - p_s) * e_s - p_s * (the sum of the other e), which is at most (1 - p_s) + p_s * (K - 1).
    """
    numbers = np.asarray(strata)
    if numbers.shape != shuffled.shape:
        raise ValueError(f"{len(numbers)} strata for {len(shuffled)} groups")
    numbers = numbers[shuffled]
    times = np.empty(len(shuffled))
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        times[members] = (np.arange(len(members)) + random.random()) / len(members)
    return shuffled[np.argsort(times, kind="stable")]


def micro_batches(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `budget_tokens`, as few as first fit needs, and as even as they come.

    Every place is in exactly one bin. A single group over the budget has a bin of its own. A full bin beside a nearly empty one
    would need more memory than two half-full ones, and the small one would be computed more slowly.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = _first_fit(lengths, longest_first, budget_tokens)
    even = _evenly(lengths, longest_first, len(bins))
    if all(len(members) == 1 or sum(lengths[place] for place in members) <= budget_tokens for members in even):
        bins = even
    return [sorted(members) for members in bins if members]


def _first_fit(lengths: Sequence[int], order: Sequence[int], budget_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for place in order:
        length = lengths[place]
        for number, free in enumerate(room):
            if length <= free:
                bins[number].append(place)
                room[number] -= length
                break
        else:
            bins.append([place])
            room.append(budget_tokens - length)
    return bins


def _evenly(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """Each place of `order` into the bin of `count` that holds the fewest tokens so far."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for place in order:
        tokens, number = filled[0]
        bins[number].append(place)
        heapq.heapreplace(filled, (tokens + lengths[place], number))
    return bins


def draw_held_out(rows: int, *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(train, held-out) row numbers, each ascending, drawn with `seed`."""
    order = np.random.default_rng((seed, 2**31)).permutation(rows)
    return sorted(int(row) for row in order[held_out:]), sorted(int(row) for row in order[:held_out])
