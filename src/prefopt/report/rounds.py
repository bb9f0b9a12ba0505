"""Figures of a run that learned from its own samples: reward and KL of each round, and one against the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from prefopt.core.events import Event
from prefopt.report.drawing import CHOSEN, MARGIN, MUTED, REJECTED, Figure, draw, line, steps_axis
from prefopt.report.history import History, number

_SPREAD = (
    "Samples are drawn by the policy as it is at the beginning of a round; the band is one standard deviation of their rewards."
)


def round_figures(history: History) -> list[Figure]:
    """Figures of the rounds; none of a run that has no rounds."""
    rounds = [event for event in history.of_kind("round") if number(event.get("objective/scores")) is not None]
    if not rounds:
        return []
    drawn = [_reward(rounds), _price(rounds), _against(rounds), _lengths(rounds), _clipping(history), _value(history)]
    return [figure for figure in drawn if figure is not None]


def _column(rounds: Sequence[Event], key: str) -> list[float]:
    return [value if (value := number(event.get(key))) is not None else float("nan") for event in rounds]


def _round_axis(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel("round")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _numbers(rounds: Sequence[Event]) -> list[int]:
    return [int(event.get("round", place)) + 1 for place, event in enumerate(rounds)]


def _reward(rounds: Sequence[Event]) -> Figure:
    def plot(axes: Axes) -> None:
        x, y, spread = _numbers(rounds), np.array(_column(rounds, "objective/scores")), _column(rounds, "objective/scores_std")
        axes.fill_between(x, y - spread, y + spread, color=CHOSEN, alpha=0.15, linewidth=0)
        axes.plot(x, y, color=CHOSEN, marker="o", markersize=3.5)
        _round_axis(axes, "mean reward of the samples")

    return draw("round-reward", "Reward of each round", _SPREAD, plot)


def _price(rounds: Sequence[Event]) -> Figure:
    def plot(axes: Axes) -> None:
        axes.plot(_numbers(rounds), _column(rounds, "objective/kl"), color=MARGIN, marker="o", markersize=3.5)
        _round_axis(axes, "nats a response")

    return draw("round-kl", "KL(policy || reference)", "By the samples of each round.", plot)


def _against(rounds: Sequence[Event]) -> Figure | None:
    if len(rounds) < 2:
        return None

    def plot(axes: Axes) -> None:
        x, y = _column(rounds, "objective/kl"), _column(rounds, "objective/scores")
        axes.plot(x, y, color=MUTED, linewidth=0.9)
        axes.scatter(x, y, color=CHOSEN, s=14, zorder=3)
        for place in {0, len(rounds) - 1}:
            axes.annotate(f"round {_numbers(rounds)[place]}", (x[place], y[place]), textcoords="offset points", xytext=(5, -10))
        axes.set_xlabel("KL(policy || reference), nats a response")
        axes.set_ylabel("mean reward")

    return draw("round-frontier", "Reward against KL", "What was paid in KL for what was gained, round by round.", plot)


def _lengths(rounds: Sequence[Event]) -> Figure | None:
    if np.isnan(_column(rounds, "objective/length")).all():
        return None

    def plot(axes: Axes) -> None:
        axes.plot(
            _numbers(rounds), _column(rounds, "objective/length"), color=CHOSEN, marker="o", markersize=3.5, label="tokens"
        )
        _round_axis(axes, "tokens a response")
        second = axes.twinx()
        second.grid(False)
        second.plot(_numbers(rounds), _column(rounds, "objective/entropy"), color=REJECTED, linewidth=1.2)
        second.set_ylabel("−log policy, nats a response", color=REJECTED)

    caption = "Blue: length of the samples; orange: how unlikely they are under the policy, an estimate of its entropy."
    return draw("round-length", "Length and entropy", caption, plot)


def _clipping(history: History) -> Figure | None:
    if not history.series("policy/clipfrac_avg")[0]:
        return None

    def plot(axes: Axes) -> None:
        line(axes, *history.series("policy/clipfrac_avg"), CHOSEN, "clipped share")
        line(axes, *history.series("policy/approxkl_avg"), REJECTED, "KL(old || policy), nats")
        steps_axis(axes, "")

    caption = "How far the policy moves within a round: the share of ratios beyond the clip, and the KL to the policy that drew the samples."
    return draw("round-clip", "Movement within a round", caption, plot)


def _value(history: History) -> Figure | None:
    if not history.series("loss/value_avg")[0]:
        return None

    def plot(axes: Axes) -> None:
        line(axes, *history.series("loss/value_avg"), MARGIN, "value loss")
        steps_axis(axes, "half the squared error")

    return draw("round-value", "Value head", "Its loss: how well the reward to come is foreseen.", plot)
