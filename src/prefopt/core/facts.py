"""The table of losses: what each one is, needs and accepts. The command line, the checks and the docs come from it.

The formulas themselves are in `prefopt.objective`; a test compares both sides. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from prefopt.core.errors import ConfigError, nearest

Kind = Literal["demonstration", "label", "pair", "ranking", "scores"]


@dataclass(frozen=True, slots=True)
class Knob:
    """One option of a loss: its default, the range it must lie in, and what it does."""

    default: float | str
    about: str
    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts of one loss. `formula` is plain text in the symbols of the docs; `function` is `module:name`."""

    name: str
    title: str
    function: str
    formula: str
    paper: str
    needs_reference: bool
    accepts: tuple[Kind, ...]
    reduce: Literal["sum", "mean", "choice"]
    knobs: dict[str, Knob] = field(default_factory=dict)
    since: str = "0.1"


LOSSES: dict[str, LossFacts] = {
    facts.name: facts
    for facts in (
        LossFacts(
            name="dpo",
            title="Direct Preference Optimization; with label_smoothing > 0 it is cDPO",
            function="prefopt.objective.pairs:dpo",
            formula="-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),  m = (log-ratio of chosen) - (log-ratio of rejected)",
            paper="arXiv 2305.18290, eq. 7; cDPO: Mitchell 2023, 'A note on DPO with noisy preferences'",
            needs_reference=True,
            accepts=("pair",),
            reduce="sum",
            knobs={
                "beta": Knob(0.1, "price of KL, in reward per nat; the paper uses 0.1 to 0.5", low=0.0, low_open=True),
                "label_smoothing": Knob(0.0, "share e of labels believed to be flipped (cDPO)", low=0.0, high=0.5),
            },
        ),
        LossFacts(
            name="ipo",
            title="Identity Preference Optimization",
            function="prefopt.objective.pairs:ipo",
            formula="(m - 1 / (2 beta))^2,  m = (log-ratio of chosen) - (log-ratio of rejected)",
            paper="arXiv 2310.12036, eq. 17 (tau there is beta here)",
            needs_reference=True,
            accepts=("pair",),
            reduce="choice",
            knobs={
                "beta": Knob(0.1, "strength of the regularisation; the target margin is 1 / (2 beta)", low=0.0, low_open=True),
                "reduce": Knob(
                    "mean",
                    "sum: log-ratios summed over tokens, as in the paper; mean: averaged over tokens, as in TRL."
                    " The same beta means different things",
                    choices=("sum", "mean"),
                ),
            },
        ),
    )
}


def loss_facts(name: str) -> LossFacts:
    """Facts of the loss `name`; ConfigError with the nearest known name otherwise."""
    if name not in LOSSES:
        raise ConfigError(
            f'loss.name: "{name}" is not a loss',
            todo=f"{nearest(name, LOSSES)}All of them: prefopt losses",
        )
    return LOSSES[name]


def resolve_knobs(name: str, given: dict[str, float | str]) -> dict[str, float | str]:
    """Every knob of the loss `name`, `given` over the defaults. Unknown knobs and values out of range are refused."""
    facts = loss_facts(name)
    values: dict[str, float | str] = {key: knob.default for key, knob in facts.knobs.items()}
    for key, value in given.items():
        if key not in facts.knobs:
            users = [other.name for other in LOSSES.values() if key in other.knobs]
            known = f"It belongs to: {', '.join(users)}. " if users else ""
            raise ConfigError(
                f'loss.{key}: the loss "{name}" has no such option',
                todo=f"{nearest(key, facts.knobs)}{known}Options of {name}: {', '.join(facts.knobs)}.",
            )
        values[key] = _checked(name, key, facts.knobs[key], value)
    return values


def _checked(name: str, key: str, knob: Knob, value: float | str) -> float | str:
    if knob.choices:
        if value not in knob.choices:
            raise ConfigError(f"loss.{key}: {value!r} is not a choice of {name}", todo=f"Use {' or '.join(knob.choices)}.")
        return value
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"loss.{key}: {value!r} is not a number", todo=f"For example loss.{key}={knob.default}.")
    below = value <= knob.low if knob.low_open else value < knob.low
    if below or value > knob.high or not math.isfinite(value):
        bracket = "(" if knob.low_open else "["
        raise ConfigError(
            f"loss.{key}: {value} is outside {bracket}{knob.low}, {knob.high}]",
            todo=f"{knob.about}; the default is {knob.default}.",
        )
    return float(value)
