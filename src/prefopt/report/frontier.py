"""The figure of a reward-KL frontier: one colour and mark a method, 95 % intervals, the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from prefopt.report.drawing import CHOSEN, INK, MARGIN, MUTED, REFERENCE, REJECTED, save

# the rest of Okabe and Ito's palette, without its yellow, which white paper swallows
_COLOURS = (CHOSEN, REJECTED, MARGIN, REFERENCE, "#d55e00", "#56b4e9", "#7f6000", "#5e3c99")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
_USUAL = ("dpo", "ipo", "kto", "ppo", "ppo-gt", "sft", "unlikelihood", "best-of-n")  # alike in every figure
_MANY = 60  # points from which their intervals are drawn fainter


def save_frontier_figure(path: Path, found: Mapping[str, Any], *, sqrt_kl: bool = False) -> None:
    """Draw the contents of a frontier.json to `path` (.png, .svg or .pdf): reward against KL, or its square root."""
    points: Sequence[Mapping[str, Any]] = found["points"]

    def plot(axes: Axes) -> None:
        methods = [name for name in dict.fromkeys(point["method"] for point in points) if name != "reference"]
        for method, place in _places(methods).items():
            mine = [point for point in points if point["method"] == method]
            colour, mark = _COLOURS[place % 8], _MARKS[(place + place // 8) % 8]
            _draw_method(axes, mine, colour, mark, len(points) > _MANY, sqrt_kl)
        _draw_front(axes, points, sqrt_kl)
        for point in points:
            if point["method"] == "reference":
                _draw_reference(axes, point, sqrt_kl)
        axes.set_ylabel(f"mean reward ({found['evaluation']['reward']})")
        of_bound = " · open marks: upper bound" if any(point["kl_is_bound"] for point in points) else ""
        root = "√" if sqrt_kl else ""
        axes.set_xlabel(f"{root}KL(policy ‖ reference), {root}nats a response{of_bound}")
        axes.margins(x=0.03)

    save(path, plot, size=(6.4, 4.2))


def _places(methods: Sequence[str]) -> dict[str, int]:
    """The place of each method in the palette: the usual ones have their own, others take what is free."""
    own = {method: _USUAL.index(method) for method in methods if method in _USUAL}
    free = (place for place in itertools.count() if place not in own.values())
    return {method: own[method] if method in own else next(free) for method in methods}


def _draw_method(axes: Axes, points: Sequence[Mapping[str, Any]], colour: str, mark: str, many: bool, sqrt_kl: bool) -> None:
    """The points of a method with their intervals; a line joins the checkpoints of a run, and the n of best-of-n."""
    for run in dict.fromkeys(point["run"] for point in points):
        path = sorted((point for point in points if point["run"] == run), key=lambda point: point["step"] or point["n"] or 0)
        x, y = [_x(point["kl"]["value"], sqrt_kl) for point in path], [point["reward"]["value"] for point in path]
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.4, zorder=1)
    x, y = [_x(point["kl"]["value"], sqrt_kl) for point in points], [point["reward"]["value"] for point in points]
    axes.errorbar(
        x,
        y,
        xerr=_reach(points, "kl", x, sqrt_kl),
        yerr=_reach(points, "reward", y, False),
        fmt="none",
        ecolor=colour,
        elinewidth=0.8,
        alpha=0.25 if many else 0.45,
        zorder=2,
    )
    filled = "white" if points[0]["kl_is_bound"] else colour
    axes.plot(
        x, y, mark, color=colour, markerfacecolor=filled, markersize=3.8 if many else 5, label=points[0]["method"], zorder=3
    )


def _reach(points: Sequence[Mapping[str, Any]], key: str, values: Sequence[float], sqrt_kl: bool) -> list[list[float]]:
    """Lengths of the intervals below and above `values`."""
    low = [_x(point[key]["low"], sqrt_kl) if sqrt_kl else point[key]["low"] for point in points]
    high = [_x(point[key]["high"], sqrt_kl) if sqrt_kl else point[key]["high"] for point in points]
    below = [max(0.0, value - end) for value, end in zip(values, low, strict=True)]
    return [below, [max(0.0, end - value) for value, end in zip(values, high, strict=True)]]


def _draw_front(axes: Axes, points: Sequence[Mapping[str, Any]], sqrt_kl: bool) -> None:
    """The highest reward at no more KL: a staircase through the points that no other beats, on to the right edge."""
    front = sorted((max(0.0, point["kl"]["value"]), point["reward"]["value"]) for point in points if point["status"] == "front")
    farthest = max(point["kl"]["value"] for point in points)
    corners = [*front, (farthest, front[-1][1])]
    x, y = [_x(kl, sqrt_kl) for kl, _ in corners], [reward for _, reward in corners]
    axes.plot(x, y, drawstyle="steps-post", color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="Pareto front", zorder=1.5)


def _draw_reference(axes: Axes, point: Mapping[str, Any], sqrt_kl: bool) -> None:
    y = point["reward"]["value"]
    reach = [[y - point["reward"]["low"]], [point["reward"]["high"] - y]]
    axes.errorbar([_x(point["kl"]["value"], sqrt_kl)], [y], yerr=reach, fmt="none", ecolor=INK, elinewidth=0.8, alpha=0.6)
    axes.plot([_x(point["kl"]["value"], sqrt_kl)], [y], "*", color=INK, markersize=8, label="reference", zorder=4)
    axes.axhline(y, color=MUTED, linewidth=0.6, linestyle=":", zorder=0)


def _x(kl: float, sqrt_kl: bool) -> float:
    """A KL on the axis; an estimate of it may be below 0, where it has no root."""
    return math.sqrt(max(0.0, kl)) if sqrt_kl else kl
