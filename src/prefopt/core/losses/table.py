"""The table of losses, and the checks of names and options against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.core.errors import ConfigError, nearest
from prefopt.core.losses import listwise, pair_variants, pairs, policy_gradient, reference_free, single, unpaired
from prefopt.core.losses.custom import custom_facts
from prefopt.core.losses.facts import Knob, LossFacts, Value

LOSSES: dict[str, LossFacts] = {
    facts.name: facts
    for table in (pairs, pair_variants, reference_free, unpaired, listwise, single, policy_gradient)
    for facts in table.FACTS
}


@dataclass(frozen=True, slots=True)
class Part:
    """One loss of an objective: its name, its weight in the sum, and every option with defaults filled in."""

    name: str
    weight: float
    knobs: dict[str, Value]

    @property
    def facts(self) -> LossFacts:
        return loss_facts(self.name)


def loss_facts(name: str) -> LossFacts:
    """Facts of the loss `name`, also of `module:function`; ConfigError with the nearest known name otherwise."""
    if ":" in name:
        return custom_facts(name)
    if name not in LOSSES:
        raise ConfigError(
            f'loss.name: "{name}" is not a loss',
            todo=f"{nearest(name, LOSSES)}All of them: prefopt losses; your own: module:function.",
        )
    return LOSSES[name]


def resolve_parts(given: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of a loss section: `{name: dpo, beta: 0.1}`, or a mix `{dpo: 1.0, sft: 0.2, beta: 0.1}`.

    In a mix the value of a loss is its weight, or a mapping with `weight` and options of that loss alone; other keys are
    options of every part that has them. ConfigError for everything that would be ignored.
    """
    mixed = [key for key in given if key in LOSSES or ":" in key]
    if "name" in given and mixed:
        raise ConfigError(
            f'loss.name is set, and so is the weight of "{mixed[0]}"',
            todo="Use loss.name for one loss, or a weight for each loss of a mix: loss: {dpo: 1.0, sft: 0.2}.",
        )
    if not mixed:
        name = given.get("name", "dpo")
        if not isinstance(name, str):
            raise ConfigError(f"loss.name: {name!r} is not a name", todo="For example loss.name=dpo.")
        return (Part(name, 1.0, resolve_knobs(name, {key: value for key, value in given.items() if key != "name"})),)
    shared = {key: value for key, value in given.items() if key not in mixed}
    parts = tuple(_mixed_part(name, given[name], shared) for name in mixed)
    for key in shared:
        if not any(key in part.facts.knobs for part in parts):
            _refuse_unknown(key, " + ".join(mixed), {key: None for part in parts for key in part.facts.knobs})
    return parts


def parts_of_section(section: Any) -> tuple[Part, ...]:
    """The parts of the loss section of a saved configuration; empty where this version does not understand it."""
    if not isinstance(section, Mapping) or not section:
        return ()
    try:
        return resolve_parts(section)
    except ConfigError:
        return ()


def section_title(section: Any) -> str:
    """`dpo`, or `dpo + sft` for a mix; the bare name where this version does not know the loss, "" where there is none."""
    parts = parts_of_section(section)
    if parts:
        return " + ".join(part.name for part in parts)
    return str(section.get("name", "")) if isinstance(section, Mapping) else ""


def _mixed_part(name: str, value: Any, shared: Mapping[str, Any]) -> Part:
    own = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = _checked(name, name, _WEIGHT, own.pop("weight", 1.0))
    known = {key: option for key, option in shared.items() if key in loss_facts(name).knobs}
    return Part(name, float(weight), resolve_knobs(name, {**known, **own}))


_WEIGHT = Knob(1.0, "weight of this loss in the sum", low=0.0, low_open=True)


def resolve_knobs(name: str, given: Mapping[str, Any]) -> dict[str, Value]:
    """Every knob of the loss `name`, `given` over the defaults. Unknown knobs and values out of range are refused."""
    facts = loss_facts(name)
    values: dict[str, Value] = {key: knob.default for key, knob in facts.knobs.items()}
    for key, value in given.items():
        if key not in facts.knobs:
            _refuse_unknown(key, name, facts.knobs)
        values[key] = _checked(name, key, facts.knobs[key], value)
    for key, knob in facts.knobs.items():
        if knob.only_with is None or values[key] == knob.default:
            continue
        other, wanted = knob.only_with
        if values[other] != wanted:
            raise ConfigError(
                f"loss.{key} is set, and {name} uses it only with loss.{other}={wanted}",
                todo=f"Set loss.{other}={wanted}, or remove loss.{key}.",
            )
    return values


def _refuse_unknown(key: str, name: str, known: Mapping[str, Any]) -> None:
    users = [other.name for other in LOSSES.values() if key in other.knobs]
    belongs = f"It belongs to: {', '.join(users[:6])}{' and others' if len(users) > 6 else ''}. " if users else ""
    options = f"Options of {name}: {', '.join(known)}." if known else f"{name} has no options."
    close = nearest(key, [*known, *([] if users else LOSSES)])
    raise ConfigError(f'loss.{key}: the loss "{name}" has no such option', todo=f"{close}{belongs}{options}")


def _checked(name: str, key: str, knob: Knob, value: Any) -> Value:
    if isinstance(knob.default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"loss.{key}: {value!r} is neither true nor false", todo=knob.about)
        return value
    if knob.choices:
        if value not in knob.choices:
            raise ConfigError(f"loss.{key}: {value!r} is not a choice of {name}", todo=f"Use {' or '.join(knob.choices)}.")
        return str(value)
    if isinstance(knob.default, str):
        if not isinstance(value, str):
            raise ConfigError(f"loss.{key}: {value!r} is not text", todo=f"For example loss.{key}={knob.default}.")
        return value
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"loss.{key}: {value!r} is not a number", todo=f"For example loss.{key}={knob.default}.")
    below = value <= knob.low if knob.low_open else value < knob.low
    above = value >= knob.high if knob.high_open else value > knob.high
    if below or above or not math.isfinite(value):
        opening = "(" if knob.low_open or math.isinf(knob.low) else "["
        closing = ")" if knob.high_open or math.isinf(knob.high) else "]"
        raise ConfigError(
            f"loss.{key}: {value} is outside {opening}{knob.low}, {knob.high}{closing}",
            todo=f"{knob.about}; the default is {knob.default}.",
        )
    return float(value)
