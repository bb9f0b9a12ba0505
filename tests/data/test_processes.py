"""Other processes do a part of the work; what comes of it is that of one process, whatever becomes of the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefopt.data import processes
from prefopt.data.processes import children_for, in_order

COUNT = 60


def squares(offset: int) -> Callable[[int], int]:
    def work(order: int) -> int:
        time.sleep(0.002)  # long enough for a thread to wake up meanwhile
        return order * order + offset

    return work


def numbered(offset: int) -> Callable[[int], tuple[int, int]]:
    """Parts that are other ones in every process."""
    return lambda order: (order + offset, os.getpid())


def refusing(limit: int) -> Callable[[int], int]:
    def work(order: int) -> int:
        if order == limit:
            raise LookupError(f"no {order}")
        return order

    return work


def dying(here: int) -> Callable[[int], int]:
    """Ends any process but `here` at the fifth order."""

    def work(order: int) -> int:
        time.sleep(0.002)
        if order >= 4 and os.getpid() != here:
            os._exit(3)
        return -order

    return work


def talking(text: str) -> Callable[[int], int]:
    def work(order: int) -> int:
        time.sleep(0.002)
        print(text)
        return order

    return work


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes of all children."""
    found: list[Any] = []
    start = processes._Child.__init__

    def noting(self: Any, sent: bytes) -> None:
        start(self, sent)
        found.append(self.process)

    monkeypatch.setattr(processes._Child, "__init__", noting)
    return found


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What children were asked for, in the order in which they were asked."""
    found: list[Any] = []
    part = processes._Child.part

    def noting(self: Any, order: Any) -> Any:
        found.append(order)
        return part(self, order)

    monkeypatch.setattr(processes._Child, "part", noting)
    return found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child is there before this process goes on, so that it has something to do."""
    check = processes._Children.check

    def waiting(self: Any, order: object, made: object) -> None:
        check(self, order, made)
        for checked in self._checked:
            checked.result(timeout=60)

    monkeypatch.setattr(processes._Children, "check", waiting)


def ended(started: list[Any]) -> bool:
    return all(process.poll() is not None for process in started)


@pytest.mark.parametrize("children", [1, 3])
def test_parts_come_in_order_and_children_make_some(children: int, given: list[int], started: list[Any]) -> None:
    assert list(in_order(squares, (7,), range(COUNT), children=children)) == [n * n + 7 for n in range(COUNT)]
    assert given.count(0) == len(started) == children  # the check
    assert len(given) > children and len(set(given)) == len(given) - children + 1
    assert ended(started)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_orders(count: int) -> None:
    assert list(in_order(squares, (0,), range(count), children=2)) == [n * n for n in range(count)]


def test_what_a_child_prints_is_no_answer(given: list[int]) -> None:
    assert list(in_order(talking, ("hello\n",), range(COUNT), children=1)) == list(range(COUNT))
    assert len(given) > 5


def test_a_child_that_answers_otherwise_is_not_used(given: list[int]) -> None:
    assert list(in_order(numbered, (1,), range(COUNT), children=2)) == [(n + 1, os.getpid()) for n in range(COUNT)]
    assert given == [0, 0]


def test_a_child_that_ends_costs_nothing(given: list[int], started: list[Any]) -> None:
    assert list(in_order(dying, (os.getpid(),), range(COUNT), children=2)) == [-n for n in range(COUNT)]
    assert any(order >= 4 for order in given) and 3 in [process.poll() for process in started]


def test_a_child_that_cannot_be_started_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/nowhere/python")
    assert list(in_order(squares, (0,), range(COUNT), children=2)) == [n * n for n in range(COUNT)]


@pytest.mark.parametrize("limit", [0, 1, COUNT - 1])
def test_errors_are_those_of_one_process_and_come_in_their_place(limit: int, started: list[Any]) -> None:
    found: list[int] = []
    with pytest.raises(LookupError, match=f"no {limit}"):
        found.extend(in_order(refusing, (limit,), range(COUNT), children=2))
    assert len(found) <= limit
    made = in_order(refusing, (limit,), range(COUNT), children=2)
    assert [next(made) for _ in range(limit)] == list(range(limit))
    with pytest.raises(LookupError):
        next(made)
    assert ended(started)


def test_no_child_is_left_when_no_more_parts_are_wanted(started: list[Any]) -> None:
    parts: Any = in_order(squares, (0,), range(10**9), children=2)
    assert [next(parts) for _ in range(3)] == [0, 1, 4]
    parts.close()
    assert len(started) == 2 and ended(started)


def test_few_parts_are_ahead_of_their_turn() -> None:
    """Orders are taken as they are needed: what is held does not grow with their number."""
    taken = 0

    def orders() -> Iterator[int]:
        nonlocal taken
        for number in range(10**9):
            taken += 1
            yield number

    parts: Any = in_order(squares, (0,), orders(), children=2)
    for number in range(200):
        assert next(parts) == number * number
        assert taken <= number + 1 + 2 * 2 * processes._ORDERS_EACH
    parts.close()


def test_no_children_where_what_to_do_cannot_be_sent(started: list[Any]) -> None:
    class Local(int):
        pass

    assert list(in_order(squares, (Local(2),), range(3), children=2)) == [2, 3, 6]
    assert not started


def test_how_many_children_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_cores", lambda: 4)
    assert [children_for(amount, 100) for amount in (0, 99, 100, 250, 10_000)] == [0, 0, 1, 2, 3]
    monkeypatch.setattr(processes, "_cores", lambda: 64)
    assert children_for(10_000, 100) == 7
    monkeypatch.setattr(processes, "_cores", lambda: 1)
    assert children_for(10_000, 100) == 0
    monkeypatch.setattr(processes, "_cores", lambda: 4)
    monkeypatch.setattr(processes.sys, "executable", "")
    assert children_for(10_000, 100) == 0
