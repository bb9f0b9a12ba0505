"""A source of rows -> groups, and what was noticed of its rows: their shape, what is refused, what is not used.

Many rows of a file with a row a line are read with the help of other processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from prefopt.core.config import ROW_SHAPES
from prefopt.core.errors import DataError, nearest
from prefopt.core.memory import collector_paused
from prefopt.data.group_store import StoredGroups, group_contents, kept, stored
from prefopt.data.groups import NO_PROMPT, BadRow, Feedback, Group, GroupSet
from prefopt.data.messages import MESSAGE_KEYS, is_listed
from prefopt.data.processes import children_for, in_order
from prefopt.data.read import Lines, Row, find_rows, json_lines, line_bytes, lines_of
from prefopt.data.refusals import Refusal
from prefopt.data.shapes import READERS, USED_COLUMNS, row_shape

_ROWS_LOOKED_AT = 200
_BYTES_OF_A_CHILD = 2**24
_FORMS = {"hh": 'HH-style "\\n\\nHuman:" text', "text": "strings", "messages": "message lists"}
_EXPECTED = (
    "prompt + chosen + rejected; chosen + rejected; prompt + completion + label; messages + label; prompt + responses + scores"
)
_KNOWN_KEYS = frozenset(MESSAGE_KEYS)

Found = Iterable[tuple[str, "Row | Refusal"]]


def load_groups(source: Any, *, shape: str = "auto", split: str = "train", max_rows: int | None = None) -> GroupSet:
    """Groups of `source` (see `read_rows`), read as `shape`. DataError where nothing can be read."""
    name, found = find_rows(source, split=split, max_rows=max_rows)
    with closing(found):
        children = children_for(line_bytes(source), _BYTES_OF_A_CHILD) if max_rows is None else 0
        if not children:
            return _grouped(name, found, shape)
        chosen, _ = _shape_of(name, found, shape)
    noticed = Noticed()
    with (
        collector_paused(),
        closing(lines_of(source)) as lines,
        closing(in_order(lines_reader, (chosen,), lines, children=children)) as parts,
    ):
        groups = _stored(parts, noticed)
    return noticed.group_set(name, groups, chosen, detected=shape == "auto")


def _grouped(name: str, found: Found, shape: str) -> GroupSet:
    """The groups of rows that come one after another; of the rows themselves only the first are ever held together."""
    chosen, first = _shape_of(name, found, shape)
    noticed = Noticed()
    with collector_paused():
        groups = kept(_groups(chain(first, found), chosen, noticed))
    return noticed.group_set(name, groups, chosen, detected=shape == "auto")


def _shape_of(name: str, found: Found, shape: str) -> tuple[str, list[tuple[str, Row | Refusal]]]:
    """The shape as which rows are read, and the first of `found`, which were looked at."""
    if shape not in ROW_SHAPES:
        raise DataError(
            f'data.shape: there is no shape "{shape}"', todo=f"{nearest(shape, ROW_SHAPES)}Shapes: {', '.join(ROW_SHAPES)}."
        )
    first: list[tuple[str, Row | Refusal]] = []
    rows: list[Row] = []
    for source, row in found:
        first.append((source, row))
        if not isinstance(row, Refusal):
            rows.append(row)
            if len(rows) == _ROWS_LOOKED_AT:
                break
    if not rows:
        broken = [row.bad_row(source) for source, row in first if isinstance(row, Refusal)]
        raise DataError(f"{name}: none of its {len(broken)} rows can be read", todo=f"The first: {broken[0]}" if broken else "")
    try:
        return (detect_shape(rows) if shape == "auto" else shape), first
    except DataError as error:
        raise DataError(f"{name}: {error.what}", todo=error.todo) from None


def detect_shape(rows: Sequence[Mapping[str, Any]]) -> str:
    """The shape (one of `ROW_SHAPES` but "auto") of most of the first rows, by the names of their fields.

    DataError where no row has the fields of any shape.
    """
    found = Counter(shape for row in rows[:_ROWS_LOOKED_AT] if (shape := row_shape(row)))
    if not found:
        columns = ", ".join(sorted({str(key) for row in rows[:_ROWS_LOOKED_AT] for key in row})) or "none"
        raise DataError(
            f"the rows have none of the known shapes; their fields: {columns}",
            todo=f"Rename the fields to one of: {_EXPECTED}; messages; instruction + output.",
        )
    return found.most_common(1)[0][0]


@dataclass
class Noticed:
    """What was noticed while rows were read: which are no rows, which do not fit, fields that nothing uses.

    `kinds` counts groups by their form and whether the prompt is "".
    """

    broken: list[BadRow] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)
    unused_fields: set[str] = field(default_factory=set)
    unused_keys: set[str] = field(default_factory=set)  # of messages
    kinds: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def add(self, other: Noticed) -> None:
        """What was noticed of the rows that come next."""
        self.broken += other.broken
        self.refused += other.refused
        self.unused_fields |= other.unused_fields
        self.unused_keys |= other.unused_keys
        self.kinds += other.kinds

    def group_set(self, name: str, groups: Sequence[Group], shape: str, *, detected: bool) -> GroupSet:
        """`groups` with all that is said of them."""
        total = len(self.broken) + len(groups) + len(self.refused)
        notes = self._notes(total, shape, detected=detected)
        return GroupSet(groups, (*self.broken, *self.refused), shape, total, name, notes)

    def _notes(self, total: int, shape: str, *, detected: bool) -> tuple[str, ...]:
        of_form: Counter[str] = Counter()
        for (form, _), count in self.kinds.items():
            of_form[form] += count
        forms = " and ".join(_FORMS[form] for form, _ in of_form.most_common())
        how = "set data.shape to override" if detected else "as data.shape says"
        notes = [f"{total} rows, read as {shape}{f' ({forms})' if forms else ''}; {how}"]
        names = sorted(self.unused_fields) + sorted(f"{key} (of messages)" for key in self.unused_keys)
        if names:
            notes.append(f"fields that are not used: {', '.join(names)}")
        bare = sum(count for (_, without), count in self.kinds.items() if without)
        if bare:
            notes.append(f'{bare} rows have the prompt "": their responses follow the beginning-of-text token')
        return tuple(notes)


def _groups(found: Found, shape: str, noticed: Noticed) -> Iterator[Group]:
    """The groups of rows, one after another; the rest is put into `noticed`."""
    read = READERS[shape]
    for source, row in found:
        if isinstance(row, Refusal):
            noticed.broken.append(row.bad_row(source))
            continue
        if not row.keys() <= USED_COLUMNS:
            noticed.unused_fields.update(
                str(key) for key, value in row.items() if value is not None and key not in USED_COLUMNS
            )
        noticed.unused_keys.update(_message_keys(row.values()))
        try:
            group = read(row, source)
        except Refusal as refusal:
            noticed.refused.append(refusal.bad_row(source))
            continue
        noticed.kinds[group.form, group.prompt == NO_PROMPT] += 1
        yield group


def _message_keys(values: Iterable[Any]) -> set[str]:
    """Keys of the messages in `values` that turns have no place for."""
    return {
        str(key)
        for value in values
        if is_listed(value)
        for message in value
        if isinstance(message, (dict, Mapping))
        and not message.keys() <= _KNOWN_KEYS
        and ("role" in message or "from" in message)
        for key, said in message.items()
        if said is not None and key not in MESSAGE_KEYS
    }


class LinesRead(NamedTuple):
    """The groups of some lines, as `group_contents` gives them, with what is known of their responses."""

    contents: list[bytes]
    feedbacks: list[Feedback]
    noticed: Noticed


def lines_reader(shape: str) -> Callable[[Lines], LinesRead]:
    """What reads lines as rows of `shape`."""

    def read(lines: Lines) -> LinesRead:
        noticed = Noticed()
        groups = tuple(_groups(json_lines(lines), shape, noticed))
        return LinesRead(list(group_contents(groups)), [group.feedback for group in groups], noticed)

    return read


def _stored(parts: Iterable[LinesRead], noticed: Noticed) -> StoredGroups:
    def groups() -> Iterator[tuple[list[bytes], list[Feedback]]]:
        for part in parts:
            noticed.add(part.noticed)
            yield part.contents, part.feedbacks

    return stored(groups())
