"""Groups with the same prompt as one: the prompt, and each response that several of them have, is computed once.

Rows of sampled data repeat themselves: K responses to a prompt make K (K - 1) / 2 pairs, in which each response comes K - 1
times. Shapes: S responses and N scored tokens of the groups as they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt.data.groups import Feedback
from prefopt.data.pack import micro_batches
from prefopt.data.tokens import Flags, Ids, TokenGroup, prompt_digests

Places = NDArray[np.int64]
_UNJUDGED = Feedback("demonstration")


@dataclass(frozen=True, slots=True)
class Merged:
    """`groups` are to be computed. `response_S`: which of their responses each response that was asked for is; None where
    nothing came twice, so that `groups` are what was asked for."""

    groups: tuple[TokenGroup, ...]
    response_S: Places | None

    @property
    def token_N(self) -> Places | None:
        """Which scored token of `groups` each scored token that was asked for is; None as `response_S`."""
        if self.response_S is None:
            return None
        counts = np.array([int(flags.sum()) for group in self.groups for flags in group.scored])
        ends = np.cumsum(counts)
        return np.concatenate([np.arange(ends[at] - counts[at], ends[at]) for at in self.response_S])


def merged(groups: Sequence[TokenGroup]) -> Merged:
    """`groups` with each prompt once, in the order in which they first come; what they say of their responses is left out."""
    members: dict[bytes, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group.prompt_ids.tobytes(), []).append(place)
    if len(members) == len(groups):
        return Merged(tuple(groups), None)
    whole: list[TokenGroup] = []
    number_of: dict[tuple[int, int], int] = {}  # group, response -> number among the merged responses
    before = 0
    for places in members.values():
        found: dict[bytes, int] = {}
        ids: list[Ids] = []
        scored: list[Flags] = []
        for place in places:
            for at, (tokens, flags) in enumerate(zip(groups[place].response_ids, groups[place].scored, strict=True)):
                key = tokens.tobytes() + flags.tobytes()  # as many flags as tokens: no two pairs have the same bytes
                if key not in found:
                    found[key] = before + len(ids)
                    ids.append(tokens)
                    scored.append(flags)
                number_of[place, at] = found[key]
        whole.append(TokenGroup(groups[places[0]].prompt_ids, tuple(ids), tuple(scored), _UNJUDGED))
        before += len(ids)
    order = [number_of[place, at] for place, group in enumerate(groups) for at in range(len(group.response_ids))]
    return Merged(tuple(whole), np.array(order))


def merged_batches(groups: Sequence[TokenGroup], cost: Callable[[TokenGroup], int], *, budget_tokens: int) -> list[list[int]]:
    """`prefopt.data.pack.micro_batches` of groups that cost `cost` tokens, those with the same prompt together as far as they
    fit, for they are computed as one. Without such groups it is the same."""
    members: dict[bytes, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group.prompt_ids.tobytes(), []).append(place)
    parts = [part for places in members.values() for part in _within(groups, places, cost, budget_tokens)]
    bins = micro_batches([tokens for _, tokens in parts], budget_tokens=budget_tokens)
    return [sorted(place for number in chosen for place in parts[number][0]) for chosen in bins]


def _within(
    groups: Sequence[TokenGroup], places: Sequence[int], cost: Callable[[TokenGroup], int], budget_tokens: int
) -> list[tuple[list[int], int]]:
    """`places`, whose groups have one prompt, in parts of at most `budget_tokens` when merged, or of one group."""
    parts: list[tuple[list[int], int]] = []
    for place in places:
        if parts:
            together = [*parts[-1][0], place]
            tokens = cost(merged([groups[one] for one in together]).groups[0])
            if tokens <= budget_tokens:
                parts[-1] = together, tokens
                continue
        parts.append(([place], cost(groups[place])))
    return parts


def prompt_numbers(groups: Sequence[TokenGroup]) -> Places:
    """A number from 0 on for each group, the same for groups with the same prompt. No group is made for it."""
    return np.unique(np.array(prompt_digests(groups), dtype="S16"), return_inverse=True)[1]
