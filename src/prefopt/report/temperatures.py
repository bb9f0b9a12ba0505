"""The figure of a temperature sweep: win rate at each sampling temperature, one colour a policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prefopt.core.errors import ConfigError
from prefopt.report.drawing import CHOSEN, MARGIN, MUTED, REFERENCE, REJECTED, save

_COLOURS = (CHOSEN, REJECTED, MARGIN, REFERENCE)
_FORMATS = (".svg", ".png", ".pdf")


def check_figure_name(path: Path) -> None:
    """ConfigError unless `path` ends in a format that figures are written in."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{path}: is no name for a figure", todo=f"Let it end in {', '.join(_FORMATS)}.")


def save_temperature_figure(path: Path, sweep: Mapping[str, Any]) -> None:
    """Draw the "temperatures" section of an evaluation to `path`: win rates with their 95 % intervals."""

    def plot(axes: Axes) -> None:
        for at, (policy, points) in enumerate(sweep["policies"].items()):
            colour = _COLOURS[at % len(_COLOURS)]
            temperature = [point["temperature"] for point in points]
            value, low, high = ([point["win_rate"]["rate"][key] for point in points] for key in ("value", "low", "high"))
            style = "-" if at < len(_COLOURS) else "--"
            axes.plot(temperature, value, color=colour, linestyle=style, marker="o", markersize=4, label=Path(policy).name)
            axes.fill_between(temperature, low, high, color=colour, alpha=0.15, linewidth=0)
            if len(points) == 1:
                axes.vlines(temperature, low, high, color=colour, linewidth=2, alpha=0.5)
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=":", label="as good as the opponent")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("sampling temperature of the policy")
        axes.set_ylabel(f"win rate by {sweep['reward']}")

    save(path, plot)
