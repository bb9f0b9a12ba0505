"""Where a loss starts: its value while the policy equals its reference, or while a reward model scores everything 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from prefopt.core.losses.facts import Value
from prefopt.core.losses.table import parts_of_section

Knobs = Mapping[str, Value]

_LN2 = math.log(2)


def start_loss(section: Mapping[str, Any]) -> float | None:
    """The loss, as training reports it, where every log-ratio or score is 0. `section` is a config's loss section.

    None where it depends on the rows (their lengths, margins, ties, classes, or how many responses they have), where the
    loss does not start at its reference because it has none, or where the loss is not known. A reward model's is for
    rows without a margin. A mix has a start where all of its parts have one.
    """
    parts = parts_of_section(section)
    total = 0.0
    for part in parts:
        start = None if part.knobs.get("wpo") else _STARTS.get(part.name, _unknown)(part.knobs)
        if start is None:
            return None
        total += part.weight * start
    return total if parts else None


def _unknown(knobs: Knobs) -> float | None:
    return None


def _constant(value: float) -> Callable[[Knobs], float | None]:
    return lambda knobs: value


def _ln2_without(name: str) -> Callable[[Knobs], float | None]:
    """ln 2 where the option `name`, whose term depends on the rows, is 0."""
    return lambda knobs: None if knobs[name] else _LN2


def _squared_target(knobs: Knobs) -> float:
    """1 / (2 beta) squared: how far a log-ratio of 0 is from its target."""
    return 1 / (4 * float(knobs["beta"]) ** 2)


def _exo(knobs: Knobs) -> float:
    smoothing = float(knobs["label_smoothing"])
    return -_LN2 - 0.5 * (math.log(smoothing) + math.log1p(-smoothing))


def _half_of_each_class(knobs: Knobs) -> float | None:
    """Half the weight of a response's class: one number only where both classes weigh the same."""
    weight = float(knobs["desirable_weight"])
    return weight / 2 if weight == knobs["undesirable_weight"] else None


_STARTS: dict[str, Callable[[Knobs], float | None]] = {
    **dict.fromkeys(("dpo", "cdpo", "robust", "sigmoid_norm", "dpop", "beta_dpo", "tdpo", "soft_dpo", "aot"), _constant(_LN2)),
    "ipo": _squared_target,
    "hinge": _constant(1.0),
    "exo": _exo,
    "discopop": _constant((_LN2 + 1) / 2),
    "nca": _constant(2 * _LN2),
    "bco_pair": _constant(2 * _LN2),
    "sppo": lambda knobs: 2 * _squared_target(knobs),
    "apo_zero": _constant(1.0),
    "apo_down": _constant(1.0),
    "odpo": _ln2_without("alpha"),
    "r_dpo": _ln2_without("alpha"),
    "cal_dpo": lambda knobs: _LN2 + 2 * _squared_target(knobs),
    "kto": _half_of_each_class,
    "apo_zero_unpaired": _half_of_each_class,
    "bco": _constant(_LN2),
    "reward": _constant(_LN2),
}
