"""A table of words and their token ids that is asked for all words of many texts at once.

The words of a Python dictionary are looked up one by one, each a string of its own. Here texts are one row of bytes: where
its words begin, their bytes, their places in the table and the ids found there are each an operation on arrays. A word is
kept if it has at most 16 bytes, and these are its key, so that what is found is the word itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.data.tokens import Ids

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
WhereCut = Callable[[Bytes], Flags]  # bytes of stretches -> at which of them, spaces all, a text is cut

BETWEEN = 0xFF  # stands between stretches, as it does in no UTF-8
_NO_TEXT = 0xFE  # begins what stands for ids that are no text's
_SPACE = ord(" ")
_LONGEST = 16  # bytes of a word
_FIRST = 0x80  # in a kind: the word begins its stretch
_EMPTY = 0x7F  # kind of a free place, and of no word
_LEAST_PLACES = 12  # as a power of two
_SHARE_TAKEN = 4  # places for each word, at least

_BELOW = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype=np.uint64)  # masks of the lowest bytes
_LOW = _BELOW[np.minimum(np.arange(_LONGEST + 2), 8)]
_HIGH = _BELOW[np.clip(np.arange(_LONGEST + 2) - 8, 0, 8)]
_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))


def at_every_space(data: Bytes) -> Flags:
    """Spaces."""
    spaces: Flags = data == _SPACE
    return spaces


def at_last_spaces(data: Bytes) -> Flags:
    """Spaces with something else behind them in their stretch."""
    spaces = at_every_space(data)
    spaces[:-1] &= (data[1:] != _SPACE) & (data[1:] != BETWEEN)
    return spaces


def at_last_spaces_but_of_digits(data: Bytes) -> Flags:
    """`at_last_spaces`, but none that a digit may follow where white space may be in front of it."""
    places = np.flatnonzero(at_last_spaces(data))
    then, before = data[places + 1], data[places - 1]
    no_digit = (then < 0x80) & ((then < ord("0")) | (then > ord("9"))) & (then > _SPACE) & (then < 0x7F)
    letter = (before > _SPACE) & (before < 0x7F)
    # White space of more than one byte: C2 xx, or E1, E2 and E3 with two more.
    far = (before >= 0x80) & (before < BETWEEN) & (data[places - 2] != 0xC2)
    far &= (data[places - 3] < 0xE1) | (data[places - 3] > 0xE3)
    cuts = np.zeros(len(data), dtype=np.bool_)
    cuts[places[no_digit | letter | far]] = True
    return cuts


def stretch_bytes(text: str) -> bytes:
    """A stretch of text as `WordTable.found` takes it."""
    return text.encode("utf-8", "surrogatepass")


class Word(NamedTuple):
    """A word that a table does not hold. `number`: which one of all words."""

    number: int
    text: str
    is_first: bool


@dataclass(frozen=True)
class Found:
    """What is known of the words of stretches: arrays with an entry for each.

    `stretch`: which one a word is of. `begins` and `ends`: its place in `stream`. `starts` and `counts`: where its ids are,
    and how many; `known`: whether they are.
    """

    stream: bytes
    stretch: Numbers
    begins: Numbers
    ends: Numbers
    starts: Numbers
    counts: Numbers
    known: Flags

    def unknown(self) -> list[Word]:
        """The words that the table does not hold."""
        numbers = np.flatnonzero(~self.known)
        begins, ends = self.begins[numbers].tolist(), self.ends[numbers].tolist()
        return [
            Word(number, self.stream[begin:end].decode("utf-8", "surrogatepass"), self.stream[begin - 1] == BETWEEN)
            for number, begin, end in zip(numbers.tolist(), begins, ends, strict=True)
        ]


class WordTable:
    """Token ids of words, by open addressing."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all words."""
        self.count = 0
        self._ids = np.zeros(1024, dtype=np.int32)
        self._used = 0
        self.codes: dict[str, bytes] = {}
        self._places(_LEAST_PLACES)

    def _places(self, bits: int) -> None:
        size = 1 << bits
        self._shift = np.uint64(64 - bits)
        self._low, self._high = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.uint64)
        self._kind = np.full(size, _EMPTY, dtype=np.uint8)
        self._start, self._length = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)

    def add_code(self, text: str, ids: bytes) -> None:
        """Make an entry of `codes`: bytes that stand, as a stretch of their own, for the ids of the whole of `text`."""
        number = len(self.codes)
        code = bytes((_NO_TEXT, *(number >> bits & 0x3F | 0x80 for bits in (18, 12, 6, 0))))
        self._add([code], [_FIRST], [ids])
        self.codes[text] = code

    def add(self, words: Mapping[str, bytes], *, is_first: bool) -> None:
        """Keep the short ones of `words` (word -> int32 ids). `is_first`: they are what a stretch begins with."""
        as_bytes = [(stretch_bytes(word), ids) for word, ids in words.items()]
        short = [(word, ids) for word, ids in as_bytes if len(word) <= _LONGEST]
        kind = _FIRST if is_first else 0
        self._add([word for word, _ in short], [kind] * len(short), [ids for _, ids in short])

    def _add(self, words: Sequence[bytes], kinds: Sequence[int], ids: Sequence[bytes]) -> None:
        if not words:
            return
        self._make_room(len(words))
        keys = np.frombuffer(b"".join(word.ljust(_LONGEST, b"\0") for word in words), dtype="<u8").astype(np.uint64)
        low, high = keys[::2], keys[1::2]
        lengths = np.array([len(of_word) // 4 for of_word in ids], dtype=np.int64)
        starts = self._used + np.cumsum(lengths) - lengths
        added = np.frombuffer(b"".join(ids), dtype=np.int32)
        while self._used + len(added) > len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
        self._ids[self._used : self._used + len(added)] = added
        self._used += len(added)
        whole = np.array([kind | len(word) for kind, word in zip(kinds, words, strict=True)], dtype=np.uint8)
        self._put(low, high, whole, starts, lengths)

    def _make_room(self, words: int) -> None:
        size = len(self._kind)
        if (self.count + words) * _SHARE_TAKEN <= size:
            return
        kept = np.flatnonzero(self._kind != _EMPTY)
        low, high, kind = self._low[kept], self._high[kept], self._kind[kept]
        starts, lengths = self._start[kept], self._length[kept]
        self._places(((self.count + words) * _SHARE_TAKEN * 2 - 1).bit_length())
        self.count = 0
        self._put(low, high, kind, starts, lengths)

    def _put(self, low: Words, high: Words, kind: Bytes, starts: Numbers, lengths: Numbers) -> None:
        places, left = self._places_of(low, high), np.arange(len(kind))
        while len(left):
            taken, chosen = np.unique(places[left], return_index=True)  # one word for each place
            free = self._kind[taken] == _EMPTY
            at, new = taken[free], left[chosen[free]]
            self._low[at], self._high[at], self._kind[at] = low[new], high[new], kind[new]
            self._start[at], self._length[at] = starts[new], lengths[new]
            self.count += len(at)
            left = left[~self._is_at(places[left], low[left], high[left], kind[left])]
            places[left] = places[left] + 1 & len(self._kind) - 1

    def _places_of(self, low: Words, high: Words) -> Numbers:
        """Where each word is looked for first."""
        mixed = low * _MIX[0] ^ high * _MIX[1]
        mixed ^= mixed >> np.uint64(32)
        return (mixed * _MIX[2] >> self._shift).astype(np.int64)

    def found(self, stretches: Sequence[bytes], where_cut: WhereCut) -> Found:
        """What is known of the words of `stretches`, none of which is empty."""
        stream = bytes((BETWEEN,)).join((*stretches, bytes((BETWEEN,)) * 32))  # and bytes behind the last word
        size = len(stream) - 32  # with one of these
        data = np.frombuffer(stream, dtype=np.uint8)
        between = data[:size] == BETWEEN
        ends = np.flatnonzero(between | where_cut(data[:size]))
        starts = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1] + 1))
        first = np.concatenate((np.ones(1, dtype=np.bool_), between[ends[:-1]]))
        lengths = np.minimum(ends - starts, _LONGEST + 1)
        eights = np.frombuffer(stream, dtype="<u8", count=len(stream) // 8).astype(np.uint64, copy=False)
        eight, shift = starts >> 3, (starts & 7).astype(np.uint64) << np.uint64(3)
        back = np.uint64(64) - shift  # a shift by 64 leaves 0
        one, two, three = eights[eight], eights[eight + 1], eights[eight + 2]
        low = (one >> shift | two << back) & _LOW[lengths]
        high = (two >> shift | three << back) & _HIGH[lengths]
        kind = lengths.astype(np.uint8) | first * np.uint8(_FIRST)
        places, known = self._looked_up(low, high, kind)
        return Found(stream, np.cumsum(first) - 1, starts, ends, self._start[places], self._length[places], known)

    def _looked_up(self, low: Words, high: Words, kind: Bytes) -> tuple[Numbers, Flags]:
        """(place of each word, whether it is there)."""
        places = self._places_of(low, high)
        known = self._is_at(places, low, high, kind)
        left = np.flatnonzero(~known & (self._kind[places] != _EMPTY))
        while len(left):
            places[left] = places[left] + 1 & len(self._kind) - 1
            known[left] = self._is_at(places[left], low[left], high[left], kind[left])
            left = left[~known[left] & (self._kind[places[left]] != _EMPTY)]
        return places, known

    def _is_at(self, places: Numbers, low: Words, high: Words, kind: Bytes) -> Flags:
        same: Flags = (self._low[places] == low) & (self._high[places] == high) & (self._kind[places] == kind)
        return same

    def joined(self, found: Found, words: Mapping[int, bytes | None], stretches: Mapping[int, bytes]) -> tuple[Ids, Numbers]:
        """(ids of all stretches in a row, where each stretch ends).

        `words`: ids of those that `found` does not know, by number; None in those `stretches` whose ids are given as a whole.
        """
        first = np.flatnonzero(np.diff(found.stretch, prepend=-1))
        alone = {number: ids for number, ids in words.items() if ids is not None}
        whole = {int(first[number]): ids for number, ids in stretches.items()}
        others = [*alone.values(), *whole.values()]
        lengths = np.array([len(ids) // 4 for ids in others], dtype=np.int64)
        places = self._used + np.cumsum(lengths) - lengths
        starts, counts = found.starts.copy(), found.counts.copy()
        starts[list(alone)], counts[list(alone)] = places[: len(alone)], lengths[: len(alone)]
        counts[np.isin(found.stretch, list(stretches))] = 0
        starts[list(whole)], counts[list(whole)] = places[len(alone) :], lengths[len(alone) :]
        ends = np.cumsum(counts)
        ids = np.concatenate((self._ids[: self._used], np.frombuffer(b"".join(others), dtype=np.int32)))
        row = ids[np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])]
        return row, ends[np.append(first[1:], len(counts)) - 1]
