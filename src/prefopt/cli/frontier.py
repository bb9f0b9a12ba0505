"""The verb frontier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from prefopt.cli.data import JsonOption

T = TypeVar("T")


def frontier(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with a section frontier.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="For example train.max_steps=50 frontier.methods.ppo.rollout.rounds=20."),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of runs, evaluations, table and figure.")],
    methods: Annotated[
        str | None, typer.Option(help="For example dpo,ipo,kto,ppo,ppo-gt,best-of-n,sft; by default frontier.methods.")
    ] = None,
    betas: Annotated[
        str | None, typer.Option(help="Of every method that has one: 0.05,0.1,0.5,1; by default frontier.betas.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="A run for each: 0,1; by default frontier.seeds.")] = None,
    checkpoints: Annotated[int | None, typer.Option(help="Checkpoints of each run to evaluate; by default 4.")] = None,
    sqrt_kl: Annotated[bool, typer.Option("--sqrt-kl", help="Draw against the square root of KL.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Keep only the last checkpoint of a run, once all are evaluated.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Also go on with runs that ended with an error.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Expected reward against KL from the reference, of many methods: train, evaluate, table and figure.

    Repeat the command after a stop: what is trained and evaluated is found again.
    """
    from prefopt.core.frontier_recipe import Asked, expand_frontier
    from prefopt.core.progress import say, set_quiet
    from prefopt.core.resolve import read_recipe

    if as_json:
        set_quiet(True)
    asked = Asked(
        methods=_listed("--methods", methods, str),
        betas=_listed("--betas", betas, float),
        seeds=_listed("--seeds", seeds, int),
        checkpoints=checkpoints,
    )
    plan = expand_frontier(read_recipe(recipe), overrides or [], output=output, asked=asked, source=str(recipe))

    from prefopt.evaluate.frontier import frontier_lines, points_of
    from prefopt.frontier import make_frontier

    say(f"{len(plan.stages)} stages, {len(plan.jobs)} runs, up to {plan.checkpoints} checkpoints of each; {output}")
    found = make_frontier(plan, output, resume=resume, prune=prune, sqrt_kl=sqrt_kl)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(frontier_lines(points_of(found))))
    for one in found["failed"]:
        say(f"left out: {one['run']}: {one['error']}")
    say(f"{output / 'frontier.png'}, .svg, .csv and .json")


def _listed(option: str, text: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """The values of a list such as 0.1,0.5; ConfigError for one that is none of its kind."""
    from prefopt.core.errors import ConfigError

    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        values = [kind(word) for word in words]
    except ValueError:
        raise ConfigError(f'{option}: "{text}" is not a list of numbers', todo=f"For example {option} 0,1.") from None
    if not values:
        raise ConfigError(f"{option}: the list is empty", todo="Separate the values with commas.")
    return values
