"""A table of words gives the ids that it was told, knows what it does not know, and cuts where the words are cut."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data import words
from prefopt.data.word_table import (
    BETWEEN,
    WhereCut,
    WordTable,
    at_every_space,
    at_last_spaces,
    at_last_spaces_but_of_digits,
    stretch_bytes,
)

SPACES = st.sampled_from(
    [" ", "  ", "   ", "\n", "\t", "\u00a0", "\u2003", "\u3000", "\x1c", "\x85", "1", "٣", "½", "a", "é", "你", "😀", "."]
)
TEXTS = st.lists(st.lists(SPACES, min_size=1, max_size=12).map("".join), min_size=1, max_size=5)
WORDS = st.text(st.sampled_from("ab\0é你\x7f\u0080"), max_size=9)

SPLITS: list[tuple[WhereCut, Callable[[str], list[str]]]] = [
    (at_every_space, lambda text: text.split(" ")),
    (at_last_spaces, re.compile(" (?=[^ ])").split),
    (at_last_spaces_but_of_digits, words._LAST_SPACE_BUT_OF_DIGITS.split),
]


def ids_of(word: str) -> bytes:
    """As many ids as the word has letters, of which the first says which word it is."""
    return np.array([sum(map(ord, word)), *range(1, len(word))], dtype=np.int32).tobytes()


@pytest.mark.parametrize(("where", "split"), SPLITS)
@given(texts=TEXTS)
def test_cuts_are_those_of_the_words(where: WhereCut, split: Callable[[str], list[str]], texts: list[str]) -> None:
    """None is elsewhere; where only ASCII is around it, none is missing."""
    data = np.frombuffer(b"".join(stretch_bytes(text) + bytes((BETWEEN,)) for text in texts), dtype=np.uint8)
    found = np.flatnonzero(where(data)).tolist()
    begin, cuts = 0, []
    for text in texts:
        position = begin - 1
        for word in split(text)[:-1]:
            position += len(word.encode()) + 1
            cuts.append(position)
        begin += len(text.encode()) + 1
    assert set(found) <= set(cuts)
    if where is at_last_spaces_but_of_digits:  # at the beginning, and behind letters of several bytes, it does not look
        cuts = [cut for cut in cuts if cut and data[cut - 1] < 0x80 and data[cut + 1] < 0x80]
    assert set(cuts) <= set(found)


@given(known=st.lists(st.tuples(WORDS, st.booleans())), asked=st.lists(st.lists(WORDS, min_size=1, max_size=6), min_size=1))
def test_what_it_was_told_is_found_and_nothing_else(known: list[tuple[str, bool]], asked: list[list[str]]) -> None:
    asked = [stretch for stretch in asked if " ".join(stretch)] or [["a"]]
    table = WordTable()
    for is_first in (True, False):
        table.add({word: ids_of(word) for word, first in known if first is is_first}, is_first=is_first)
    short = {(word, first) for word, first in known if len(stretch_bytes(word)) <= 16}
    assert table.count == len(short)
    found = table.found([stretch_bytes(" ".join(stretch)) for stretch in asked], at_every_space)
    every = [(word, place == 0) for stretch in asked for place, word in enumerate(stretch)]
    unknown = found.unknown()
    assert [(word.text, word.is_first) for word in unknown] == [one for one in every if one not in short]
    row, ends = table.joined(found, {word.number: ids_of(word.text) for word in unknown}, {})
    texts = [b"".join(map(ids_of, stretch)) for stretch in asked]
    assert row.tobytes() == b"".join(texts) and ends.tolist() == np.cumsum([len(text) // 4 for text in texts]).tolist()


def test_a_growing_table_keeps_its_words() -> None:
    table = WordTable()
    for start in range(0, 9000, 1500):
        table.add({f"w{number}": ids_of(f"w{number}") for number in range(start, start + 1800)}, is_first=False)
    assert table.count == 9300
    found = table.found([stretch_bytes(" ".join(["x", *(f"w{number}" for number in range(9301))]))], at_every_space)
    assert [word.text for word in found.unknown()] == ["x", "w9300"]
    row, _ = table.joined(found, {}, {})
    assert row.tobytes() == b"".join(ids_of(f"w{number}") for number in range(9300))


def test_stretches_given_as_a_whole_and_codes() -> None:
    table = WordTable()
    table.add({"a": ids_of("a")}, is_first=True)
    table.add_code("<|turn|>", ids_of("turn"))
    found = table.found([b"a", table.codes["<|turn|>"], b"a b"], at_every_space)
    assert [word.text for word in found.unknown()] == ["b"]
    row, ends = table.joined(found, {word.number: None for word in found.unknown()}, {2: ids_of("whole")})
    assert row.tobytes() == ids_of("a") + ids_of("turn") + ids_of("whole") and ends.tolist() == [1, 5, 10]
