"""The figures of a run: training, held-out evaluation, samples, data. Those without numbers are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prefopt.core.events import Event
from prefopt.core.losses.table import parts_of_section
from prefopt.report.drawing import (
    CHOSEN,
    INK,
    MARGIN,
    MUTED,
    REFERENCE,
    REJECTED,
    Figure,
    draw,
    line,
    numbers,
    points,
    steps_axis,
    thin,
)
from prefopt.report.history import History, number, part, perplexity
from prefopt.report.known import known_start
from prefopt.report.rounds import round_figures
from prefopt.report.wording import Wording, wording

_UNEQUAL = 20.0  # parts of a mix that differ by more than this factor are drawn on a logarithmic axis


def run_figures(
    events: Sequence[Event],
    config: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    audit: Mapping[str, Any] | None = None,
) -> list[Figure]:
    """Figures of training and evaluation, those without numbers left out."""
    history, said = History(events), wording(config, audit)
    drawn = [
        *round_figures(history),
        _loss(history, config, said),
        _parts(history, config),
        _accuracy(history, said),
        _rewards(history, said),
        _margins(history, said),
        *_log_probs(history, said),
        *_statistics(history),
        _kl(samples),
        _lengths(history, said),
        _single(history, "grad_norm", "Gradient norm", "global norm", "Before clipping.", limit=_clip(config)),
        _single(history, "lr", "Learning rate", "learning rate", "Warm-up and decay."),
    ]
    return [figure for figure in drawn if figure is not None]


def audit_figures(audit: Mapping[str, Any]) -> list[Figure]:
    """Histograms of token lengths in the data."""
    tokens = audit.get("tokens") or {}
    sides = [(("prompt", MUTED),), (("chosen", CHOSEN), ("rejected", REJECTED), ("response", CHOSEN))]
    titles = (("Prompt length", "rows"), ("Response length", "responses"))
    figures = []
    for (title, unit), group in zip(titles, sides, strict=True):
        kept = [
            (name, colour, tokens[name]["histogram"]) for name, colour in group if part(tokens, name, "histogram", "counts")
        ]
        if kept:
            figures.append(draw(f"tokens-{group[0][0]}", title, "", _token_histogram(kept, unit)))
    return figures


def _clip(config: Mapping[str, Any]) -> float | None:
    return number(part(config, "train", "max_grad_norm"))


def _loss(history: History, config: Mapping[str, Any], said: Wording) -> Figure | None:
    if not history.series("loss")[0] and not history.series("eval/loss")[0]:
        return None
    start = known_start(history, config, said)

    def plot(axes: Axes) -> None:
        line(axes, *history.series("loss"), CHOSEN, "training")
        points(axes, history, "eval/loss", REJECTED, "held-out")
        if start is not None:
            name = "ln 2" if abs(start - np.log(2)) < 1e-9 else f"{start:.3g}"
            where = "all scores 0" if said.reward_model else "policy = reference"
            axes.axhline(start, color=MUTED, linewidth=1.2, linestyle=":", label=f"{name}: {where}")
        if said.imitates:
            second = axes.secondary_yaxis("right")
            second.yaxis.set_major_formatter(lambda loss, place: f"{perplexity(loss):.3g}")
            second.set_ylabel("perplexity")
        steps_axis(axes, "loss (nats per token)" if said.imitates else "loss")

    about = "Bold lines are moving averages over a twenty-fifth of the steps."
    if said.moving_reference:
        about += " The reference follows the policy: the loss rises where it is moved."
    return draw("loss", "Loss", about, plot)


def _parts(history: History, config: Mapping[str, Any]) -> Figure | None:
    """The losses of a mix, each without its weight."""
    parts = [one for one in parts_of_section(part(config, "loss")) if history.series(f"loss/{one.name}")[0]]
    if not parts:
        return None
    colours = [(CHOSEN, MARGIN, REJECTED, REFERENCE)[number % 4] for number in range(len(parts))]

    def plot(axes: Axes) -> None:
        seen = []
        for one, colour in zip(parts, colours, strict=True):
            line(axes, *history.series(f"loss/{one.name}"), colour, f"{one.weight:g} × {one.name}")
            x, y = history.series(f"eval/loss/{one.name}")
            axes.plot(x, y, color=colour, marker="o", markersize=3.5, linestyle=(0, (4, 2)), linewidth=1.1)
            seen += history.series(f"loss/{one.name}")[1] + y
        if min(seen) > 0 and max(seen) > _UNEQUAL * min(seen):
            axes.set_yscale("log")
        steps_axis(axes, "loss of each part")

    return draw("parts", "Parts of the loss", "Before they are weighted and added up; dashed where held out.", plot)


def _accuracy(history: History, said: Wording) -> Figure | None:
    if not history.series("rewards/accuracies")[0] and not history.series("eval/rewards/accuracies")[0]:
        return None

    def plot(axes: Axes) -> None:
        line(axes, *history.series("rewards/accuracies"), CHOSEN, "training")
        points(axes, history, "eval/rewards/accuracies", REJECTED, "held-out, 95 %")
        x, low = history.series("eval/rewards/accuracies_low")
        x_high, high = history.series("eval/rewards/accuracies_high")
        if x and x == x_high:
            axes.fill_between(x, low, high, color=REJECTED, alpha=0.2, linewidth=0)
            if len(x) == 1:
                axes.vlines(x, low, high, color=REJECTED, linewidth=2, alpha=0.5)
        points(axes, history, "eval/logps/accuracies", REFERENCE, "by log-prob")
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=":", label="chance")
        axes.set_ylim(0, 1.02)
        if not said.is_area:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        steps_axis(axes, said.words.axis)

    about = said.words.about.format(reward=said.reward)
    if history.series("eval/logps/accuracies")[0]:
        about += " By log-prob: the same of the policy's log-probs alone, on held-out rows."
    return draw("accuracy", "Ranking" if said.is_area else "Accuracy", about, plot)


def _rewards(history: History, said: Wording) -> Figure | None:
    if not history.series("rewards/margins")[0] and not history.series("rewards/chosen")[0]:
        return None
    words = said.words

    def plot(axes: Axes) -> None:
        for key, colour, label in (
            ("chosen", CHOSEN, words.good),
            ("rejected", REJECTED, words.other),
            ("margins", MARGIN, "margin"),
        ):
            line(axes, *history.series(f"rewards/{key}"), colour, label)
        points(axes, history, "eval/rewards/margins", MARGIN, "held-out margin")
        axes.axhline(0, color=MUTED, linewidth=0.6)
        steps_axis(axes, said.reward)

    about = f"{said.reward_about[0].upper()}{said.reward_about[1:]}; the margin is {words.difference}."
    return draw("rewards", "Scores" if said.reward_model else "Implicit rewards", about, plot)


def _log_probs(history: History, said: Wording) -> list[Figure]:
    """Drift since the start, and log-probs themselves."""
    both = bool(history.series("logps/rejected")[0])
    sides = "each side" if both else "the responses"
    falling = "; both falling is usual for preference losses" if both else ""
    drift = history.series("drift/chosen")[0]
    until = f" Until step {drift[-1]:.0f}, when the reference moved." if drift and drift[-1] < history.steps[-1]["step"] else ""
    about = {
        "drift": ("Drift from the start", f"Change of the log-prob of {sides} since the start{falling}.{until}"),
        "logps": ("Log-probs", "Log-prob of whole responses under the policy, summed over tokens."),
    }
    return [
        _two_sides(history, said, prefix, title, caption, "nats per response")
        for prefix, (title, caption) in about.items()
        if history.series(f"{prefix}/chosen")[0]
    ]


def _lengths(history: History, said: Wording) -> Figure | None:
    if not history.series("lengths/chosen")[0] and not history.series("lengths/rejected")[0]:
        return None
    about = "Mean scored tokens of the responses of each step."
    return _two_sides(history, said, "lengths", "Lengths in training", about, "tokens per response")


def _two_sides(history: History, said: Wording, prefix: str, title: str, caption: str, ylabel: str) -> Figure:
    def plot(axes: Axes) -> None:
        for side, colour, label in (("chosen", CHOSEN, said.words.good), ("rejected", REJECTED, said.words.other)):
            line(axes, *history.series(f"{prefix}/{side}"), colour, label)
        if prefix == "drift":
            axes.axhline(0, color=MUTED, linewidth=0.6)
        steps_axis(axes, ylabel)

    return draw(prefix, title, caption, plot)


_STATISTICS = {
    "kl": (
        "KL under other prompts",
        "nats",
        "Mean log-ratio of the responses under prompts that they do not belong to, at least 0: from it a gain or loss counts.",
    ),
    "reward_mean": (
        "Running mean of rewards",
        "implicit reward",
        "Over all responses so far: what a reward is compared with.",
    ),
    "margin_mean": (
        "Running mean of margins",
        "nats",
        "Of the log-ratio difference, over steps: beta is larger where a step is above it.",
    ),
}


def _statistics(history: History) -> list[Figure]:
    """Numbers of a step as a whole that some losses are made with."""
    return [
        figure
        for key, (title, ylabel, caption) in _STATISTICS.items()
        if (figure := _single(history, key, title, ylabel, caption, from_zero=key == "kl", name=f"statistic-{key}"))
    ]


def _margins(history: History, said: Wording) -> Figure | None:
    rows = [(int(event["step"]), numbers(event.get("margins"))) for event in history.evals]
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
        started = f"step {first_step}: all at {float(np.mean(first)):.2g}" if len(rows) > 1 and started_equal else None
        axes.axvline(0, color=INK, linewidth=0.9, label=started)
        axes.set_xlabel(f"{said.reward} margin, {said.words.difference}")
        axes.set_ylabel(f"held-out {said.words.row}s")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    return draw("margins", "Held-out margins", said.words.ahead, plot)


def _counts(values: Sequence[float], edges: Any) -> Any:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _kl(samples: Sequence[Mapping[str, Any]]) -> Figure | None:
    values = numbers([sample.get("kl") for sample in samples])
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

    return draw(
        "kl", "KL per response", f"Of the {len(values)} samples kept. One may be below 0; their mean estimates the KL.", plot
    )


def _single(
    history: History,
    key: str,
    title: str,
    ylabel: str,
    caption: str,
    *,
    limit: float | None = None,
    from_zero: bool = True,
    name: str = "",
) -> Figure | None:
    x, y = history.series(key)
    if not x:
        return None

    def plot(axes: Axes) -> None:
        if key == "lr":
            axes.plot(*thin(x, y), color=CHOSEN, marker="o" if len(x) == 1 else "", markersize=4)
        else:
            line(axes, x, y, CHOSEN, "training" if history.series(f"eval/{key}")[0] else title.lower())
        points(axes, history, f"eval/{key}", REJECTED, "held-out")
        if limit and limit <= 3 * max(y):
            axes.axhline(limit, color=MUTED, linewidth=1.2, linestyle=":", label=f"clipped above {limit:g}")
        if from_zero:
            axes.set_ylim(bottom=0)
        steps_axis(axes, ylabel)

    return draw(name or key.replace("_", "-"), title, caption, plot)


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
