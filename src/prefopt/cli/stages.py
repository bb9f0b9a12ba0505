"""Recipes of several stages, for the verbs train and plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from prefopt.cli.training import dry_run_json, dry_run_lines, plan_lines, planned, run_summary
from prefopt.core.errors import PrefoptError
from prefopt.core.progress import say
from prefopt.core.run_folder import RunFolder
from prefopt.core.run_state import run_state
from prefopt.core.stages import Stage


def train_all(stages: Sequence[Stage], *, resume: bool, as_json: bool) -> None:
    """Train the stages that are not finished."""
    from prefopt.stages import train_stages

    runs = train_stages(stages, resume=resume)
    found = [{"stage": stage.name, **run_summary(run)} for stage, run in zip(stages, runs, strict=True)]
    if as_json:
        typer.echo(json.dumps({"stages": found}))
    for one in found:
        say(f"{one['stage']}: {one['steps']} steps, last loss {one['loss']:.4f}, {one['run']}")


def dry_run_stages(stages: Sequence[Stage], *, as_json: bool) -> None:
    """Configuration, audit and plan of each stage."""
    found = []
    for stage, made, summary in _plans(stages):
        if as_json:
            found.append({"stage": stage.name, "state": _state(stage), **dry_run_json(stage.config, made, summary)})
        else:
            typer.echo("\n".join([_heading(stage), *dry_run_lines(stage.config, made, summary), ""]))
    if as_json:
        typer.echo(json.dumps({"stages": found}, indent=2, ensure_ascii=False))


def plan_stages(stages: Sequence[Stage], memory_gib: float | None, *, as_json: bool) -> None:
    """The plan of each stage; exit code 1 where one does not fit."""
    found, fits = [], True
    for stage, made, summary in _plans(stages, memory_gib):
        fits = fits and made.fits
        if as_json:
            found.append({"stage": stage.name, "state": _state(stage), **summary})
        else:
            typer.echo("\n".join([_heading(stage), *plan_lines(made, summary), ""]))
    if as_json:
        typer.echo(json.dumps({"stages": found}, indent=2, ensure_ascii=False))
    if not fits:
        raise typer.Exit(1)


def _plans(stages: Sequence[Stage], memory_gib: float | None = None) -> Iterator[tuple[Stage, Any, dict[str, Any]]]:
    """Each stage with its plan; errors say which stage."""
    from prefopt.stages import plan_config

    for stage in stages:
        try:
            made, summary = planned(plan_config(stage, stages), memory_gib)
        except PrefoptError as error:
            raise type(error)(f"stage {stage.name}: {error.what}", todo=error.todo) from None
        yield stage, made, summary


def _state(stage: Stage) -> str:
    return run_state(RunFolder(stage.folder))


def _heading(stage: Stage) -> str:
    return f"stage {stage.name} ({_state(stage)}, {stage.folder})"
