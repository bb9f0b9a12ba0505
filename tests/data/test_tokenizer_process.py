"""Other processes take a part of the tokenising; the ids are those of one process, whatever becomes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.tiny_tokenizers import CHATML, byte_level, metaspace
from prefopt.data import encode, tokenizer_process
from prefopt.data.encode import Encoding, encode_groups
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.token_cache import cached_encoding
from prefopt.data.tokenizer_process import TokenizerProcess, TokenizerProcesses, tokenizer_processes

SPECIAL = "<|im_end|>"


def row(number: int) -> Group:
    """Every seventh row has a special token's text in it; every eleventh is refused, because its response has no text."""
    asked = f"what is {number}  and the boat {SPECIAL if number % 7 == 0 else ''}?"
    responses = [f" the water {number}", f"no {number * 3} boats" if number % 11 else ""]
    return Group(
        prompt=(Turn("user", asked),),
        responses=tuple((Turn("assistant", text),) for text in responses),
        feedback=Feedback("pair"),
        source=f"rows:{number}",
        finished=(True, bool(number % 11)),
    )


ROWS = GroupSet(groups=tuple(map(row, range(300))))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_ROWS_TOGETHER", 8)
    monkeypatch.setattr(encode, "_CHUNKS_HELD", 3)
    monkeypatch.setattr(tokenizer_process, "ROWS_TO_SHARE", 100)
    monkeypatch.setattr(tokenizer_process, "_cores", lambda: 3)


def encoded(tokenizer: Any, processes: TokenizerProcesses | None) -> tuple[list[Any], Encoding]:
    encoding = Encoding(tokenizer, processes=processes)
    groups = [
        (place, group.prompt_ids.tolist(), [ids.tolist() for ids in group.response_ids], group.source)
        for place, group in encoding.of(ROWS.groups)
    ]
    return groups, encoding


def same(one: tuple[list[Any], Encoding], other: tuple[list[Any], Encoding]) -> bool:
    (groups, encoding), (others, other_encoding) = one, other
    return groups == others and encoding.bad == other_encoding.bad and encoding.special_text == other_encoding.special_text


def sharing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts children were asked for, each time."""
    asked: list[int] = []
    whole = TokenizerProcess.encode

    def counting(self: TokenizerProcess, texts: Any) -> Any:
        asked.append(len(texts))
        return whole(self, texts)

    monkeypatch.setattr(TokenizerProcess, "encode", counting)
    return asked


def test_the_ids_and_their_order_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(CHATML)
    alone = encoded(tokenizer, None)
    assert len(alone[1].bad) == len(ROWS.groups) // 11 + 1 and alone[1].special_text
    asked = sharing(monkeypatch)
    with tokenizer_processes(tokenizer, len(ROWS.groups)) as processes:
        assert processes is not None
        assert same(encoded(tokenizer, processes), alone)
        children = processes._children
        assert len(children) == 2 and sum(asked) > 50
    assert all(child.process.poll() is not None for child in children)


def test_a_child_that_dies_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(CHATML)
    alone = encoded(tokenizer, None)
    answers = iter(range(100))
    whole = TokenizerProcess.encode

    def dying(self: TokenizerProcess, texts: Any) -> Any:
        if next(answers) == 6:
            self.process.kill()
        return whole(self, texts)

    monkeypatch.setattr(TokenizerProcess, "encode", dying)
    with tokenizer_processes(tokenizer, len(ROWS.groups)) as processes:
        assert same(encoded(tokenizer, processes), alone)
        assert processes is not None and any(child.process.poll() for child in processes._children)


def test_a_child_that_answers_otherwise_is_not_used() -> None:
    tokenizer = byte_level(CHATML)
    alone = encoded(tokenizer, None)
    body = byte_level(CHATML).backend_tokenizer.to_str()
    processes = TokenizerProcesses(body, 1, [("the boat", np.array([1, 2, 3], dtype=np.int32))])
    try:
        with pytest.raises(OSError, match="otherwise"):
            processes.submit(["the boat"]).result()
        assert same(encoded(tokenizer, processes), alone)
    finally:
        processes.close()


def test_no_children_where_they_cannot_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(tokenizer: Any, rows: int) -> bool:
        with tokenizer_processes(tokenizer, rows) as processes:
            return processes is not None

    assert found(byte_level(CHATML), 100)
    assert not found(byte_level(CHATML), 99)
    assert not found(metaspace(CHATML), 100)  # its tokens reach over spaces
    monkeypatch.setattr(tokenizer_process, "_cores", lambda: 1)
    assert not found(byte_level(CHATML), 100)


def test_through_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML)
    asked = sharing(monkeypatch)
    made = cached_encoding(ROWS, tokenizer, root=tmp_path)
    assert asked
    expected = encode_groups(ROWS, tokenizer)
    assert made.bad == expected.bad and made.special_text == expected.special_text
    assert [group.prompt_ids.tolist() for group in made.groups] == [group.prompt_ids.tolist() for group in expected.groups]
    assert [[ids.tolist() for ids in group.response_ids] for group in made.groups] == [
        [ids.tolist() for ids in group.response_ids] for group in expected.groups
    ]
