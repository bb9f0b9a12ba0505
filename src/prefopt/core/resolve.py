"""From a YAML recipe and `key=value` words to a RunConfig, with errors that name the key and the nearest known one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from prefopt.core.config import LossConfig, RunConfig
from prefopt.core.errors import ConfigError, nearest
from prefopt.core.losses.describe import default_text, knob_text, range_text
from prefopt.core.losses.facts import Knob
from prefopt.core.losses.table import LOSSES


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


def set_option(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put `value` at `path` into the nested mapping `values`; ConfigError where a part of the path is a value."""
    for part in path[:-1]:
        if values.get(part) is None:  # absent, or switched off: model.lora=null
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f'{".".join(path)}: "{part}" is a value, not a section', todo=_sections())
    values[path[-1]] = value


def resolve_config(recipe: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "") -> RunConfig:
    """The RunConfig of `recipe` with `overrides` laid over it. `source` names the recipe in errors."""
    values: dict[str, Any] = copy.deepcopy(dict(recipe))
    for word in overrides:
        set_option(values, *parse_override(word))
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
        inner = _section_type(field.annotation) if field is not None else None
        if inner is None:
            return None
        model = inner
    return model


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it can be switched off with null; None for a plain value."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _known_keys(path: list[str]) -> list[str]:
    model = _section(path)
    return sorted(model.model_fields) if model is not None else []


def _field_about(path: list[str]) -> str:
    about = ""
    for depth, part in enumerate(path):
        model = _section(path[:depth])
        field = model.model_fields.get(part) if model is not None else None
        if field is None:
            break
        about = field.description or ""
    return about


def _sections() -> str:
    return f"Sections: {', '.join(RunConfig.model_fields)}."


def _options(section: str, model: type[BaseModel]) -> list[tuple[str, str, str]]:
    rows = []
    for key, field in model.model_fields.items():
        default = "(none: it must be given)"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = repr(value) if isinstance(value, str) else str(value)
        rows.append((f"{section}.{key}", default, field.description or ""))
        inner = _section_type(field.annotation)
        rows += _options(f"{section}.{key}", inner) if inner is not None else []
    return rows


def option_table() -> list[tuple[str, str, str]]:
    """(key, default, description) of every option, for the docs and `prefopt train --options`."""
    rows = []
    for section, section_field in RunConfig.model_fields.items():
        model = _section_type(section_field.annotation)
        assert model is not None
        if section_field.description:  # it may be absent
            rows.append((section, str(section_field.default), section_field.description))
        rows += _options(section, model)
        rows += _loss_options() if model is LossConfig else []
    return rows


def _loss_options() -> list[tuple[str, str, str]]:
    """Options of the losses, each once for all losses for which it means the same, with their names."""
    users: dict[str, dict[Knob, list[str]]] = {}
    for facts in LOSSES.values():
        for key, knob in facts.knobs.items():
            users.setdefault(key, {}).setdefault(knob, []).append(facts.name)
    rows = [_beta(users.pop("beta"))]
    for key, meanings in users.items():
        for knob, names in meanings.items():
            about = knob_text(knob) + ("" if isinstance(knob.default, bool) else f" ({range_text(knob)})")
            few = len(names) <= 4
            about = f"{', '.join(names)}: {about}" if few else f"{about}. Of {', '.join(names)}."
            rows.append((f"loss.{key}", default_text(knob), about))
    return rows


def _beta(meanings: Mapping[Knob, Sequence[str]]) -> tuple[str, str, str]:
    """beta means something else in nearly every loss: which have another default than dpo, and where the reasons are."""
    usual = LOSSES["dpo"].knobs["beta"].default
    others: dict[str, list[str]] = {}
    for knob, names in meanings.items():
        if knob.default != usual:
            others.setdefault(default_text(knob), []).extend(names)
    listed = "; ".join(f"{default} for {', '.join(others[default])}" for default in sorted(others, key=float))
    return "loss.beta", f"{usual:g}", f"Strength of the loss; {listed}. What it means and why: prefopt losses NAME."
