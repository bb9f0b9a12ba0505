"""The rows to train on and the rows held out, as a configuration names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefopt.core.config import IN_MEMORY, DataConfig
from prefopt.core.errors import ConfigError, DataError
from prefopt.data.group_store import pick_groups
from prefopt.data.groups import GroupSet
from prefopt.data.load import load_groups
from prefopt.data.pack import draw_held_out


def load_splits(data: DataConfig, *, train_rows: Any = None, eval_rows: Any = None) -> tuple[GroupSet, GroupSet | None]:
    """(train, held-out or None). `train_rows` and `eval_rows` stand in for data.train and data.eval.

    Held-out rows come from data.eval, or are drawn with data.seed from the usable rows of data.train, so that the same
    configuration always holds out the same rows.
    """
    source = train_rows if train_rows is not None else data.train
    if source is None:
        raise ConfigError("data.train: there are no rows to train on", todo="Set data.train=FILE or a Hub dataset id.")
    if source == IN_MEMORY:
        raise ConfigError(
            "data.train: this run was trained on rows that were given as an object, and they are not kept",
            todo="Give the same object again, or a file.",
        )
    groups = load_groups(source, shape=data.shape, split=data.split, max_rows=data.max_rows)
    if data.eval_rows:
        return _draw(groups, data.eval_rows, data.seed)
    return groups, load_held_out(data, eval_rows=eval_rows)


def load_held_out(data: DataConfig, *, eval_rows: Any = None) -> GroupSet | None:
    """The held-out rows alone; None where there are none, or where they were given as an object and are not kept."""
    if data.eval_rows and data.train not in (None, IN_MEMORY):
        return load_splits(data)[1]
    source = eval_rows if eval_rows is not None else data.eval
    if source is None or source == IN_MEMORY:
        return None
    return load_groups(source, shape=data.shape, split=data.eval_split)


def _draw(groups: GroupSet, wanted: int, seed: int) -> tuple[GroupSet, GroupSet]:
    count = len(groups.groups)
    if wanted >= count:
        raise DataError(
            f"data.eval_rows={wanted} would leave no rows to train on: {groups.name} has {count} usable rows",
            todo="Ask for fewer, or give data.eval.",
        )
    kept, drawn = draw_held_out(count, held_out=wanted, seed=seed)
    held = replace(
        groups,
        groups=pick_groups(groups.groups, drawn),
        bad=(),
        rows=wanted,
        name=f"{groups.name} (held out)",
        notes=(),
    )
    return replace(groups, groups=pick_groups(groups.groups, kept)), held
