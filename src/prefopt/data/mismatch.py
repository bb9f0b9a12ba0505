"""Responses under the prompts of other groups: what the KL term of KTO is estimated from (arXiv 2402.01306)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prefopt.core.errors import DataError
from prefopt.data.groups import Feedback
from prefopt.data.tokens import Counts, Ids, Lengths, TokenGroup, TokenRows, prompt_digests

_STREAM = 2**31 + 1  # apart from the epochs' orders and the held-out draw of the same seed


def mismatched(groups: Sequence[TokenGroup], *, seed: int) -> list[TokenGroup]:
    """The responses of each group, in the order of `groups`, under the prompt of another group with another prompt.

    Which group gives its prompt to which is drawn with `seed`. Every group gives its prompt once; where one prompt is
    that of more than half of the groups, the others give theirs equally often, up to one. `source` names both rows.
    Takes O(n log n) for n groups. DataError where all prompts have the same token ids.
    """
    if not groups:
        return []
    givers = _givers(prompt_digests(groups), seed)
    return [_under(own, groups[giver]) for own, giver in zip(groups, givers.tolist(), strict=True)]


def with_mismatched(groups: Sequence[TokenGroup], *, seed: int) -> Sequence[TokenGroup]:
    """`groups`, each with its `mismatched` one."""
    if isinstance(groups, TokenRows):
        return MismatchedRows(groups, _givers(prompt_digests(groups), seed)) if len(groups) else groups
    return tuple(replace(own, mismatched=other) for own, other in zip(groups, mismatched(groups, seed=seed), strict=True))


def _under(own: TokenGroup, other: TokenGroup) -> TokenGroup:
    """What was known when `own` was drawn was known under its own prompt, so it does not go along."""
    source = f"{own.source} under the prompt of {other.source}"
    return replace(own, prompt_ids=other.prompt_ids, source=source, experience=None)


class MismatchedRows(TokenRows):
    """`rows`, each with its responses under the prompt of the row at `givers[place]` as its `mismatched` group."""

    def __init__(self, rows: TokenRows, givers: Counts) -> None:
        self.rows = rows
        self.givers = givers

    def __len__(self) -> int:
        return len(self.rows)

    def group(self, place: int) -> TokenGroup:
        own = self.rows.group(place)
        return replace(own, mismatched=_under(own, self.rows.group(int(self.givers[place]))))

    def prompt(self, place: int) -> Ids:
        return self.rows.prompt(place)

    def lengths(self) -> Lengths:
        return self.rows.lengths()

    @property
    def feedbacks(self) -> Sequence[Feedback]:
        return self.rows.feedbacks


class Counterparts(Sequence[TokenGroup]):
    """The `mismatched` groups of `groups`, of which each has one."""

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, place: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[TokenGroup]: ...
    def __getitem__(self, place: int | slice) -> TokenGroup | Sequence[TokenGroup]:
        if isinstance(place, slice):
            return Counterparts(self.groups[place])
        other = self.groups[place].mismatched
        assert other is not None
        return other


def _givers(prompts: Sequence[bytes], seed: int) -> NDArray[np.int64]:
    """For each place the place whose prompt it gets.

    Places lie in blocks of equal prompts, the largest block of m places first. Each gets the prompt m places further
    on, round the end: no block is longer than m, and none is reached from itself while 2 m <= n. With a larger m the
    places behind the first block are taken in turn by it, and take theirs from it.
    """
    count = len(prompts)
    shuffled = np.random.default_rng((seed, _STREAM)).permutation(count)
    sizes = Counter(prompts)
    (frequent, most), *others = sizes.most_common()
    if not others:
        raise DataError(
            f"all {count} rows have the same prompt, and a response under another prompt is needed to estimate the KL",
            todo="Use rows with different prompts, or loss.name=apo_zero_unpaired, which needs no KL.",
        )
    blocks: dict[bytes, list[int]] = {frequent: []}
    for place in shuffled.tolist():
        blocks.setdefault(prompts[place], []).append(place)
    lined_up = np.array([place for block in blocks.values() for place in block], dtype=np.int64)
    at = np.arange(count)
    rest = count - most
    giving = (at + most) % count if most <= rest else np.where(at < most, most + at % rest, at - most)
    givers = np.empty(count, dtype=np.int64)
    givers[lined_up] = lined_up[giving]
    return givers
