"""Token groups in one Arrow file: written in batches, memory-mapped when read, made one by one when they are asked for.

The file is an Arrow IPC stream (`pyarrow.ipc.open_stream` reads it) with four bytes behind it: the CRC-32 of all that goes
before, little-endian, because Arrow has no check of its own. One row is one group:

    place      int64               number of its row among those that were encoded
    source     binary              where the row is, in UTF-8
    prompt     list<int32>         token ids
    responses  list<list<int32>>
    scored     list<list<bool>>    which of those tokens carry loss
    finished   list<bool>

The last batch is empty; its metadata holds the notes of the file as JSON.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prefopt.core.files import whole_file
from prefopt.data.groups import Feedback
from prefopt.data.tokens import Counts, Flags, Ids, Lengths, TokenGroup, TokenRows

_IDS, _FLAGS = pa.list_(pa.int32()), pa.list_(pa.bool_())
_SCHEMA = pa.schema(
    {
        "place": pa.int64(),
        "source": pa.binary(),
        "prompt": _IDS,
        "responses": pa.list_(_IDS),
        "scored": pa.list_(_FLAGS),
        "finished": _FLAGS,
    }
)
_NOTES = b"notes"
_ROWS_PER_BATCH = 1024
_TOKENS_PER_BATCH = 2**20  # of long rows fewer make a batch, so that writing holds a few MiB
_CRC_BYTES = 4


class TokenWriter:
    """Takes batches one by one and holds none. Made by `writing_tokens`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.notes: dict[str, Any] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch of `token_batches`."""
        self.stream.write_batch(batch)


def token_batches(rows: Iterable[tuple[int, TokenGroup]]) -> Iterator[pa.RecordBatch]:
    """Batches of groups, each with its number as a row of what was encoded; at most one batch of groups is held."""
    places: list[int] = []
    groups: list[TokenGroup] = []
    tokens = 0
    for place, group in rows:
        places.append(place)
        groups.append(group)
        tokens += group.unique_tokens
        if len(groups) == _ROWS_PER_BATCH or tokens >= _TOKENS_PER_BATCH:
            yield _batch(places, groups)
            places, groups, tokens = [], [], 0
    if groups:
        yield _batch(places, groups)


@contextmanager
def writing_tokens(path: Path) -> Iterator[TokenWriter]:
    """A writer of the file `path`, which is there whole once the block has ended, with the writer's `notes`, or not at all."""
    with whole_file(path) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:
            writer = TokenWriter(stream)
            yield writer
            stream.write_batch(_batch([], []), {_NOTES: json.dumps(writer.notes).encode()})
        crc = _crc(partial, partial.stat().st_size)
        with open(partial, "ab") as end:
            end.write(crc.to_bytes(_CRC_BYTES, "little"))


def _crc(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes."""
    crc = 0
    with open(path, "rb") as file:
        while size and (piece := file.read(min(size, 2**20))):
            crc = zlib.crc32(piece, crc)
            size -= len(piece)
    return crc


def _batch(places: Sequence[int], groups: Sequence[TokenGroup]) -> pa.RecordBatch:
    responses = [ids for group in groups for ids in group.response_ids]
    of_groups = _offsets([len(group.response_ids) for group in groups])
    of_responses = _offsets([len(ids) for ids in responses])
    of_prompts = _offsets([len(group.prompt_ids) for group in groups])
    prompts = _values([group.prompt_ids for group in groups], np.int32)
    ids = _values(responses, np.int32)
    flags = _values([flags for group in groups for flags in group.scored], np.bool_)
    nested = pa.ListArray.from_arrays
    columns = [
        pa.array(places, pa.int64()),
        pa.array([group.source.encode("utf-8", "surrogatepass") for group in groups], pa.binary()),
        nested(of_prompts, prompts),
        nested(of_groups, nested(of_responses, ids)),
        nested(of_groups, nested(of_responses, flags)),
        pa.array([group.finished for group in groups], _FLAGS),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _values(parts: Sequence[Ids] | Sequence[Flags], kind: type[np.generic]) -> pa.Array:
    return pa.array(np.concatenate((np.zeros(0, kind), *parts)))


def _offsets(counts: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int32))


class _Batch(NamedTuple):
    """Columns of one batch, none of them copied: offsets and values of the lists, as numpy and Arrow have them."""

    sources: Any
    prompt_starts: Ids
    prompts: Ids
    response_starts: Ids
    token_starts: Ids
    tokens: Ids
    scored: Any
    finished: Any

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Batch:
        _, sources, prompts, responses, scored, finished = batch.columns
        starts, values = (responses.offsets, prompts.offsets, responses.values.offsets), (prompts, responses.values)
        of_groups, of_prompts, of_responses = (column.to_numpy() for column in starts)
        ids = [column.values.to_numpy() for column in values]
        return cls(sources, of_prompts, ids[0], of_groups, of_responses, ids[1], scored.values.values, finished)


class StoredRows(TokenRows):
    """The groups of a token file. `places` says which rows they are, `feedbacks` what is known about those.

    The file must not be written to meanwhile; removing or replacing it does no harm.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], feedbacks: Sequence[Feedback]) -> None:
        self._batches = [_Batch.of(batch) for batch in batches]
        self._ends = list(accumulate(batch.num_rows for batch in batches))
        self.places: Counts = np.concatenate((np.zeros(0, np.int64), *(batch.column("place").to_numpy() for batch in batches)))
        if len(self.places) and not 0 <= self.places.min() <= self.places.max() < len(feedbacks):
            raise ValueError(f"rows up to {self.places.max()} of {len(feedbacks)}")
        known: dict[Feedback, Feedback] = {}  # most rows of a file say the same
        self._feedbacks = [known.setdefault(feedbacks[place], feedbacks[place]) for place in self.places.tolist()]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def feedbacks(self) -> Sequence[Feedback]:
        return self._feedbacks

    def _at(self, place: int) -> tuple[_Batch, int]:
        number = bisect_right(self._ends, place)
        return self._batches[number], place - (self._ends[number - 1] if number else 0)

    def prompt(self, place: int) -> Ids:
        batch, row = self._at(place)
        return batch.prompts[batch.prompt_starts[row] : batch.prompt_starts[row + 1]].copy()

    def group(self, place: int) -> TokenGroup:
        batch, row = self._at(place)
        first, last = int(batch.response_starts[row]), int(batch.response_starts[row + 1])
        starts = batch.token_starts[first : last + 1].tolist()
        spans = list(zip(starts[:-1], starts[1:], strict=True))
        flags = batch.scored.slice(starts[0], starts[-1] - starts[0]).to_numpy(zero_copy_only=False)
        return TokenGroup(
            prompt_ids=batch.prompts[batch.prompt_starts[row] : batch.prompt_starts[row + 1]].copy(),
            response_ids=tuple(batch.tokens[start:end].copy() for start, end in spans),
            scored=tuple(flags[start - starts[0] : end - starts[0]] for start, end in spans),
            feedback=self._feedbacks[place],
            source=batch.sources[row].as_py().decode("utf-8", "surrogatepass"),
            finished=tuple(batch.finished[row].as_py()),
        )

    def unfinished(self) -> int:
        return sum(len(values) - values.true_count for batch in self._batches for values in (batch.finished.values,))

    def lengths(self) -> Lengths:
        return self._lengths

    @cached_property
    def _lengths(self) -> Lengths:
        names = ("prompt_starts", "token_starts", "response_starts")
        counts = [[np.diff(getattr(batch, name)) for batch in self._batches] for name in names]
        prompt, response, responses = (np.concatenate((np.zeros(0, np.int64), *parts)) for parts in counts)
        return Lengths(prompt, response, responses)


def read_tokens(path: Path, feedbacks: Sequence[Feedback]) -> tuple[StoredRows, dict[str, Any]]:
    """The groups and the notes of the token file `path`; `feedbacks` are those of all rows that were encoded.

    Raises OSError where it cannot be read and ValueError where it is not whole or belongs to other rows.
    """
    size = path.stat().st_size - _CRC_BYTES
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        crc = int.from_bytes(file.read(), "little")
    if size <= 0 or _crc(path, size) != crc:
        raise ValueError(f"{path}: is not as it was written")
    with pa.memory_map(str(path)) as mapped:
        stream = pa.ipc.open_stream(mapped.read_buffer(size))
    if not stream.schema.equals(_SCHEMA):
        raise ValueError(f"{path}: has other columns")
    *batches, (last, metadata) = stream.iter_batches_with_custom_metadata()
    if last.num_rows or metadata is None:
        raise ValueError(f"{path}: has no notes")
    return StoredRows([batch for batch, _ in batches], feedbacks), json.loads(metadata[_NOTES])
