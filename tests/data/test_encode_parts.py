"""Many rows are read and encoded with the help of other processes: the same rows, refusals and notes as by one."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.tiny_tokenizers import CHATML, byte_level, metaspace
from prefopt.core.errors import DataError, ModelError
from prefopt.data import encode_parts, group_store, load, processes, read
from prefopt.data.encode import encode_groups
from prefopt.data.groups import GroupSet
from prefopt.data.load import load_groups
from prefopt.data.token_cache import cached_encoding

ROWS = 300


def line(number: int) -> bytes:
    """Rows of which some have special text, some a response without text, some unused fields; and lines that are no rows."""
    if number % 50 == 3:
        return b'{"prompt": "cut'
    if number % 50 == 4:
        return b"\n"
    if number % 50 == 5:
        return b'{"prompt": "\xff"}\n'
    row = {
        "prompt": f"what is {number}  and the boat {'<|im_end|>' if number % 7 == 0 else ''}?",
        "chosen": f" the water {number}",
        "rejected": f"no {number * 3} boats" if number % 11 else "",
        "margin": number % 3,
        "rejected_finished": number % 13 > 0,
    }
    row |= {"prompt": [{"role": "user", "content": "hello", "id": 1}]} if number % 50 == 6 else {}
    row |= {f"field {number % 4}": 1} if number > ROWS // 2 else {}
    return json.dumps(row).encode() + b"\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(line(number) + b"\n" * (number % 50 == 3) for number in range(ROWS)))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """What children were asked for. All of them are there before anything is shared, and threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(group_store, "IN_MEMORY_GROUPS", 2)
    monkeypatch.setattr(read, "_LINES_TOGETHER", 8)
    monkeypatch.setattr(encode_parts, "ROWS_TOGETHER", 8)
    monkeypatch.setattr(load, "_BYTES_OF_A_CHILD", 1000)
    monkeypatch.setattr(encode_parts, "_ROWS_OF_A_CHILD", 100)
    monkeypatch.setattr(processes, "_cores", lambda: 3)
    found: list[Any] = []
    part, check = processes._Child.part, processes._Children.check

    def noting(self: Any, order: Any) -> Any:
        found.append(order)
        return part(self, order)

    def waiting(self: Any, order: object, made: object) -> None:
        check(self, order, made)
        for checked in self._checked:
            checked.result(timeout=60)

    monkeypatch.setattr(processes._Child, "part", noting)
    monkeypatch.setattr(processes._Children, "check", waiting)
    yield found
    sys.setswitchinterval(interval)


def read_alone(path: Path) -> GroupSet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_cores", lambda: 1)
        return load_groups(path)


def in_memory(groups: GroupSet) -> GroupSet:
    return replace(groups, groups=tuple(groups.groups))


def test_rows_refusals_and_notes_are_those_of_one_process(file: Path, asked: list[Any]) -> None:
    expected = in_memory(read_alone(file))
    assert not asked
    assert (
        len(expected.bad) > 30 and len(expected.groups) > 200 and "field 3" in expected.notes[1] and "id" in expected.notes[1]
    )
    assert in_memory(load_groups(file)) == expected
    assert len(asked) > 10 and {type(order).__name__ for order in asked} == {"Lines"}


def test_a_zipped_file_is_read_alike(file: Path, asked: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "zipped" / "rows.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(file.read_bytes()))
    found = in_memory(load_groups(path))
    assert asked
    expected = in_memory(read_alone(path))
    assert found == expected and found.groups[5].source == "rows.jsonl.gz:10"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match="is not a whole gzip file"):
        load_groups(path)
    assert not list((tmp_path / "cache").iterdir())


def test_the_first_rows_alone_are_read_by_one_process(file: Path, asked: list[Any]) -> None:
    assert load_groups(file, max_rows=100).rows == 100
    assert not asked


def test_a_shape_that_is_said_and_one_that_does_not_exist(file: Path, asked: list[Any]) -> None:
    assert load_groups(file, shape="transcripts").shape == "transcripts"
    with pytest.raises(DataError, match='no shape "triple"'):
        load_groups(file, shape="triple")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("tokenizer", "special"), [(byte_level(), True), (metaspace(CHATML), False)])
def test_token_ids_are_those_of_one_process(
    file: Path, asked: list[Any], tmp_path: Path, tokenizer: Any, special: bool
) -> None:
    """The first tokenizer has the token that some rows spell, the second does not."""
    groups = read_alone(file)
    made = cached_encoding(groups, tokenizer, root=tmp_path)
    assert len({order[0] for order in asked}) > 10
    expected = encode_groups(groups, tokenizer)
    assert (made.bad, made.special_text) == (expected.bad, expected.special_text) and bool(made.special_text) == special
    assert [group.source for group in made.groups] == [group.source for group in expected.groups]
    for one, other in zip(made.groups, expected.groups, strict=True):
        assert one.feedback == other.feedback and one.finished == other.finished
        assert [part.tolist() for part in (one.prompt_ids, *one.response_ids, *one.scored)] == [
            part.tolist() for part in (other.prompt_ids, *other.response_ids, *other.scored)
        ]


def test_a_tokenizer_that_cannot_be_sent_is_used_here(file: Path, asked: list[Any], tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.made_here = lambda: None
    groups = read_alone(file)
    assert len(cached_encoding(groups, tokenizer, root=tmp_path).groups) == len(encode_groups(groups, tokenizer).groups)
    assert not asked


def test_rows_that_no_template_renders_are_an_error_and_leave_nothing(file: Path, asked: list[Any], tmp_path: Path) -> None:
    groups = read_alone(file)
    with pytest.raises(ModelError, match="no chat template"):
        cached_encoding(groups, byte_level(None), template="chat", root=tmp_path / "tokens")
    assert not asked and not list((tmp_path / "tokens").iterdir())
