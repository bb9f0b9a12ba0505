"""Groups -> batches of token ids in their order, part by part, with the help of other processes where there are many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from prefopt.data.encode import ROWS_TOGETHER, Encoding, TrainOn
from prefopt.data.group_store import StoredGroups, group_of
from prefopt.data.groups import BadRow, Feedback, Group
from prefopt.data.processes import children_for, in_order
from prefopt.data.token_store import token_batches

_ROWS_OF_A_CHILD = 16_384
_UNSAID = Feedback("pair")  # token batches do not hold what is known about responses


class Part(NamedTuple):
    """What became of some groups: their batches, those that were refused, and the sources of those with special text."""

    batches: list[pa.RecordBatch]
    bad: tuple[BadRow, ...]
    special_text: tuple[str, ...]


class _Order(NamedTuple):
    """Some groups, or what `group_contents` gives for them; `first` is the place of the first of them."""

    first: int
    groups: Sequence[Group] | list[bytes]


def encode_parts(groups: Sequence[Group], tokenizer: Any, *, template: str, train_on: TrainOn) -> Generator[Part, None, None]:
    """The parts of `groups` in their order. Raises what `encode_groups` raises."""
    children = children_for(len(groups), _ROWS_OF_A_CHILD)
    return in_order(part_maker, (tokenizer, template, train_on), _orders(groups), children=children)


def _orders(groups: Sequence[Group]) -> Iterator[_Order]:
    for first in range(0, len(groups), ROWS_TOGETHER):
        some = groups[first : first + ROWS_TOGETHER]
        yield _Order(first, list(some.contents()) if isinstance(some, StoredGroups) else some)


def part_maker(tokenizer: Any, template: str, train_on: TrainOn) -> Callable[[_Order], Part]:
    """What makes parts, one after another, as `encode_groups` is told to."""
    encoding = Encoding(tokenizer, template=template, train_on=train_on)

    def made(order: _Order) -> Part:
        encoding.bad.clear()
        encoding.special_text.clear()
        groups = (group_of(group, _UNSAID) if isinstance(group, bytes) else group for group in order.groups)
        batches = list(token_batches((order.first + place, group) for place, group in encoding.of(groups)))
        return Part(batches, tuple(encoding.bad), tuple(encoding.special_text))

    return made
