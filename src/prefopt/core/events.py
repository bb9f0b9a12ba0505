"""Events of a run: one JSON object a line, appended as they happen, read back as the run's history."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.core.files import storage_errors

# kind "step": metrics of one optimizer step. "eval": metrics on held-out rows. "start", "resume", "checkpoint",
# "round": a round of the policy's own samples. "warning", "stop" (by the user), "error", "end": what happened, with the fields named where they are written.
Event = dict[str, Any]


class EventLog:
    """Appends events to `path`. Each is one line, flushed at once, so that a killed run keeps what it said."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, *, step: int, **fields: Any) -> Event:
        """Append one event and return it. Non-finite numbers are written as null."""
        event: Event = {"kind": kind, "step": step, "time": round(time.time(), 3), **_finite(fields)}
        with storage_errors(self.path.parent), open(self.path, "a", encoding="utf-8") as file:
            file.write(("" if _ends_a_line(self.path) else "\n") + json.dumps(event, ensure_ascii=False) + "\n")
        return event


def _ends_a_line(path: Path) -> bool:
    """False behind a line that a kill cut short: what is appended there would be lost with it."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _finite_value(value) for key, value in fields.items()}


def _finite_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return _finite(value)
    return [_finite_value(one) for one in value] if isinstance(value, list | tuple) else value


def read_events(path: Path) -> list[Event]:
    """The events of a run in order, without those that a resume took back.

    A line cut short by a kill is passed over. A run resumed from step k repeats its steps after k, so what was
    written about them before is dropped.
    """
    events: list[Event] = []
    for event in _lines(path):
        if event.get("kind") == "resume":
            events = [
                earlier for earlier in events if earlier["step"] <= event["step"] and earlier["kind"] not in ("end", "stop")
            ]
        events.append(event)
    return events


def _lines(path: Path) -> Iterator[Event]:
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict) and "kind" in event and "step" in event:
                yield event
