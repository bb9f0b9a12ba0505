"""What the events of a run say: its series of numbers, its state, and the notation that every report shares."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefopt.core.events import Event

StateName = Literal["finished", "interrupted", "failed", "running"]
Row = dict[str, Any]
Maybe = Mapping[str, Any] | None
Interval = tuple[float, float, float, int]  # value, low, high, n

_TAIL_SHARE = 0.1  # a single step sees a few groups only; the last tenth of a run is its end
_TAIL_MOST_STEPS = 50
_QUIET_SECONDS = 900.0  # longer than any step or evaluation usually takes


@dataclass(frozen=True)
class State:
    """How a run stands: its name, the last step, the steps planned (0 where unknown), and one sentence."""

    name: StateName
    step: int
    total_steps: int
    text: str


@dataclass(frozen=True)
class History:
    """Events of a run, split by kind. Missing and null metrics are passed over everywhere."""

    events: Sequence[Event]
    steps: list[Event] = field(init=False)
    evals: list[Event] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.of_kind("step"))
        object.__setattr__(self, "evals", self.of_kind("eval"))

    def of_kind(self, kind: str) -> list[Event]:
        """Events of one kind, in order."""
        return [event for event in self.events if event.get("kind") == kind]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric; keys that begin with `eval/` come from held-out evaluations."""
        pairs = [(event, number(event.get(key))) for event in (self.evals if key.startswith("eval/") else self.steps)]
        kept = [(float(event["step"]), value) for event, value in pairs if value is not None]
        return [x for x, _ in kept], [y for _, y in kept]

    def first(self, key: str) -> float | None:
        """First finite value of a metric."""
        return next(iter(self.series(key)[1]), None)

    def last(self, key: str) -> float | None:
        """Last finite value of a metric."""
        return next(reversed(self.series(key)[1]), None)

    def final(self, key: str) -> float | None:
        """The metric at the end: the mean over the last tenth of the steps (at most 50); of `eval/` keys the last value."""
        values = self.series(key)[1]
        if not values or key.startswith("eval/"):
            return values[-1] if values else None
        tail = values[-self.tail_steps(len(values)) :]
        return sum(tail) / len(tail)

    @staticmethod
    def tail_steps(count: int) -> int:
        """How many of `count` steps `final` averages."""
        return min(_TAIL_MOST_STEPS, max(1, math.ceil(count * _TAIL_SHARE)))

    def at_start(self, key: str) -> float | None:
        """An `eval/` metric before the first step; None where the run was not evaluated then."""
        steps, values = self.series(key)
        return values[0] if steps and steps[0] == 0 else None

    def change(self, key: str) -> float | None:
        """Last minus first value of an `eval/` metric, which sees the same rows each time; None with fewer than two."""
        values = self.series(key)[1]
        return values[-1] - values[0] if len(values) > 1 else None

    def heldout_accuracy(self) -> Interval | None:
        """Accuracy of the last held-out evaluation after a step, with its 95 % interval.

        Before the first step the policy is its reference and every pair a tie: that says nothing about training.
        """
        for event in reversed([event for event in self.evals if event["step"] > 0]):
            parts = [number(event.get(f"eval/rewards/accuracies{end}")) for end in ("", "_low", "_high")]
            if parts[0] is not None:
                low, high = (value if part is None else part for part, value in zip(parts[1:], (0.0, 1.0), strict=True))
                return parts[0], low, high, int(number(event.get("eval/groups")) or 0)
        return None

    def state(self, now: float | None = None) -> State:
        """How the run stands; `now` is the time in seconds since 1970 (default: the clock)."""
        step = max((int(event["step"]) for event in self.events), default=0)
        planned = [int(value) for event in self.events if (value := number(event.get("total_steps"))) is not None]
        total = planned[-1] if planned else 0
        of = f" of {total}" if total else ""
        name, said = self._last_word()
        if name == "finished":
            return State(name, step, total, f"Finished after {plural(step, 'step')}.")
        if name == "interrupted":
            return State(name, step, total, f"Interrupted at step {step}{of}{said}.")
        if name == "failed":
            return State(name, step, total, f"Failed at step {step}{of}{said}")
        times = [value for event in self.events if (value := number(event.get("time"))) is not None]
        quiet = (time.time() if now is None else now) - times[-1] if times else 0.0
        text = f"Still running: step {step}{of}."
        if quiet > _QUIET_SECONDS:
            text += f" Nothing was written for {duration(quiet)}: if no process works on it any more, it was killed."
        return State(name, step, total, text)

    def _last_word(self) -> tuple[StateName, str]:
        name: StateName = "running"
        said = ""
        for event in self.events:
            kind = event.get("kind")
            if kind in ("start", "resume", "step"):
                name, said = "running", ""
            elif kind == "stop":
                name, said = "interrupted", f": {event['reason']}".rstrip(".") if event.get("reason") else ""
            elif kind == "error":
                name, said = "failed", f": {event.get('message', 'no message')}"
            elif kind == "end" and name == "running":  # a stopped run may close with an end too
                name = "finished"
        return name, said


def number(value: object) -> float | None:
    """`value` as a finite float, or None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(value: object) -> Interval | None:
    """`{"value", "low", "high", "n"}` of evaluation.json as a tuple; None where it is absent or has no value."""
    if not isinstance(value, Mapping):
        return None
    parts = [number(value.get(key)) for key in ("value", "low", "high")]
    if parts[0] is None or parts[1] is None or parts[2] is None:
        return None
    return parts[0], parts[1], parts[2], int(number(value.get("n")) or 0)


def part(value: object, *keys: str) -> Any:
    """`value[k1][k2]...`, or None where any of them is absent."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def num(value: float, *, sign: bool = False) -> str:
    """Three significant digits, thousands grouped, a true minus; `sign` shows a plus too."""
    size = abs(value)
    if size < 100:
        size = float(f"{size:.2e}")  # 99.96 is 100, not 100.0
    if size and (size < 1e-3 or size >= 1e9):
        text = f"{size:.2e}"
    elif size >= 100:
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{max(0, 2 - math.floor(math.log10(size))) if size else 0}f}"
    shown_zero = not any(digit in "123456789" for digit in text)
    return ("−" if value < 0 and not shown_zero else "+" if sign and not shown_zero else "") + text


def percent(value: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * value:.1f} %"


def spread(value: Interval, *, sign: bool = False) -> str:
    """`low to high` of an interval."""
    return f"{num(value[1], sign=sign)} to {num(value[2], sign=sign)}"


def percent_spread(value: Interval) -> str:
    """`low to high` of an interval of shares, in percent."""
    return f"{100 * value[1]:.1f} to {100 * value[2]:.1f} %"


def duration(seconds: float) -> str:
    """Seconds in the largest two units that fit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; what no float holds is cut off."""
    return math.exp(min(loss, 700.0))
