"""The reward-KL frontier: points of many runs, which of them no other point beats, and the table of it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from prefopt.evaluate.intervals import Interval

Status = Literal["front", "unclear", "beaten"]
BUDGETS = (1.0, 2.0, 5.0, 10.0, 20.0)  # nats a response
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Point:
    """A policy's mean reward against its KL from the reference, in nats a response, both with 95 % intervals.

    `step`: of a checkpoint; `n`: of best-of-n, whose KL is an upper bound. `more`: other facts, for the table.
    """

    method: str
    reward: Interval
    kl: Interval
    beta: float | None = None
    seed: int | None = None
    step: int | None = None
    n: int | None = None
    kl_is_bound: bool = False
    run: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


def exactly(value: float, n: int = 1) -> Interval:
    """An interval without width: a value that is known."""
    return {"value": value, "low": value, "high": value, "n": n}


def front_status(points: Sequence[Point]) -> list[Status]:
    """For each point: front, where no other has at least its reward at no more KL (and is not the same in both); beaten,
    where some other is clearly better in both, with intervals that do not meet; else unclear.

    Front points are those of the estimates, so chance has a part in which they are. Intervals that do not meet are a
    cautious test: points are measured on the same prompts, which their difference would profit from.
    """
    front = _front(points)
    statuses: list[Status] = []
    for at, point in enumerate(points):
        beaten = any(other.reward["low"] > point.reward["high"] and other.kl["high"] < point.kl["low"] for other in points)
        statuses.append("front" if at in front else "beaten" if beaten else "unclear")
    return statuses


def _front(points: Sequence[Point]) -> set[int]:
    """Places of the points on the Pareto front: in order of KL, each with more reward than all before it."""
    values = [(at_least_zero(point), point.reward["value"]) for point in points]
    kept: set[int] = set()
    best, at_kl = -math.inf, -math.inf
    for at in sorted(range(len(points)), key=lambda at: (values[at][0], -values[at][1])):
        kl, reward = values[at]
        if reward > best or (reward == best and kl == at_kl):
            kept.add(at)
            best, at_kl = reward, kl
    return kept


def at_least_zero(point: Point) -> float:
    """The KL of a point; an estimate below 0, where no KL is, counts as 0."""
    return max(0.0, point.kl["value"])


def best_within(points: Sequence[Point], budgets: Sequence[float] = BUDGETS) -> list[dict[str, Any]]:
    """For each budget of nats the place in `points` of each method's highest reward with at most that KL.

    Highest of several estimates: somewhat too high by selection, the more so the more points a method has.
    """
    found = []
    for budget in budgets:
        best: dict[str, int] = {}
        for at, point in enumerate(points):
            leader = best.get(point.method)
            ahead = leader is None or point.reward["value"] > points[leader].reward["value"]
            if point.kl["value"] <= budget and ahead:
                best[point.method] = at
        found.append({"kl": budget, "best": best})
    return found


def over_seeds(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each method, beta and step that has several."""
    groups: dict[tuple[str, float | None, int | None], list[Point]] = {}
    for point in points:
        if point.seed is not None:
            groups.setdefault((point.method, point.beta, point.step), []).append(point)
    return [
        {
            "method": method,
            "beta": beta,
            "step": step,
            "seeds": len(members),
            "reward": _spread([point.reward["value"] for point in members]),
            "kl": _spread([point.kl["value"] for point in members]),
        }
        for (method, beta, step), members in groups.items()
        if len(members) > 1
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "standard_deviation": float(np.std(values, ddof=1))}


def frontier_json(points: Sequence[Point], **facts: Any) -> dict[str, Any]:
    """Contents of frontier.json: `facts`, every point with its status, the best of each method within a budget, seeds."""
    rows = [{**asdict(point), "status": status} for point, status in zip(points, front_status(points), strict=True)]
    return {**facts, "points": rows, "best_within": best_within(points), "over_seeds": over_seeds(points)}


def points_of(found: Mapping[str, Any]) -> list[Point]:
    """The points of a frontier.json."""
    return [Point(**{key: value for key, value in row.items() if key != "status"}) for row in found["points"]]


_COLUMNS = ("method", "beta", "seed", "step", "n")


def frontier_csv(points: Sequence[Point]) -> str:
    """The table, one line a point, in the order of KL."""
    more = list(dict.fromkeys(key for point in points for key in point.more))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    of_interval = [f"{name}{end}" for name in ("reward", "kl") for end in ("", "_low", "_high")]
    writer.writerow([*_COLUMNS, *of_interval, "kl_is_bound", "status", "prompts", *more, "run"])
    for point, status in _by_kl(points):
        numbers = [interval[key] for interval in (point.reward, point.kl) for key in ("value", "low", "high")]
        own = [getattr(point, name) for name in _COLUMNS]
        writer.writerow(
            [*own, *numbers, point.kl_is_bound, status, point.reward["n"], *(point.more.get(key) for key in more), point.run]
        )
    return file.getvalue()


def frontier_lines(points: Sequence[Point]) -> list[str]:
    """The table for people, in the order of KL; `*` marks the front, `-` what is clearly beaten."""
    marks = {"front": "*", "unclear": " ", "beaten": "-"}
    width = max([len(point.method) for point in points] + [6])
    lines = [f"  {'method':<{width}} {'beta':>7} {'seed':>4} {'step':>6} {'n':>4}  {'reward (95 %)':<27} KL in nats (95 %)"]
    for point, status in _by_kl(points):
        own = [_text(value) for value in (point.beta, point.seed, point.step, point.n)]
        kl = f"at most {point.kl['value']:.3f}" if point.kl_is_bound else _interval(point.kl)
        lines.append(
            f"{marks[status]} {point.method:<{width}} {own[0]:>7} {own[1]:>4} {own[2]:>6} {own[3]:>4}  {_interval(point.reward):<27} {kl}"
        )
    lines += ["", "* on the Pareto front   - another point is better in both, with intervals that do not meet"]
    if any(point.kl_is_bound for point in points):
        lines.append("at most: the bound log n - (n - 1) / n of best-of-n, which its KL may be far below (arXiv 2401.01879)")
    return lines


def _by_kl(points: Sequence[Point]) -> list[tuple[Point, Status]]:
    together = zip(points, front_status(points), strict=True)
    return sorted(together, key=lambda pair: (pair[0].kl["value"], -pair[0].reward["value"]))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _interval(value: Interval) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
