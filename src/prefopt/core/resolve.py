"""From a YAML recipe and `key=value` words to a RunConfig, with errors that name the key and the nearest known one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from prefopt.core.config import LossConfig, RunConfig
from prefopt.core.errors import ConfigError, nearest
from prefopt.core.facts import LOSSES


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`; ConfigError where it is missing, broken or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such recipe", todo="Recipes that come with prefopt are in recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error})", todo="A recipe is a UTF-8 YAML file.") from error
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: is not YAML ({' '.join(str(error).split())})", todo="Mend the line that the message names."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a recipe is a mapping, found {type(value).__name__}", todo="Start from a file in recipes/.")
    return value


def parse_override(word: str) -> tuple[list[str], Any]:
    """`'train.lr=1e-6'` as `(['train', 'lr'], 1e-06)`; the value is read as YAML."""
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise ConfigError(
            f'"{word}" is not of the form key=value', todo="For example: prefopt train recipe.yaml loss.beta=0.05"
        )
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        try:
            value = float(value)
        except ValueError:
            pass
    return key.split("."), value


def resolve_config(recipe: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "") -> RunConfig:
    """The RunConfig of `recipe` with `overrides` laid over it. `source` names the recipe in errors."""
    values: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for word in overrides:
        path, value = parse_override(word)
        target = values
        for part in path[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f'"{word}": {part} is a value, not a section', todo=_sections())
            target = inner
        target[path[-1]] = value
    where = f" ({source})" if source else ""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _readable(error, where) from error
    except ConfigError as error:
        raise ConfigError(f"{error.what}{where}", todo=error.todo) from None


def _readable(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        todo = f"{nearest(path[-1], known)}Known here: {', '.join(known)}."
        return ConfigError(f'{key}: there is no option "{path[-1]}"{where}', todo=todo)
    found = first.get("input")
    field = _field_about(path)
    todo = f"{key}: {field}" if field else _sections()
    return ConfigError(f"{key}: {first['msg'].lower()}, found {found!r}{where}", todo=todo)


def _section(path: list[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = RunConfig
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def _known_keys(path: list[str]) -> list[str]:
    model = _section(path)
    return sorted(model.model_fields) if model is not None else []


def _field_about(path: list[str]) -> str:
    model = _section(path[:1])
    field = model.model_fields.get(path[1]) if model is not None and len(path) > 1 else None
    return (field.description or "") if field is not None else ""


def _sections() -> str:
    return f"Sections: {', '.join(RunConfig.model_fields)}."


def option_table() -> list[tuple[str, str, str]]:
    """(key, default, description) of every option, for the docs and `prefopt train --options`."""
    rows = []
    for section, section_field in RunConfig.model_fields.items():
        model = section_field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            rows.append(
                (f"{section}.{key}", repr(default) if isinstance(default, str) else str(default), field.description or "")
            )
        if model is LossConfig:
            for facts in LOSSES.values():
                for key, knob in facts.knobs.items():
                    rows.append((f"{section}.{key}", str(knob.default), f"{facts.name}: {knob.about}"))
    return rows
