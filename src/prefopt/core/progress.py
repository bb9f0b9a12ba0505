"""Progress of anything longer than two seconds: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_QUIET = False
_SECONDS_BETWEEN_LINES = 10.0


def set_quiet(quiet: bool) -> None:
    """Say nothing but errors from now on (`--json`, the Python API's `quiet=True`)."""
    global _QUIET
    _QUIET = quiet


def say(line: str) -> None:
    """One line for the user on standard error, so that results on standard output stay clean."""
    if not _QUIET:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


@dataclass
class Progress:
    """Counts units of work; `advance` reports throughput and time left at most every few seconds."""

    title: str
    total: float
    unit: str
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)
    bar: object | None = None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is shown behind the figures."""
        self.done += amount
        if _QUIET:
            return
        if self.bar is not None:
            self.bar.update(0, completed=self.done, note=note, rate=self._rate())  # type: ignore[attr-defined]
        elif time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = (self.total - self.done) * (self.last_line - self.started) / max(self.done, 1e-9)
            say(
                f"{self.title}: {self.done:.0f}/{self.total:.0f} {self.unit}, {self._rate()}, {left:.0f} s left {note}".rstrip()
            )

    def _rate(self) -> str:
        return f"{self.done / max(time.monotonic() - self.started, 1e-9):.3g} {self.unit}/s"


@contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Progress]:
    """A Progress for the block; on a terminal it draws a bar, elsewhere it prints a line every ten seconds."""
    if _QUIET or not sys.stderr.isatty():
        yield Progress(title, total, unit)
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(title, total=total, note="", rate="")
        yield Progress(title, total, unit, bar=bar)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is reported within the block: for work inside another progress."""
    before = _QUIET
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)
