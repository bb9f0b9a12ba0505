"""Canvas and strokes of figures: inline SVG, coloured by the page's style sheet, so that it suits light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, MaxNLocator

from prefopt.core.files import whole_file
from prefopt.report.history import History, number

# Okabe and Ito's palette, told apart by all common kinds of colour vision. The page replaces each colour by a variable.
CHOSEN, REJECTED, MARGIN, REFERENCE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
INK, MUTED, GRID = "#1b1f24", "#6a737d", "#e3e6ea"
_VARIABLES = {
    CHOSEN: "chosen",
    REJECTED: "rejected",
    MARGIN: "margin",
    REFERENCE: "reference",
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
}
_MOST_POINTS = 400  # about one a pixel of the drawn width; keeps long runs small
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn figure: its id in the page, title, caption, and SVG markup."""

    id: str
    title: str
    caption: str
    svg: str


def draw(name: str, title: str, caption: str, plot: Callable[[Axes], None]) -> Figure:
    """The figure `name`, drawn by `plot` on axes of its own; a legend where it labels two things or more."""
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(5.4, 2.75), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        plot(axes)
        _legend(axes)
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return Figure(name, title, caption, _inline(file.getvalue(), name, title))


def save(path: Path, plot: Callable[[Axes], None], *, size: tuple[float, float] = (5.4, 3.2)) -> None:
    """A figure of its own in the file `path`, whole or not at all: .svg, .png or .pdf, on white, `size` in inches."""
    with rc_context({**_STYLE, "svg.hashsalt": path.name}), whole_file(path) as partial:
        canvas = Canvas(figsize=size, layout="constrained", facecolor="white")
        plot(axes := canvas.add_subplot())
        _legend(axes)
        dated = {"Date": None} if path.suffix == ".svg" else {}
        canvas.savefig(partial, format=path.suffix[1:], dpi=200, metadata=dated)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=4,
            borderaxespad=0.2,
            handlelength=1.6,
            columnspacing=1.4,
        )


def _inline(svg: str, name: str, title: str) -> str:
    """The bare `<svg>` element: no prologue, ids of its own, scalable, coloured by the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()


def line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    """A moving average over the raw values, both thinned to what can be seen."""
    if not x:
        return
    values = np.asarray(y, dtype=float)
    width = max(1, len(values) // 25)
    if width > 1:
        axes.plot(*thin(x, values), color=colour, alpha=0.25, linewidth=0.8)
        total = np.concatenate([[0.0], np.cumsum(values)])
        end = np.arange(1, len(values) + 1)
        start = np.maximum(0, end - width)
        values = (total[end] - total[start]) / (end - start)
    axes.plot(*thin(x, values), color=colour, label=label, marker="o" if len(values) == 1 else "", markersize=4)


def thin(x: Sequence[float], y: Any) -> tuple[Any, Any]:
    """About as many points as can be told apart, the last one among them."""
    every = max(1, -(-len(x) // _MOST_POINTS))
    kept = np.unique(np.append(np.arange(0, len(x), every), len(x) - 1))
    return np.asarray(x)[kept], np.asarray(y)[kept]


def points(axes: Axes, history: History, key: str, colour: str, label: str) -> None:
    """The values of a held-out metric, one mark an evaluation."""
    x, y = history.series(key)
    if x:
        axes.plot(x, y, color=colour, marker="o", markersize=3.5, linestyle=(0, (4, 2)), linewidth=1.1, label=label)


def steps_axis(axes: Axes, ylabel: str) -> None:
    """Whole optimizer steps below, `ylabel` at the side."""
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    low, high = axes.get_xlim()
    if high - low < 2:  # hardly any steps: whole numbers only, and room beside the points
        seen = range(math.ceil(low), math.floor(high) + 1)
        axes.set_xlim(seen[0] - 0.5, seen[-1] + 0.5)
        axes.xaxis.set_major_locator(FixedLocator(list(seen)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))


def numbers(values: object) -> list[float]:
    return [found for value in values if (found := number(value)) is not None] if isinstance(values, list) else []
