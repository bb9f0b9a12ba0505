"""Other processes make a part of the token ids; what comes of it is that of one process, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.tiny_tokenizers import CHATML, byte_level, metaspace
from prefopt.core.errors import ModelError
from prefopt.data import encode_parts as parts
from prefopt.data import group_store
from prefopt.data.encode import encode_groups
from prefopt.data.encode_parts import Part
from prefopt.data.group_store import kept
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.token_cache import cached_encoding

SPECIAL = "<|im_end|>"
ROWS = 300


def row(number: int) -> Group:
    """Every seventh row has a special token's text in it; of every eleventh a response has no text, and it is refused."""
    asked = f"what is {number}  and the boat {SPECIAL if number % 7 == 0 else ''}?"
    answers = [f" the water {number}", f"no {number * 3} boats" if number % 11 else ""]
    return Group(
        prompt=(Turn("user", asked),),
        responses=tuple((Turn("assistant", text),) for text in answers),
        feedback=Feedback("pair", margin=float(number % 3)),
        source=f"rows:{number}",
        finished=(True, bool(number % 11)),
    )


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GroupSet:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(group_store, "IN_MEMORY_GROUPS", 2)
    monkeypatch.setattr(parts, "ROWS_TOGETHER", 8)
    monkeypatch.setattr(parts, "_ROWS_OF_A_CHILD", 100)
    monkeypatch.setattr(parts, "_cores", lambda: 3)
    return GroupSet(kept(map(row, range(ROWS))))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of what children were asked for, in the order in which they were asked."""
    found: list[int] = []
    encode = parts._Child.encode

    def noting(self: Any, order: Any) -> Part:
        found.append(order.first)
        return encode(self, order)

    monkeypatch.setattr(parts._Child, "encode", noting)
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done here before every child is checked, so that they have something to do."""
    shared = parts._shared

    def waiting(spans: Any, own: Any, submit: Any, children: Any) -> Iterator[Part]:
        for check in children._checked:
            check.result(timeout=60)
        return shared(spans, own, submit, children)

    monkeypatch.setattr(parts, "_shared", waiting)


def listed(parts: Iterator[Part]) -> tuple[list[Any], list[Any], list[str]]:
    made = list(parts)
    return (
        [row for part in made for batch in part.batches for row in batch.to_pylist()],
        [bad for part in made for bad in part.bad],
        [source for part in made for source in part.special_text],
    )


def encoded(groups: GroupSet, tokenizer: Any) -> tuple[list[Any], list[Any], list[str]]:
    return listed(parts.encode_parts(groups.groups, tokenizer, template="auto", train_on="all"))


def alone(groups: GroupSet, tokenizer: Any) -> tuple[list[Any], list[Any], list[str]]:
    return encoded(GroupSet(tuple(groups.groups)), tokenizer)  # groups in memory are few


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("tokenizer", "special"), [(byte_level(), ROWS // 7 + 1), (metaspace(CHATML), 0)])
def test_the_rows_and_their_order_are_those_of_one_process(
    groups: GroupSet, asked: list[int], tokenizer: Any, special: int
) -> None:
    """The first tokenizer has the token that some rows spell, the second does not."""
    expected = alone(groups, tokenizer)
    assert not asked
    assert len(expected[1]) == ROWS // 11 + 1
    assert bool(expected[2]) == bool(special) and len(expected[2]) <= special
    assert encoded(groups, tokenizer) == expected
    assert asked.count(0) == 2  # the check
    assert len(set(asked)) > 10


def test_through_the_cache(groups: GroupSet, asked: list[int], tmp_path: Path) -> None:
    tokenizer = byte_level()
    made = cached_encoding(groups, tokenizer, root=tmp_path)
    assert asked
    expected = encode_groups(groups, tokenizer)
    assert (made.bad, made.special_text) == (expected.bad, expected.special_text)
    assert [group.source for group in made.groups] == [group.source for group in expected.groups]
    for one, other in zip(made.groups, expected.groups, strict=True):
        assert one.feedback == other.feedback and one.finished == other.finished
        assert [part.tolist() for part in (one.prompt_ids, *one.response_ids, *one.scored)] == [
            part.tolist() for part in (other.prompt_ids, *other.response_ids, *other.scored)
        ]


@pytest.mark.usefixtures("patient")
def test_a_child_that_dies_costs_nothing(groups: GroupSet, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    encode, killed = parts._Child.encode, list[Any]()

    def dying(self: Any, order: Any) -> Part:
        if order.first and not killed:
            self.process.kill()
            killed.append(self.process)
        return encode(self, order)

    monkeypatch.setattr(parts._Child, "encode", dying)
    assert encoded(groups, tokenizer) == alone(groups, tokenizer)
    assert killed and killed[0].poll() is not None


@pytest.mark.usefixtures("patient")
def test_a_child_that_answers_otherwise_is_not_used(groups: GroupSet, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    encode, given = parts._Child.encode, list[int]()

    def other(self: Any, order: Any) -> Part:
        given.append(order.first)
        return encode(self, order)._replace(special_text=("rows:1",))

    monkeypatch.setattr(parts._Child, "encode", other)
    assert encoded(groups, tokenizer) == alone(groups, tokenizer)
    assert given == [0, 0]


def test_no_child_is_left_when_the_rows_are_not_wanted_any_more(groups: GroupSet, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = parts._Child.__init__

    def noting(self: Any, how: bytes) -> None:
        start(self, how)
        started.append(self.process)

    monkeypatch.setattr(parts._Child, "__init__", noting)
    found = parts.encode_parts(groups.groups, byte_level(), template="auto", train_on="all")
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_rows_that_cannot_be_rendered_are_an_error_as_in_one_process(groups: GroupSet) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        encoded(groups, byte_level(None))


@pytest.mark.parametrize("why", ["one core", "few rows", "no name of Python", "a tokenizer that cannot be sent"])
def test_no_children_where_they_cannot_help(groups: GroupSet, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    tokenizer = byte_level()
    if why == "one core":
        monkeypatch.setattr(parts, "_cores", lambda: 1)
    elif why == "few rows":
        monkeypatch.setattr(parts, "_ROWS_OF_A_CHILD", ROWS + 1)
    elif why == "no name of Python":
        monkeypatch.setattr(parts.sys, "executable", "")
    else:
        tokenizer.made_here = lambda: None
    monkeypatch.setattr(parts, "_Children", None)  # calling it would fail
    assert len(encoded(groups, tokenizer)[0]) == ROWS - ROWS // 11 - 1
