"""Files, Hub datasets and objects in memory -> rows with their places. What cannot be read is named, never skipped silently."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from prefopt.core.errors import DataError, nearest
from prefopt.data.groups import BadRow
from prefopt.data.refusals import Reason, Refusal

Row = dict[str, Any]
Found = Generator[tuple[str, "Row | Refusal"], None, None]  # (file:line, the row or why it is none)

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_READABLE = ".jsonl, .json, .csv, .tsv (each also .gz) or .parquet"
_LINES_TOGETHER = 512
_BYTES_TOGETHER = 2**18  # of long lines fewer are held together
_ZIPPED = 3  # times as much text as bytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class RawRows:
    """Rows as they were written, `sources[i]` (`file:line`, from 1; a Parquet file's line is its row) for `rows[i]`."""

    rows: list[Row] = field(default_factory=list)
    sources: tuple[str, ...] = ()
    bad: tuple[BadRow, ...] = ()
    name: str = ""

    @property
    def total(self) -> int:
        """Rows that were there, the unreadable ones included."""
        return len(self.rows) + len(self.bad)


def read_rows(source: Any, *, split: str = "train", max_rows: int | None = None) -> RawRows:
    """Rows of `source`: a path, a Hub dataset id "owner/name", a Hugging Face Dataset (or dict of splits), or a list of dicts.

    `split` chooses among the splits of a dataset. With `max_rows` only the first rows are read. DataError where there
    is nothing to read; a single broken row is listed in `bad` instead.
    """
    name, found = find_rows(source, split=split, max_rows=max_rows)
    rows: list[Row] = []
    sources: list[str] = []
    bad: list[BadRow] = []
    with closing(found):
        for place, row in found:
            if isinstance(row, Refusal):
                bad.append(row.bad_row(place))
            else:
                rows.append(row)
                sources.append(place)
    return RawRows(rows, tuple(sources), tuple(bad), name)


def find_rows(source: Any, *, split: str = "train", max_rows: int | None = None) -> tuple[str, Found]:
    """The name of `source` (see `read_rows`), and its rows one after another, of which there is at least one."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if not path.exists() and _is_hub_id(str(source)):
            rows = _load_from_hub(str(source), split, max_rows)
            return str(source), _first(_objects(rows, str(source)), str(source), max_rows)
        return str(source), _first(_file_rows(path), str(source), max_rows)
    if isinstance(source, Mapping):
        if split not in source:
            known = ", ".join(str(key) for key in source)
            raise DataError(
                f'the dataset has no split "{split}"', todo=f"{nearest(split, map(str, source))}Its splits: {known}."
            )
        return find_rows(source[split], split=split, max_rows=max_rows)
    if hasattr(source, "column_names") and hasattr(source, "__iter__"):
        return "dataset", _first(_objects(source, "dataset"), "dataset", max_rows)
    if isinstance(source, Sequence):
        return "list", _first(_objects(source, "list"), "list", max_rows)
    raise DataError(
        f"rows cannot be read from a value of type {type(source).__name__}",
        todo=f"Give a path ({_READABLE}), a Hub dataset id, a Hugging Face Dataset or a list of dicts.",
    )


def _first(found: Found, name: str, max_rows: int | None) -> Found:
    """The first `max_rows` of `found`, or all; DataError where there are none."""
    some = False
    with closing(found):  # with max_rows the file is still open
        for row in itertools.islice(found, max_rows):
            some = True
            yield row
    if not some:
        raise DataError(f"{name}: holds no rows", todo="Give a file or dataset with at least one row.")


def _row(value: Any) -> Row | Refusal:
    if isinstance(value, Mapping):
        return dict(value)
    return Refusal(Reason.NOT_AN_OBJECT, "(row)", value, 'an object with named fields: {"prompt": ...}')


def _objects(values: Iterable[Any], name: str) -> Found:
    for number, value in enumerate(values, 1):
        yield f"{name}:{number}", _row(value)


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and _suffix(Path(text)) == "" and not Path(text).parent.exists()


def _suffix(path: Path) -> str:
    """The suffix that tells the format, without `.gz`; "" where it is not one of those that are read."""
    name = path.name.lower().removesuffix(".gz")
    known = (*TEXT_SUFFIXES, ".parquet")
    return next((suffix for suffix in known if name.endswith(suffix)), "")


def _load_from_hub(name: str, split: str, max_rows: int | None) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{name}: no such file, and the Hub needs the package datasets", todo="pip install datasets") from error
    try:
        return cast(Iterable[Any], load_dataset(name, split=split if max_rows is None else f"{split}[:{max_rows}]"))
    except Exception as error:  # datasets raises many unrelated types
        first_line = (str(error).splitlines() or [""])[0]
        raise DataError(
            f'{name}: is not a file here, and the Hub gave no split "{split}" of it ({type(error).__name__}: {first_line})',
            todo="Check the spelling, the split (data.split) and the network, or give a local file.",
        ) from error


def _file_rows(path: Path) -> Found:
    _check_file(path)
    suffix = _suffix(path)
    if suffix == ".parquet":
        with _readable(path):
            yield from _parquet_rows(path)
        return
    with _opened(path) as file:
        if suffix == ".jsonl":
            yield from json_lines(Lines(path.name, 1, file))
        elif suffix == ".json":
            yield from _json_rows(file.read(), path)
        else:
            yield from _table_rows(file, path, "\t" if suffix == ".tsv" else ",")


class Lines(NamedTuple):
    """Lines of the file `name`, of which the first is line `first`, from 1."""

    name: str
    first: int
    lines: Iterable[bytes]


def line_bytes(source: Any) -> int:
    """About how many bytes of text a file with a row a line holds; 0 for any other source."""
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if path is None or not path.is_file() or _suffix(path) != ".jsonl":
        return 0
    return path.stat().st_size * (_ZIPPED if path.name.lower().endswith(".gz") else 1)


def lines_of(source: str | Path) -> Generator[Lines, None, None]:
    """The lines of such a file, many at a time. DataError where it cannot be read."""
    path = Path(source).expanduser()
    with _opened(path) as file:
        first, size, lines = 1, 0, list[bytes]()
        for line in file:
            lines.append(line)
            size += len(line)
            if len(lines) == _LINES_TOGETHER or size >= _BYTES_TOGETHER:
                yield Lines(path.name, first, lines)
                first, size, lines = first + len(lines), 0, []
        if lines:
            yield Lines(path.name, first, lines)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with _readable(path), open(path, "rb") as raw, _unzipped(raw, path) as file:
        yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is not a whole gzip file ({error})", todo="Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})", todo="Check the path and the permissions of the file.") from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if _suffix(child))
        todo = f"Name one file in it: {', '.join(inside[:5])}." if inside else f"Give one file: {_READABLE}."
        raise DataError(f"{path}: is a folder, not a file of rows", todo=todo)
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}", todo="Check the path.")
        siblings = [child.name for child in path.parent.iterdir()]
        hint = nearest(path.name, siblings) or f"Check the path; rows are read from {_READABLE}."
        raise DataError(f"{path}: there is no such file", todo=hint.strip())
    if not _suffix(path):
        raise DataError(f'{path}: rows are not read from "{"".join(path.suffixes) or path.name}"', todo=f"Give {_READABLE}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty", todo="Give a file with at least one row.")


def _unzipped(file: IO[bytes], path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.name.lower().endswith(".gz") else file


def json_lines(lines: Lines) -> Found:
    """The rows of lines that are not blank."""
    for number, line in enumerate(lines.lines, lines.first):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield f"{lines.name}:{number}", _json_line(line)


def _json_line(line: bytes) -> Row | Refusal:
    try:
        value = json.loads(line.decode())
        return value if type(value) is dict else _row(value)
    except UnicodeDecodeError as error:
        return Refusal(Reason.NOT_UTF8, "(line)", line[max(0, error.start - 20) : error.start + 20], "text in UTF-8")
    except json.JSONDecodeError as error:
        found = error.doc[max(0, error.pos - 30) : error.pos + 30]
        return Refusal(Reason.NOT_JSON, "(line)", found, f"one JSON object a line; column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, endless nesting
        return Refusal(Reason.NOT_JSON, "(line)", line, f"one JSON object a line: {error}")


def _json_rows(data: bytes, path: Path) -> Found:
    """Rows of a .json file: a list of objects, one object, or one object a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: is not UTF-8 (byte {error.start})", todo="Save the file as UTF-8.") from None
    start = len(text) - len(text.lstrip())
    decoder = json.JSONDecoder()
    try:
        if text[start : start + 1] == "[":
            yield from _json_list(text, start, decoder, path.name)
            return
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not JSON at line {error.lineno}, column {error.colno} ({error.msg})",
            todo="A .json file holds a list of objects, or one object a line (then .jsonl is the better name).",
        ) from None
    if not text[end:].strip():
        yield f"{path.name}:{text.count(chr(10), 0, start) + 1}", _row(value)
    else:
        yield from json_lines(Lines(path.name, 1, io.BytesIO(data)))


def _json_list(text: str, start: int, decoder: json.JSONDecoder, name: str) -> Found:
    """Elements of the list that opens at `start`, with the lines on which they begin."""
    position, counted, line = _skip_space(text, start + 1), 0, 1
    if text[position : position + 1] == "]":
        return
    while True:
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield f"{name}:{line}", _row(value)
        position = _skip_space(text, position)
        sign = text[position : position + 1]
        if sign == "]":
            break
        if sign != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _table_rows(file: IO[bytes], path: Path, delimiter: str) -> Found:
    """Rows of a table with a header; a cell is text, an empty cell is absent."""
    limit = csv.field_size_limit(sys.maxsize)  # responses are longer than the module's default of 128 KiB
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path}:1: two columns have the same name: {', '.join(header)}", todo="Rename one of them.")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield f"{path.name}:{line}", _table_row(header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            raise DataError(f"{where}: is not a table ({error})", todo="Check the quotes and the separator.") from None
        finally:
            csv.field_size_limit(limit)


def _table_row(header: list[str], cells: list[str]) -> Row | Refusal:
    if len(cells) != len(header):
        return Refusal(Reason.NOT_AN_OBJECT, "(row)", cells, f"{len(header)} columns: {', '.join(header)}")
    for key, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
            return Refusal(Reason.NOT_UTF8, key, cell, "text in UTF-8")
    return {key: cell for key, cell in zip(header, cells, strict=True) if cell != ""}


def _parquet_rows(path: Path) -> Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", _row(row)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a Parquet file that can be read ({error})", todo="Write it again.") from error
