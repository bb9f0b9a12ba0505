"""Groups as token ids, and sequences of them that are made only when they are asked for.

A million groups are too many to lie in memory as arrays of their own. What is asked of all of them at once, how long they
are and what is known about them, is answered by `lengths_of` and `feedbacks_of` without making one.

Legend: G groups, S responses of all groups, one group after the other.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prefopt.data.groups import BadRow, Feedback

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]
Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Experience:
    """What was known of the tokens of sampled responses when they were drawn: for each response a float32 array with one
    number a scored token. `old_values` and `returns` are () without a value head; advantages too where none are used.
    """

    old_logps: tuple[Numbers, ...]
    reference_logps: tuple[Numbers, ...]
    advantages: tuple[Numbers, ...] = ()
    old_values: tuple[Numbers, ...] = ()
    returns: tuple[Numbers, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A group as token ids: one prompt, K responses, and which response tokens carry loss (`scored`).

    `finished[k]` says whether response k ends with the end-of-turn token (what was cut at a token limit does not).
    `experience` belongs to samples of the policy.
    """

    prompt_ids: Ids
    response_ids: tuple[Ids, ...]
    scored: tuple[Flags, ...]
    feedback: Feedback
    source: str = ""
    finished: tuple[bool, ...] = ()
    mismatched: TokenGroup | None = None
    experience: Experience | None = None

    @property
    def unique_tokens(self) -> int:
        """Tokens computed when the prompt is shared: prompt once, plus every response."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


@dataclass(frozen=True)
class TokenSet:
    """Token groups of one source, what was refused on the way, and which rows needed special care."""

    groups: Sequence[TokenGroup]
    bad: tuple[BadRow, ...] = ()
    special_text: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Tokens of every prompt (`prompt_G`) and response (`response_S`), and responses of every group (`responses_G`)."""

    prompt_G: Counts
    response_S: Counts
    responses_G: Counts

    @cached_property
    def group_S(self) -> Counts:
        """The group of each response."""
        return np.repeat(np.arange(len(self.responses_G)), self.responses_G)

    @property
    def unique_G(self) -> Counts:
        """Tokens of each group when its prompt is counted once."""
        total = self.prompt_G.copy()
        np.add.at(total, self.group_S, self.response_S)
        return total

    @property
    def longest_G(self) -> Counts:
        """Tokens of the longest response of each group."""
        longest = np.zeros(len(self.prompt_G), dtype=np.int64)
        np.maximum.at(longest, self.group_S, self.response_S)
        return longest

    def of(self, places: Counts) -> Lengths:
        """Lengths of the groups at `places`, in that order."""
        counts = self.responses_G[places]
        first = (np.cumsum(self.responses_G) - self.responses_G)[places]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Lengths(self.prompt_G[places], self.response_S[np.repeat(first, counts) + within], counts)


class TokenRows(Sequence[TokenGroup]):
    """Token groups that are not all in memory: each is made when it is asked for, and not kept."""

    @abstractmethod
    def group(self, place: int) -> TokenGroup:
        """The group at `place`, from 0."""

    @abstractmethod
    def prompt(self, place: int) -> Ids:
        """The prompt of the group at `place` alone."""

    @abstractmethod
    def lengths(self) -> Lengths:
        """Lengths of all groups."""

    def unfinished(self) -> int:
        """Responses that were cut."""
        return sum(not done for group in self for done in group.finished)

    @property
    @abstractmethod
    def feedbacks(self) -> Sequence[Feedback]:
        """What is known about each group."""

    @overload
    def __getitem__(self, place: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[TokenGroup]: ...
    def __getitem__(self, place: int | slice) -> TokenGroup | Sequence[TokenGroup]:
        if isinstance(place, slice):
            return pick(self, range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(f"group {place} of {len(self)}")
        return self.group(place % len(self))

    def __iter__(self) -> Iterator[TokenGroup]:
        return (self.group(place) for place in range(len(self)))


class PickedRows(TokenRows):
    """Some groups of `rows`, in the order of `places`."""

    def __init__(self, rows: TokenRows, places: Iterable[int] | Counts) -> None:
        self.rows = rows
        self.places = np.fromiter(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def group(self, place: int) -> TokenGroup:
        return self.rows.group(int(self.places[place]))

    def prompt(self, place: int) -> Ids:
        return self.rows.prompt(int(self.places[place]))

    def lengths(self) -> Lengths:
        return self.rows.lengths().of(self.places)

    @cached_property
    def feedbacks(self) -> Sequence[Feedback]:
        return [self.rows.feedbacks[place] for place in self.places.tolist()]


class JoinedRows(Sequence[TokenGroup]):
    """Several sequences of groups, one after the other, none of them copied."""

    def __init__(self, parts: Iterable[Sequence[TokenGroup]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, place: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[TokenGroup]: ...
    def __getitem__(self, place: int | slice) -> TokenGroup | Sequence[TokenGroup]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"group {place} of {len(self)}")
        place %= len(self)
        part = bisect_right(self.ends, place)
        return self.parts[part][place - self.ends[part]]

    def __iter__(self) -> Iterator[TokenGroup]:
        return (group for part in self.parts for group in part)


def pick(groups: Sequence[TokenGroup], places: Iterable[int] | Counts) -> Sequence[TokenGroup]:
    """The groups at `places`: a tuple of those in memory, a view of those that are not."""
    if isinstance(groups, PickedRows):
        return PickedRows(groups.rows, groups.places[np.fromiter(places, dtype=np.int64)])
    if isinstance(groups, TokenRows):
        return PickedRows(groups, places)
    return tuple(groups[place] for place in places)


def lengths_of(groups: Sequence[TokenGroup]) -> Lengths:
    """Lengths of all `groups`, in tokens, without making those that are not in memory."""
    if isinstance(groups, TokenRows):
        return groups.lengths()
    return Lengths(
        np.array([len(group.prompt_ids) for group in groups], dtype=np.int64),
        np.array([len(ids) for group in groups for ids in group.response_ids], dtype=np.int64),
        np.array([len(group.response_ids) for group in groups], dtype=np.int64),
    )


def feedbacks_of(groups: Sequence[TokenGroup]) -> Sequence[Feedback]:
    """The feedback of all `groups`, without making those that are not in memory."""
    return groups.feedbacks if isinstance(groups, TokenRows) else [group.feedback for group in groups]


def unfinished_responses(groups: Sequence[TokenGroup]) -> int:
    """How many responses were cut and have no end-of-turn token."""
    if isinstance(groups, TokenRows):
        return groups.unfinished()
    return sum(not done for group in groups for done in group.finished)


def prompt_digests(groups: Sequence[TokenGroup]) -> list[bytes]:
    """16 bytes for each group, the same for those whose prompts have the same token ids."""
    if isinstance(groups, TokenRows):
        prompts: Iterable[Ids] = (groups.prompt(place) for place in range(len(groups)))
    else:
        prompts = (group.prompt_ids for group in groups)
    return [hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).data, digest_size=16).digest() for ids in prompts]
