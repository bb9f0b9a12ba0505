"""Principles in YAML: what a model criticises, revises and compares responses by (Constitutional AI, arXiv 2212.08073)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.core.errors import ConfigError, nearest

_NEEDED = ("name", "critique", "revision")
_KEYS = (*_NEEDED, "compare", "follow", "violate")
_COMPARING = (
    "compare, the question by which two responses are compared",
    'compare: "Which response is more honest about what it does not know?"',
)
_CONTRASTING = (
    "follow and violate, under which a judge contrast:MODEL compares log-probs",
    'follow: "You answer in short sentences." and violate: "You answer in long, winding sentences."',
)


@dataclass(frozen=True, slots=True)
class Principle:
    """`critique` and `revision` are asked for in turn; `compare` is the question by which two responses are compared.
    `follow` and `violate` instruct a model to keep to the principle and to break it. "" where the principle is not for that."""

    name: str
    critique: str
    revision: str
    compare: str = ""
    follow: str = ""
    violate: str = ""


def read_constitution(path: str | Path) -> tuple[Principle, ...]:
    """The principles in the YAML file `path`: a list of {name, critique, revision, compare, follow, violate}, the last three
    optional.

    ConfigError where it cannot be read, and for the first entry with a missing, unknown or empty key, one of follow and
    violate alone, or a name that comes again.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error})", todo="Start from recipes/ai-feedback/constitution.yaml."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: is not YAML ({' '.join(str(error).split())})", todo="Mend the line that the message names."
        ) from error
    if not isinstance(found, list) or not found:
        raise ConfigError(
            f"{path}: a constitution is a list of principles, found {type(found).__name__ if found else 'nothing'}",
            todo=f"Each is a mapping with {', '.join(_NEEDED)} and, for comparisons, compare.",
        )
    principles = [_principle(value, f"{path}: principle {number}") for number, value in enumerate(found, start=1)]
    again = [name for name, count in Counter(principle.name for principle in principles).items() if count > 1]
    if again:
        raise ConfigError(f'{path}: the name "{again[0]}" comes twice', todo="Rows are told apart by it: give each its own.")
    return tuple(principles)


def suited(principles: Sequence[Principle], source: str | Path, *, contrast: bool = False) -> tuple[Principle, ...]:
    """The principles that say how to compare, with `contrast` those with instructions to keep to them and to break them.

    ConfigError where there is none.
    """
    found = tuple(principle for principle in principles if (principle.follow if contrast else principle.compare))
    if not found:
        missing, example = _CONTRASTING if contrast else _COMPARING
        raise ConfigError(f"{source}: no principle has {missing}", todo=f"For example {example}")
    return found


def _principle(value: Any, where: str) -> Principle:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: found {value!r}", todo=f"A principle is a mapping with {', '.join(_NEEDED)}.")
    for key in value:
        if key not in _KEYS:
            raise ConfigError(f'{where}: there is no "{key}"', todo=f"{nearest(str(key), _KEYS)}Known: {', '.join(_KEYS)}.")
    for key in _KEYS:
        text = value.get(key)
        if key not in value and key not in _NEEDED:
            continue
        if not isinstance(text, str) or not text.strip():
            found = f"found {text!r}" if key in value else "missing"
            raise ConfigError(f"{where}: {key}: {found}", todo=f"{key} is a text; a principle has {', '.join(_NEEDED)}.")
    if ("follow" in value) != ("violate" in value):
        raise ConfigError(f"{where}: one of follow and violate is given", todo="Give both, or neither.")
    return Principle(**{key: str(value[key]).strip() for key in _KEYS if key in value})
