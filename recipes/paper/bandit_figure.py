"""The figure of bandit.py."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"DPO": "#0072b2", "PPO": "#d55e00", "IPO": "#009e73"}  # told apart by the colour-blind too (Okabe and Ito)
GREY = "#777777"


def figure(result: dict[str, Any]) -> Figure:
    """Four panels of what `bandit.py` found."""
    whole = Figure(figsize=(11, 7.6), layout="constrained")
    (ends, doubt), (finite, without) = whole.subplots(2, 2)
    _ends(ends, result["one prompt, 8 responses"])
    _without_doubt(doubt, result["deterministic"])
    _finite(finite, result["finite"])
    _no_optimum(without, result["finite"])
    for axes in (ends, doubt, finite, without):
        axes.spines[["top", "right"]].set_visible(False)
    return whole


def _ends(axes: Axes, exact: dict[str, Any]) -> None:
    rewards = np.array(exact["rewards"][0])
    order = np.argsort(rewards)
    policies = {name: np.array(rows[0])[order] for name, rows in exact["policies"].items()}
    places = np.arange(len(order))
    axes.bar(places, policies["reference"], width=0.75, color="#dddddd", label="reference")
    axes.hlines(policies["RLHF, closed form"], places - 0.4, places + 0.4, color="black", label="reference exp(r / β) / Z")
    _marks(axes, places - 0.16, policies["PPO's objective"], "PPO", "s")
    _marks(axes, places + 0.16, policies["DPO"], "DPO", "o")
    lines = {"color": GREY, "label": "reference exp(P(win) / β) / Z"}
    axes.hlines(policies["IPO, closed form"], places - 0.4, places + 0.4, **lines)
    _marks(axes, places, policies["IPO"], "IPO", "^")
    axes.set_ylim(0, 1.3 * max(values.max() for values in policies.values()))  # room for the legend
    axes.set_xticks(places, [f"{value:.1f}" for value in rewards[order]])
    axes.set(xlabel="reward r of the response", ylabel="probability", title=f"Where each method ends (β = {exact['beta']:g})")
    axes.legend(frameon=False, fontsize=9)


def _marks(axes: Axes, places: Any, values: Any, name: str, marker: str) -> None:
    axes.plot(places, values, marker, color=COLOURS[name], markersize=6, label=name)


def _without_doubt(axes: Axes, found: dict[str, Any]) -> None:
    for name, curve in found["widest_log_ratio"].items():
        axes.plot(found["steps"], curve, color=COLOURS[name], linewidth=2, label=name)
    axes.axhline(found["ipo_theory"], color="black", linewidth=1, linestyle="--", label="IPO, closed form")
    axes.set_xscale("log")
    axes.set(
        xlabel="steps of gradient descent",
        ylabel="widest log(policy / reference), nats",
        title="Labels without doubt: the better one always wins",
    )
    axes.legend(frameon=False, fontsize=9)


def _finite(axes: Axes, found: dict[str, Any]) -> None:
    counts = np.array(found["labels"])
    for name, rows in found["distance"].items():
        values = np.array(rows)
        low, high = np.quantile(values, [0.1, 0.9], axis=1)
        axes.fill_between(counts, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
        axes.plot(
            counts, values.mean(1), "o-", color=COLOURS[name], markersize=4, label=f"{name}, slope {found['slope'][name]:.2f}"
        )
    start = np.array(found["distance"]["DPO"]).mean(1)[-1] * 1.7
    axes.plot(counts, start * np.sqrt(counts[-1] / counts), color=GREY, linewidth=1, linestyle="--", label="1 / sqrt(n)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(
        xlabel="labels a prompt, n",
        ylabel="total variation to the own optimum",
        title=f"Bradley-Terry labels, {found['seeds']} seeds (band: 10 to 90 %)",
    )
    axes.legend(frameon=False, fontsize=9)


def _no_optimum(axes: Axes, found: dict[str, Any]) -> None:
    axes.plot(found["labels"], 100 * np.array(found["without_finite_optimum"]), "o-", color=COLOURS["DPO"], markersize=5)
    axes.set_xscale("log")
    axes.set_ylim(-3, 103)
    axes.set(
        xlabel="labels a prompt, n",
        ylabel="% of seeds",
        title="Draws on which DPO has no optimum:\nsome responses never lost to the others",
    )
