"""Groups -> batches of token ids in their order: part by part, by this process and, where there are many, others beside it.

Rendering and looking up words is Python, which runs on one core a process. A child is sent the tokenizer, then parts of the
groups as bytes, and answers each with its batches. It ends when its input does. It is used once it has given for the first
part what this process gave; whatever goes wrong with it costs time only, because its parts are then made here.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from prefopt.core.memory import collector_paused
from prefopt.data.encode import ROWS_TOGETHER, Encoding, TrainOn
from prefopt.data.group_store import StoredGroups, group_of
from prefopt.data.groups import BadRow, Feedback, Group
from prefopt.data.token_store import TOKEN_SCHEMA, token_batches

_ROWS_OF_A_CHILD = 16_384  # fewer are done before it has begun
_MOST_CHILDREN = 7
_PARTS_EACH = 2  # one in work, one that waits
_FAILURES = (
    OSError,
    EOFError,
    ValueError,
    pickle.PickleError,
    pa.ArrowException,
    queue.Empty,
)  # of a child that ended, or never was
_UNSAID = Feedback("pair")  # token batches do not hold what is known about responses


class Part(NamedTuple):
    """What became of some groups: their batches, those that were refused, and the sources of those with special text."""

    batches: Sequence[pa.RecordBatch]
    bad: tuple[BadRow, ...]
    special_text: tuple[str, ...]


def encode_parts(groups: Sequence[Group], tokenizer: Any, *, template: str, train_on: TrainOn) -> Iterator[Part]:
    """The parts of `groups` in their order, the same whoever makes them. Raises what `encode_groups` raises."""
    encoding = Encoding(tokenizer, template=template, train_on=train_on)
    bounds = [*range(0, len(groups), ROWS_TOGETHER), len(groups)]
    spans = deque(pairwise(bounds))

    def own(span: tuple[int, int]) -> Part:
        return _part(encoding, span[0], groups[slice(*span)])

    count = min(_cores() - 1, len(groups) // _ROWS_OF_A_CHILD, _MOST_CHILDREN)
    how = _pickled((tokenizer, template, train_on)) if count > 0 and sys.executable else b""  # no name where it is embedded
    if not how or not isinstance(groups, StoredGroups):
        yield from map(own, spans)
        return
    with closing(_Children(count, how)) as children:
        first = spans.popleft()
        made = own(first)
        children.check(_order(groups, first), made)
        yield made
        yield from _shared(spans, own, lambda span: children.submit(_order(groups, span)), children)


def _shared(
    spans: deque[tuple[int, int]],
    own: Callable[[tuple[int, int]], Part],
    submit: Callable[[tuple[int, int]], Future[Part]],
    children: _Children,
) -> Iterator[Part]:
    """Parts in order: children are kept busy, and this process makes the next one that nobody has."""
    waiting: deque[tuple[tuple[int, int], Future[Part] | Part]] = deque()
    while spans or waiting:
        while spans and children.free:
            waiting.append((spans[0], submit(spans.popleft())))
        if spans and len(waiting) < 2 * children.most and not (waiting and _is_made(waiting[0][1])):
            waiting.append((spans[0], own(spans.popleft())))
            continue
        span, part = waiting.popleft()
        yield part if isinstance(part, Part) else _result(part, span, own)


def _is_made(part: Future[Part] | Part) -> bool:
    return isinstance(part, Part) or part.done()


def _result(part: Future[Part], span: tuple[int, int], own: Callable[[tuple[int, int]], Part]) -> Part:
    """What the child made, or made here where it has not begun or cannot."""
    if part.cancel():
        return own(span)
    try:
        return part.result()
    except _FAILURES:
        return own(span)


def _pickled(value: object) -> bytes:
    """Empty where it cannot be: a tokenizer may be any object."""
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return b""


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(encoding: Encoding, first: int, groups: Sequence[Group]) -> Part:
    """The part of `groups`, of which the first is row `first` of all."""
    bad, special = len(encoding.bad), len(encoding.special_text)
    batches = list(token_batches((first + place, group) for place, group in encoding.of(groups)))
    return Part(batches, tuple(encoding.bad[bad:]), tuple(encoding.special_text[special:]))


class _Order(NamedTuple):
    """Groups as a child is sent them: the place of the first of them, and the bytes of each."""

    first: int
    contents: list[bytes]


def _order(groups: StoredGroups, span: tuple[int, int]) -> _Order:
    return _Order(span[0], list(groups[slice(*span)].contents()))


class _Child:
    """A process that encodes as `how`, the arguments of `Encoding`, says."""

    def __init__(self, how: bytes) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the other cores have children of their own
        }
        words = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._send(how)

    def encode(self, order: _Order) -> Part:
        """The part of those groups. One of _FAILURES where the child has ended."""
        self._send(pickle.dumps(tuple(order), pickle.HIGHEST_PROTOCOL))
        assert self.process.stdout is not None
        stream, bad, special_text = pickle.load(self.process.stdout)
        return Part(list(pa.ipc.open_stream(stream)), bad, special_text)

    def _send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message)
        self.process.stdin.flush()

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


class _Children:
    """Several children and a thread for each that waits for it. Each is used as soon as it has made what `check` was given."""

    def __init__(self, count: int, how: bytes) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encoding")
        self._starting = [self._threads.submit(_Child, how) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._checked: list[Future[None]] = []
        self._failed = False
        self._unfinished: set[Future[Part]] = set()
        self.most = count * _PARTS_EACH

    def check(self, order: _Order, made: Part) -> None:
        """Use each child once it has made `made` of `order`. After a failure none is used."""
        self._checked = [self._threads.submit(self._check, start, order, made) for start in self._starting]

    @property
    def free(self) -> bool:
        """Whether a child has nothing to do, or soon will have."""
        self._unfinished = {part for part in self._unfinished if not part.done()}
        started = sum(check.done() for check in self._checked)
        return not self._failed and len(self._unfinished) < started * _PARTS_EACH

    def submit(self, order: _Order) -> Future[Part]:
        """The part of those groups, when it is there; the result may raise one of _FAILURES."""
        part = self._threads.submit(self._encode, order)
        self._unfinished.add(part)
        return part

    def _check(self, start: Future[_Child], order: _Order, made: Part) -> None:
        try:
            child = start.result()
            if child.encode(order) == made:
                self._idle.put(child)
                return
        except _FAILURES:
            pass
        self._failed = True

    def _encode(self, order: _Order) -> Part:
        try:
            child = self._idle.get_nowait()
            part = child.encode(order)
        except _FAILURES:
            self._failed = True
            raise
        self._idle.put(child)
        return part

    def close(self) -> None:
        """End all children; what they have not done is not done."""
        self._failed = True
        children = [start.result() for start in self._starting if start.exception() is None]
        for child in children:
            child.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in children:
            child.close()


def _serve() -> None:
    """What a child does."""
    source = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    tokenizer, template, train_on = pickle.load(source)
    encoding = Encoding(tokenizer, template=template, train_on=train_on)
    while True:
        try:
            first, contents = pickle.load(source)
        except EOFError:
            return
        with collector_paused():
            part = _part(encoding, first, [group_of(content, _UNSAID) for content in contents])
        answer = (_as_stream(part.batches), part.bad, part.special_text)
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _as_stream(batches: Sequence[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TOKEN_SCHEMA) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return bytes(sink.getvalue())


if __name__ == "__main__":
    _serve()
