"""Figures of a run as inline SVG: drawn once, coloured by the page's style sheet, so that they suit light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from prefopt.core.events import Event
from prefopt.report.history import History, number, part, start_loss

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


def run_figures(events: Sequence[Event], config: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures of training and evaluation, those without numbers left out."""
    history = History(events)
    drawn = [
        _loss(history, start_loss(config)),
        _accuracy(history),
        _rewards(history),
        _log_probs(
            history,
            "drift",
            "Drift from the start",
            "Change of the log-prob of each side since the start; both falling is usual for DPO.",
        ),
        _log_probs(history, "logps", "Log-probs", "Log-prob of whole responses under the policy, summed over tokens."),
        _margins(history),
        _kl(samples),
        _lengths(history),
        _single(
            history,
            "grad_norm",
            "Gradient norm",
            "global norm",
            "Before clipping.",
            limit=number(part(config, "train", "max_grad_norm")),
        ),
        _single(history, "lr", "Learning rate", "learning rate", "Warm-up and decay."),
    ]
    return [figure for figure in drawn if figure is not None]


def audit_figures(audit: Mapping[str, Any]) -> list[Figure]:
    """Histograms of token lengths in the data."""
    tokens = audit.get("tokens") or {}
    sides = [(("prompt", MUTED),), (("chosen", CHOSEN), ("rejected", REJECTED), ("response", CHOSEN))]
    titles = (("Prompt length", "rows"), ("Response length", "rows"))
    figures = []
    for (title, unit), group in zip(titles, sides, strict=True):
        kept = [
            (name, colour, tokens[name]["histogram"]) for name, colour in group if part(tokens, name, "histogram", "counts")
        ]
        if kept:
            figures.append(_draw(f"tokens-{group[0][0]}", title, "", _token_histogram(kept, unit)))
    return figures


def _draw(name: str, title: str, caption: str, plot: Callable[[Axes], None]) -> Figure:
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(5.4, 2.75), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        plot(axes)
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
        file = io.StringIO()
        canvas.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return Figure(name, title, caption, _inline(file.getvalue(), name, title))


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


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    """A moving average over the raw values, both thinned to what can be seen."""
    if not x:
        return
    values = np.asarray(y, dtype=float)
    width = max(1, len(values) // 25)
    if width > 1:
        axes.plot(*_thin(x, values), color=colour, alpha=0.25, linewidth=0.8)
        total = np.concatenate([[0.0], np.cumsum(values)])
        end = np.arange(1, len(values) + 1)
        start = np.maximum(0, end - width)
        values = (total[end] - total[start]) / (end - start)
    axes.plot(*_thin(x, values), color=colour, label=label, marker="o" if len(values) == 1 else "", markersize=4)


def _thin(x: Sequence[float], y: Any) -> tuple[Any, Any]:
    every = max(1, -(-len(x) // _MOST_POINTS))
    kept = np.unique(np.append(np.arange(0, len(x), every), len(x) - 1))
    return np.asarray(x)[kept], np.asarray(y)[kept]


def _points(axes: Axes, history: History, key: str, colour: str, label: str) -> None:
    x, y = history.series(key)
    if x:
        axes.plot(x, y, color=colour, marker="o", markersize=3.5, linestyle=(0, (4, 2)), linewidth=1.1, label=label)


def _steps_axis(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    low, high = axes.get_xlim()
    if high - low < 2:  # hardly any steps: whole numbers only, and room beside the points
        seen = range(math.ceil(low), math.floor(high) + 1)
        axes.set_xlim(seen[0] - 0.5, seen[-1] + 0.5)
        axes.xaxis.set_major_locator(FixedLocator(list(seen)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _loss(history: History, start: float | None) -> Figure | None:
    if not history.series("loss")[0] and not history.series("eval/loss")[0]:
        return None

    def plot(axes: Axes) -> None:
        _line(axes, *history.series("loss"), CHOSEN, "training")
        _points(axes, history, "eval/loss", REJECTED, "held-out")
        if start is not None:
            name = "ln 2" if abs(start - np.log(2)) < 1e-9 else f"{start:.3g}"
            axes.axhline(start, color=MUTED, linewidth=1.2, linestyle=":", label=f"{name}: policy = reference")
        _steps_axis(axes, "loss (nats)" if start is not None and start < 1 else "loss")

    return _draw("loss", "Loss", "Bold lines are moving averages over a twenty-fifth of the steps.", plot)


def _accuracy(history: History) -> Figure | None:
    if not history.series("rewards/accuracies")[0] and not history.series("eval/rewards/accuracies")[0]:
        return None

    def plot(axes: Axes) -> None:
        _line(axes, *history.series("rewards/accuracies"), CHOSEN, "training")
        _points(axes, history, "eval/rewards/accuracies", REJECTED, "held-out, 95 % interval")
        x, low = history.series("eval/rewards/accuracies_low")
        x_high, high = history.series("eval/rewards/accuracies_high")
        if x and x == x_high:
            axes.fill_between(x, low, high, color=REJECTED, alpha=0.2, linewidth=0)
            if len(x) == 1:
                axes.vlines(x, low, high, color=REJECTED, linewidth=2, alpha=0.5)
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=":", label="chance")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _steps_axis(axes, "pairs ranked as labelled")

    return _draw("accuracy", "Accuracy", "Share of pairs whose chosen response has the higher implicit reward.", plot)


def _rewards(history: History) -> Figure | None:
    if not history.series("rewards/margins")[0] and not history.series("rewards/chosen")[0]:
        return None

    def plot(axes: Axes) -> None:
        for key, colour, label in (
            ("chosen", CHOSEN, "chosen"),
            ("rejected", REJECTED, "rejected"),
            ("margins", MARGIN, "margin"),
        ):
            _line(axes, *history.series(f"rewards/{key}"), colour, label)
        axes.axhline(0, color=MUTED, linewidth=0.6)
        _steps_axis(axes, "implicit reward")

    return _draw(
        "rewards",
        "Implicit rewards",
        "beta times the log-ratio of policy to reference; the margin is chosen minus rejected.",
        plot,
    )


def _log_probs(history: History, prefix: str, title: str, caption: str) -> Figure | None:
    if not history.series(f"{prefix}/chosen")[0]:
        return None

    def plot(axes: Axes) -> None:
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            _line(axes, *history.series(f"{prefix}/{side}"), colour, side)
        if prefix == "drift":
            axes.axhline(0, color=MUTED, linewidth=0.6)
        _steps_axis(axes, "nats per response")

    return _draw(prefix, title, caption, plot)


def _margins(history: History) -> Figure | None:
    rows = [(int(event["step"]), _numbers(event.get("margins"))) for event in history.evals]
    rows = [(step, values) for step, values in rows if values]
    if not rows or not any(rows[-1][1]):  # before the first step every margin is 0
        return None
    (first_step, first), (last_step, last) = rows[0], rows[-1]

    def plot(axes: Axes) -> None:
        reach = np.quantile(np.abs(first + last), 0.995) or 1.0  # the few beyond are counted in the outer bins
        edges = np.linspace(-reach, reach, 41)
        # Before training every margin is 0: as a bar that would dwarf the rest, so it is said in words.
        started_equal = np.ptp(first) < edges[1] - edges[0]
        if len(rows) > 1 and not started_equal:
            axes.stairs(_counts(first, edges), edges, color=MUTED, linewidth=1.2, label=f"step {first_step}")
        axes.stairs(_counts(last, edges), edges, color=MARGIN, fill=True, alpha=0.6, label=f"step {last_step}")
        started = f"step {first_step}: all pairs at {float(np.mean(first)):.2g}" if len(rows) > 1 and started_equal else None
        axes.axvline(0, color=INK, linewidth=0.9, label=started)
        axes.set_xlabel("implicit reward margin, chosen minus rejected")
        axes.set_ylabel("held-out pairs")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _draw("margins", "Held-out margins", "Pairs right of 0 are ranked as labelled.", plot)


def _counts(values: Sequence[float], edges: Any) -> Any:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _numbers(values: object) -> list[float]:
    return [found for value in values if (found := number(value)) is not None] if isinstance(values, list) else []


def _kl(samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    values = _numbers([sample.get("kl") for sample in samples])
    if len(values) < 2:
        return None

    def plot(axes: Axes) -> None:
        axes.hist(values, bins=min(30, max(5, len(values) // 4)), color=CHOSEN, alpha=0.75)
        mean = float(np.mean(values))
        axes.axvline(mean, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            f" mean {mean:.3g}", (mean, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", annotation_clip=False
        )
        axes.set_xlabel("log policy − log reference of each sampled response (nats)")
        axes.set_ylabel("responses")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _draw(
        "kl", "KL per response", f"Of the {len(values)} samples kept. One may be below 0; their mean estimates the KL.", plot
    )


def _lengths(history: History) -> Figure | None:
    if not history.series("lengths/chosen")[0]:
        return None

    def plot(axes: Axes) -> None:
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            _line(axes, *history.series(f"lengths/{side}"), colour, side)
        _steps_axis(axes, "tokens per response")

    return _draw("lengths", "Lengths in training", "Mean scored tokens of the responses of each step.", plot)


def _single(history: History, key: str, title: str, ylabel: str, caption: str, *, limit: float | None = None) -> Figure | None:
    x, y = history.series(key)
    if not x:
        return None

    def plot(axes: Axes) -> None:
        if key == "lr":
            axes.plot(*_thin(x, y), color=CHOSEN, marker="o" if len(x) == 1 else "", markersize=4)
        else:
            _line(axes, x, y, CHOSEN, title.lower())
        if limit and limit <= 3 * max(y):
            axes.axhline(limit, color=MUTED, linewidth=1.2, linestyle=":", label=f"clipped above {limit:g}")
        axes.set_ylim(bottom=0)
        _steps_axis(axes, ylabel)

    return _draw(key.replace("_", "-"), title, caption, plot)


def _token_histogram(kept: Sequence[tuple[str, str, Mapping[str, Any]]], unit: str) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for name, colour, histogram in kept:
            fill = name in ("prompt", "response")
            alpha = 0.5 if fill else 1.0
            axes.stairs(
                histogram["counts"], histogram["edges"], color=colour, fill=fill, alpha=alpha, linewidth=1.5, label=name
            )
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)

    return plot
