"""Events are read back as the run's history, whatever a kill or a resume left in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.errors import StorageError
from prefopt.core.events import EventLog, read_events


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def steps(log: EventLog) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in read_events(log.path)]


def test_what_is_written_is_read(log: EventLog) -> None:
    written = [log.write("start", step=0, parameters=7, reference="é\u2028\n"), log.write("step", step=1, loss=0.25)]
    assert read_events(log.path) == written
    assert len(log.path.read_bytes().splitlines()) == 2


def test_a_run_without_events_has_no_history(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


def test_numbers_that_json_has_not_are_null(log: EventLog) -> None:
    log.write("step", step=1, loss=math.nan, grad_norm=math.inf, lr=1e-6)
    event = json.loads(log.path.read_text(), parse_constant=pytest.fail)
    assert event["loss"] is None and event["grad_norm"] is None and event["lr"] == 1e-6


def test_non_finite_numbers_in_a_list_are_null_too(log: EventLog) -> None:
    log.write("eval", step=1, margins=[1.0, math.nan, -math.inf])
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail)["margins"] == [1.0, None, None]


@given(st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_line_cut_by_a_kill_loses_only_itself(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    """Wherever the last line is cut, the events before it and those that a resumed run appends are all there."""
    log = EventLog(tmp_path_factory.mktemp("run") / "events.jsonl")
    for step in (1, 2, 3):
        log.write("step", step=step, about="größer")
    body = log.path.read_bytes()
    last = len(body.splitlines(keepends=True)[-1])
    log.path.write_bytes(body[: len(body) - (2 + round(share * (last - 2)))])
    assert steps(log) == [("step", 1), ("step", 2)]
    log.write("resume", step=2)
    log.write("step", step=3)
    assert steps(log) == [("step", 1), ("step", 2), ("resume", 2), ("step", 3)]


def test_lines_that_are_no_events_are_passed_over(log: EventLog) -> None:
    log.write("step", step=1)
    with open(log.path, "ab") as file:
        file.write(b'[1]\n3\n{"kind": "step"}\n\xff\xfe\n\n{"step": 4}\n')
    log.write("step", step=2)
    assert steps(log) == [("step", 1), ("step", 2)]


def test_a_resume_takes_back_the_steps_after_it_and_the_end(log: EventLog) -> None:
    log.write("start", step=0)
    for step in (1, 2, 3, 4):
        log.write("step", step=step, loss=1.0)
        if step == 2:
            log.write("checkpoint", step=2, path="step-2")
    log.write("stop", step=4, reason="Ctrl-C")
    log.write("end", step=4)
    log.write("resume", step=2)
    log.write("step", step=3, loss=2.0)
    assert steps(log) == [("start", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("resume", 2), ("step", 3)]
    assert read_events(log.path)[-1]["loss"] == 2.0
    log.write("resume", step=1)
    assert steps(log) == [("start", 0), ("step", 1), ("resume", 1)]


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        EventLog(tmp_path / "file" / "events.jsonl").write("step", step=1)
