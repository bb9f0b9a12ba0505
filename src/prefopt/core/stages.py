"""Recipes of several runs: stages one after another, each the recipe's defaults with its own keys over them.

    train: {output_dir: runs/rlhf}
    stages:
      - {name: sft, loss: {name: sft}, data: {train: demonstrations.jsonl}}
      - {name: dpo, model: {name: "{sft}"}, data: {train: pairs.jsonl}}

`{NAME}` in a value stands for the run folder of an earlier stage, `<train.output_dir>/NAME`; `{{NAME}}` for the text itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.core.config import RunConfig, TrainConfig
from prefopt.core.errors import ConfigError, nearest
from prefopt.core.losses.table import LOSSES
from prefopt.core.resolve import parse_override, resolve_config, set_option

_NAME = re.compile(r"[A-Za-z][\w-]*")
# What belongs to rows: a run that learns from the policy's own samples takes none of it from the recipe's defaults.
OF_ROWS = (
    ("data", "train"),
    ("data", "eval"),
    ("data", "eval_rows"),
    ("data", "max_rows"),
    ("train", "epochs"),
    ("train", "eval_every_steps"),
    ("train", "keep_best"),
)
_PLACEHOLDER = re.compile(r"\{\{([A-Za-z][\w-]*)\}\}|\{([A-Za-z][\w-]*)\}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of a recipe: its name, its configuration, and the earlier stages whose run folders it names."""

    name: str
    config: RunConfig
    uses: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output_dir)


class Override(NamedTuple):
    """A `key=value` of the command line."""

    path: list[str]
    value: Any


def is_staged(recipe: Mapping[str, Any]) -> bool:
    return "stages" in recipe


def expand_stages(recipe: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "") -> tuple[Stage, ...]:
    """The stages of `recipe` in their order, each resolved and checked. `source` names the recipe in errors.

    `key=value` goes to all stages, over what they say themselves, but a value that names an earlier stage stays.
    `stages.NAME.key=value` goes to that stage alone, and over everything. `train.output_dir` is the folder of all.
    ConfigError names the stage.
    """
    where = f" ({source})" if source else ""
    partials = _partials(recipe.get("stages"), where)
    common, own = split_overrides(overrides, list(partials), where)
    defaults = {key: value for key, value in recipe.items() if key != "stages"}
    parent = Path(output_folder(defaults, common))
    made: list[Stage] = []
    for name, partial in partials.items():
        values = overlaid(merged(defaults, partial), common, own[name], known=partials)
        _refuse_own_folder(name, [partial, *(_as_mapping(word) for word in own[name])], where)
        values, uses = filled(values, {stage.name: stage.folder for stage in made}, list(partials), f'stage "{name}"{where}')
        set_option(values, ["train", "output_dir"], str(parent / name))
        stage = Stage(name, _resolved(values, name, source, common), uses)
        check_uses(made, stage, f'stage "{name}"')
        made.append(stage)
    return tuple(made)


def _partials(listed: Any, where: str) -> dict[str, dict[str, Any]]:
    """The partial recipe of each stage by its name."""
    example = 'For example: stages: [{name: sft, loss: {name: sft}}, {name: dpo, model: {name: "{sft}"}}].'
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"stages: is a list of partial recipes, found {listed!r}{where}", todo=example)
    partials: dict[str, dict[str, Any]] = {}
    for number, partial in enumerate(listed, start=1):
        name = partial.get("name") if isinstance(partial, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            found = f"its name is {name!r}" if isinstance(partial, Mapping) else f"it is {partial!r}"
            raise ConfigError(
                f"stages: number {number} has no usable name, {found}{where}",
                todo=f"A name is a letter, then letters, digits, _ or -. {example}",
            )
        if name.lower() in map(str.lower, partials):
            raise ConfigError(
                f'stages: two are called "{name}"{where}', todo="Give each a name of its own: it names its folder."
            )
        partials[name] = {key: value for key, value in partial.items() if key != "name"}
    return partials


def split_overrides(words: Sequence[str], names: Sequence[str], where: str) -> tuple[list[Override], dict[str, list[Override]]]:
    """`key=value` words for all stages, and those for one, by its name; ConfigError for a stage that is not there."""
    common: list[Override] = []
    own: dict[str, list[Override]] = {name: [] for name in names}
    for word in words:
        path, value = override = override_of(word)
        if path[0] != "stages":
            common.append(override)
        elif len(path) < 3 or path[1] not in own:
            close = nearest(path[1], names) if len(path) > 1 else ""
            raise ConfigError(
                f'"{word}": there is no such stage or no key{where}',
                todo=f"{close}Write stages.NAME.key=value; the stages are: {', '.join(names) or 'none'}.",
            )
        else:
            own[path[1]].append(Override(path[2:], value))
    return common, own


def override_of(word: str) -> Override:
    """A `key=value` word, whose value may be a placeholder: YAML would read `{NAME}` as a mapping."""
    path, value = parse_override(word)
    text = word.partition("=")[2]
    return Override(path, text if _PLACEHOLDER.fullmatch(text) else value)


def merged(defaults: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with the keys of `partial` over them, section by section; null takes a default away.

    A `loss` that says which replaces the whole one, and a section `rollout` that the defaults lack takes `OF_ROWS` away.
    """
    values = copy.deepcopy(dict(defaults))
    if partial.get("rollout") is not None and values.get("rollout") is None:
        for section, key in OF_ROWS:
            if isinstance(values.get(section), dict):
                values[section].pop(key, None)
    for key, value in partial.items():
        old = values.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not (key == "loss" and says_which(value)):
            values[key] = merged(old, value)
        elif value is None and old is not None:
            del values[key]
        else:
            values[key] = copy.deepcopy(value)
    return values


def says_which(loss: Mapping[str, Any]) -> bool:
    """Whether a section `loss` names a loss, rather than options of one."""
    return "name" in loss or any(key in LOSSES or ":" in key for key in loss)


def overlaid(
    values: dict[str, Any], common: Sequence[Override], own: Sequence[Override], *, known: Mapping[str, Any]
) -> dict[str, Any]:
    """`values` with the overrides over them: those of all runs, then its own.

    Those of all runs leave a value that names one of `known`, and with `rollout` what belongs to rows.
    """
    kept = {("train", "output_dir"), *(OF_ROWS if values.get("rollout") is not None else ())}
    for path, value in common:
        if tuple(path) not in kept and not _names_a_stage(value_at(values, path), known):
            set_option(values, path, copy.deepcopy(value))
    for path, value in own:
        set_option(values, path, copy.deepcopy(value))
    return values


def value_at(values: Any, path: Sequence[str]) -> Any:
    """What lies at `path` in nested mappings; None where nothing does."""
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _names_a_stage(value: Any, known: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and any(found[2] in known for found in _PLACEHOLDER.finditer(value))


def output_folder(defaults: Mapping[str, Any], common: Sequence[Override]) -> str:
    """train.output_dir of the whole."""
    given = value_at(defaults, ["train", "output_dir"]) or TrainConfig().output_dir
    for path, value in common:
        given = value if path == ["train", "output_dir"] else given
    return str(given)


def _as_mapping(override: Override) -> dict[str, Any]:
    values: dict[str, Any] = {}
    set_option(values, override.path, override.value)
    return values


def _refuse_own_folder(name: str, given: Sequence[Mapping[str, Any]], where: str) -> None:
    if any(value_at(values, ["train", "output_dir"]) is not None for values in given):
        raise ConfigError(
            f'stage "{name}": has a train.output_dir of its own{where}',
            todo="Set train.output_dir once, outside the stages: each stage runs in <train.output_dir>/NAME.",
        )


def filled(
    values: Any, folders: Mapping[str, Path], known: Sequence[str], where: str, *, path: str = ""
) -> tuple[Any, tuple[str, ...]]:
    """`values` with `{NAME}` as the run folder of an earlier stage, and the stages named, in order of appearance.

    `folders`: of the stages before; `known`: names of all. ConfigError names the key of a name that is unknown or later.
    """
    if isinstance(values, Mapping):
        [only] = values if len(values) == 1 else [None]
        if only in known and values[only] is None and path:
            raise ConfigError(f"{path}: YAML reads {{{only}}} as a mapping; {where}", todo=f'Put it in quotes: "{{{only}}}".')
        parts = {key: filled(value, folders, known, where, path=f"{path}.{key}".lstrip(".")) for key, value in values.items()}
        return {key: part for key, (part, _) in parts.items()}, _together(uses for _, uses in parts.values())
    if isinstance(values, list | tuple):
        found = [filled(value, folders, known, where, path=path) for value in values]
        return [part for part, _ in found], _together(uses for _, uses in found)
    if not isinstance(values, str):
        return values, ()
    uses: list[str] = []

    def folder(match: re.Match[str]) -> str:
        if match[1] is not None:
            return f"{{{match[1]}}}"
        if match[2] not in folders:
            raise _no_such_stage(path, match[2], folders, known, where)
        uses.append(match[2])
        return str(folders[match[2]])

    return _PLACEHOLDER.sub(folder, values), tuple(dict.fromkeys(uses))


def _together(uses: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in uses for name in names))


def _no_such_stage(path: str, name: str, folders: Mapping[str, Path], known: Sequence[str], where: str) -> ConfigError:
    why = "which does not come before it" if name in known else "and there is no such stage"
    earlier = f"Earlier stages: {', '.join(folders)}." if folders else "There is no stage before it."
    return ConfigError(
        f"{path}: {{{name}}} stands for the run of a stage, {why}; {where}",
        todo=f"{nearest(name, folders)}{earlier} The text itself is written {{{{{name}}}}}.",
    )


def _resolved(values: dict[str, Any], name: str, source: str, common: Sequence[Override]) -> RunConfig:
    said = f'stage "{name}"' + (f", {source}" if source else "")
    try:
        return resolve_config(values, source=said)
    except ConfigError as error:
        keys = [key for path, _ in common if (key := ".".join(path)) in error.what]
        hint = f" For one stage alone: stages.{name}.{keys[-1]}=..." if keys else ""
        raise ConfigError(error.what, todo=f"{error.todo}{hint}") from error


def check_uses(before: Sequence[Stage], stage: Stage, title: str) -> None:
    """ConfigError where `stage` takes a reward model of those `before` for a policy, or a policy for a reward model."""
    config = stage.config
    rewarding = {str(one.folder): _trains_reward_model(one) for one in before}
    for option, name in (("model.name", config.model.name), ("reference.model", config.reference.model)):
        if name in rewarding and rewarding[name] and not _trains_reward_model(stage):
            raise ConfigError(
                f'{title}: {option} is the run of stage "{Path(name).name}", which trains a reward model',
                todo="Give a stage that trains a policy; a reward model is used as rollout.reward=model:{NAME}.",
            )
    reward = config.rollout.reward.removeprefix("model:") if config.rollout is not None else ""
    if reward in rewarding and not rewarding[reward]:
        raise ConfigError(
            f'{title}: rollout.reward is the run of stage "{Path(reward).name}", which trains no reward model',
            todo="Give a stage with loss.name=reward.",
        )


def _trains_reward_model(stage: Stage) -> bool:
    return stage.config.loss.facts[0].trains_reward_model
