"""Laws of reading: every format gives the same rows, and what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.errors import DataError
from prefopt.data.read import read_rows
from prefopt.data.refusals import Reason

ROWS = [
    {"prompt": "a\nb", "chosen": 'c "quoted", d', "rejected": "é\u2028…"},
    {"prompt": "f", "chosen": "g\t", "rejected": "h" * 200_000},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the format that the name of `path` asks for."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith((".csv", ".tsv")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    text = "\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows, indent=1)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.jsonl", (1, 2)),
        ("x.jsonl.gz", (1, 2)),
        ("x.json", (2, 7)),
        ("x.json.gz", (2, 7)),
        ("x.csv", (2, 4)),
        ("x.csv.gz", (2, 4)),
        ("x.tsv", (2, 4)),
        ("x.parquet", (1, 2)),
    ],
)
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path: Path, name: str, lines: tuple[int, ...]) -> None:
    raw = read_rows(write(tmp_path / name, ROWS))
    assert raw.rows == ROWS
    assert raw.sources == tuple(f"{name}:{line}" for line in lines)
    assert raw.bad == ()
    assert read_rows(tmp_path / name, max_rows=1).rows == ROWS[:1]


SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=9)
JSON_VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)


@settings(max_examples=40)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), min_size=1, max_size=5), st.sampled_from([None, 2])
)
def test_a_json_list_reads_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.json"
    text = json.dumps(rows, indent=indent)
    path.write_text(text, encoding="utf-8")
    raw = read_rows(path)
    assert raw.rows == rows
    lines = [int(source.rsplit(":", 1)[1]) for source in raw.sources]
    assert lines == sorted(lines)
    assert all(text.split("\n")[line - 1].lstrip(" [").startswith("{") for line in lines)


def test_a_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n{"a": 2}\n')
    raw = read_rows(path)
    assert raw.rows == [{"a": 1}, {"a": 2}]
    assert raw.sources == ("x.json:1", "x.json:3")


def test_broken_lines_are_named_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n[1, 2]\n"text"\n{"a": "\xff"}\n{"a": 2}\n' + b"[" * 100_000 + b"\n" + b"1" * 5000)
    raw = read_rows(path)
    assert raw.rows == [{"a": 1}, {"a": 2}]
    assert raw.sources == ("x.jsonl:1", "x.jsonl:7")
    assert [(row.source, row.reason) for row in raw.bad] == [
        ("x.jsonl:2", Reason.NOT_JSON),
        ("x.jsonl:4", Reason.NOT_AN_OBJECT),
        ("x.jsonl:5", Reason.NOT_AN_OBJECT),
        ("x.jsonl:6", Reason.NOT_UTF8),
        ("x.jsonl:8", Reason.NOT_JSON),
        ("x.jsonl:9", Reason.NOT_JSON),
    ]
    assert all(len(row.found) <= 80 for row in raw.bad)
    assert raw.total == 8


def test_broken_rows_of_a_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'prompt,chosen\n"two\nlines",b\nonly one\nx,\xff\n')
    raw = read_rows(path)
    assert raw.rows == [{"prompt": "two\nlines", "chosen": "b"}]
    assert [(row.source, row.reason, row.field) for row in raw.bad] == [
        ("x.csv:4", Reason.NOT_AN_OBJECT, "(row)"),
        ("x.csv:5", Reason.NOT_UTF8, "chosen"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b'[{"a": 1},\n {"a": oops}]', "line 2, column 8"),
        ("x.json", b'[{"a": 1}\n {"a": 2}]', "line 2, column 2"),
        ("x.json", b'[{"a": 1}', "line 1, column 10"),
        ("x.json", b'[{"a": 1}] []', "line 1, column 12"),
        ("x.json", b'[\n"\xff"]', "x.json:2: is not UTF-8"),
        ("x.json", b"[]", "holds no rows"),
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n \n", "holds no rows"),
        ("x.csv", b"prompt,chosen\n", "holds no rows"),
        ("x.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
        ("x.jsonl.gz", b"not gzip", "is not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9], "is not a whole gzip file"),
        ("x.parquet", b"not parquet at all", "is not a Parquet file"),
        ("x.txt", b"hello", 'rows are not read from ".txt"'),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert caught.value.todo


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match="there is no such file") as caught:
        read_rows(tmp_path / "pair.jsonl")
    assert 'did you mean "pairs.jsonl"?' in caught.value.todo
    with pytest.raises(DataError, match="there is no folder"):
        read_rows(tmp_path / "nowhere" / "pair.jsonl")
    with pytest.raises(DataError, match="is a folder") as caught:
        read_rows(tmp_path)
    assert "pairs.jsonl" in caught.value.todo


class Columns:
    """What is needed of a Hugging Face Dataset."""

    column_names = ("prompt",)

    def __iter__(self) -> Any:
        return iter([{"prompt": "a"}, {"prompt": "b"}])


def test_objects_in_memory_are_read_as_files_are() -> None:
    assert read_rows(Columns()).rows == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_rows({"train": Columns()}, max_rows=1).sources == ("dataset:1",)
    raw = read_rows([{"a": 1}, 2])
    assert (raw.rows, raw.sources, raw.bad[0].source) == ([{"a": 1}], ("list:1",), "list:2")
    with pytest.raises(DataError, match='no split "tests"') as caught:
        read_rows({"train": [], "test": []}, split="tests")
    assert 'did you mean "test"?' in caught.value.todo
    with pytest.raises(DataError, match="value of type int"):
        read_rows(3)


def test_a_hub_id_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> Columns:
        if name == "owner/gone":
            raise ConnectionError("could not reach the Hub\nmore lines")
        asked.append((name, split))
        return Columns()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    raw = read_rows("owner/name", split="test", max_rows=1)
    assert asked == [("owner/name", "test[:1]")]
    assert (raw.name, raw.sources) == ("owner/name", ("owner/name:1",))
    with pytest.raises(DataError, match=r"owner/gone: is not a file here.*ConnectionError: could not reach the Hub\)"):
        read_rows("owner/gone")
    for not_an_id in ("owner/name.jsonl", "name", "a/b/c"):
        with pytest.raises(DataError, match="there is no"):
            read_rows(not_an_id)
