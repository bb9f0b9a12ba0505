"""A long piece of work in parts: made in their order by this process and, where it pays, by others beside it.

Reading, rendering and looking up words is Python, which runs on one core a process. A child is sent what makes parts, then
orders, and answers each with its part. It ends when its input does. It is used once it has made of the first order what
this process made; whatever goes wrong with it costs time only, because its parts are then made here.

Not by multiprocessing: what it starts anew runs the user's script again up to its guard, if it has one, and what it forks
copies a process that has threads.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

from prefopt.core.memory import collector_paused

_MOST_CHILDREN = 7
_ORDERS_EACH = 2  # one in work, one that waits
_FAILURES = (OSError, EOFError, ValueError, pickle.PickleError, queue.Empty)  # of a child that has ended, or never was

Order = TypeVar("Order")
Part = TypeVar("Part")


def children_for(amount: int, each: int) -> int:
    """How many children help with `amount` of something, where `each` of it is worth starting one."""
    if not sys.executable:  # Python has no name where it is embedded
        return 0
    return max(0, min(_cores() - 1, amount // each, _MOST_CHILDREN))


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    make: Callable[..., Callable[[Order], Part]], how: tuple[Any, ...], orders: Iterable[Order], *, children: int
) -> Generator[Part, None, None]:
    """What `make(*how)` gives for each of `orders`, in their order, whoever calls it. Raises what that raises.

    `make` is a function of a module, and its parts of an order are equal (==) in every process. There are no children where
    `how` cannot be pickled.
    """
    work = make(*how)
    sent = _pickled((make, how)) if children else b""
    if not sent:
        yield from map(work, orders)
        return
    rest = iter(orders)
    with closing(_Children(children, sent)) as helpers:
        for first in rest:
            made = work(first)
            helpers.check(first, made)
            yield made
            break
        yield from _shared(work, rest, helpers)


def _shared(work: Callable[[Order], Part], orders: Iterator[Order], children: _Children) -> Iterator[Part]:
    """Each order goes to a child that is free, or else is done here; parts that are ahead of their turn are few."""
    waiting: deque[tuple[Order, Future[Part]]] = deque()
    for order in orders:
        waiting.append((order, children.submit(order) if children.free else _done(work(order))))
        while waiting and (waiting[0][1].done() or len(waiting) >= 2 * children.most):
            yield _result(*waiting.popleft(), work)
    for order, part in waiting:
        yield _result(order, part, work)


def _done(value: Part) -> Future[Part]:
    future: Future[Part] = Future()
    future.set_result(value)
    return future


def _result(order: Order, part: Future[Part], work: Callable[[Order], Part]) -> Part:
    """What was made, or made here where no child has begun or the child cannot."""
    if part.cancel():
        return work(order)
    try:
        return part.result()
    except _FAILURES:
        return work(order)


def _pickled(value: object) -> bytes:
    """Empty where it cannot be: a tokenizer may be any object."""
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return b""


class _Child:
    """A process that does what `sent` says, the pickle of (make, how)."""

    def __init__(self, sent: bytes) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the other cores have children of their own
        }
        words = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._send(sent)

    def part(self, order: object) -> Any:
        """The part of that order. One of _FAILURES where the child has ended."""
        self._send(pickle.dumps(order, pickle.HIGHEST_PROTOCOL))
        assert self.process.stdout is not None
        return pickle.load(self.process.stdout)

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

    def __init__(self, count: int, sent: bytes) -> None:
        self.most = count * _ORDERS_EACH
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="beside")
        self._starting = [self._threads.submit(_Child, sent) for _ in range(count)]
        self._checked: list[Future[None]] = []
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._unfinished: set[Future[Any]] = set()
        self._failed = False

    def check(self, order: object, made: object) -> None:
        """Use each child once it has made `made` of `order`. After a failure none is used."""
        self._checked = [self._threads.submit(self._check, start, order, made) for start in self._starting]

    @property
    def free(self) -> bool:
        """Whether a child has nothing to do, or soon will have."""
        self._unfinished = {part for part in self._unfinished if not part.done()}
        ready = sum(check.done() for check in self._checked)
        return not self._failed and len(self._unfinished) < ready * _ORDERS_EACH

    def submit(self, order: object) -> Future[Any]:
        """The part of that order, when it is there; the result may raise one of _FAILURES."""
        part = self._threads.submit(self._part, order)
        self._unfinished.add(part)
        return part

    def _check(self, start: Future[_Child], order: object, made: object) -> None:
        try:
            child = start.result()
            if child.part(order) == made:
                self._idle.put(child)
                return
        except _FAILURES:
            pass
        self._failed = True

    def _part(self, order: object) -> Any:
        try:
            child = self._idle.get_nowait()
            part = child.part(order)
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
    make, how = pickle.load(source)
    work = make(*how)
    while True:
        try:
            order = pickle.load(source)
        except EOFError:
            return
        with collector_paused():
            part = work(order)
        pickle.dump(part, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()
