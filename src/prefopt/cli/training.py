"""The verb train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefopt.cli.data import JsonOption


def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe, or the config.json of a run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example loss.beta=0.05 train.lr=1e-6.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show configuration, data audit, steps and memory; train nothing.")
    ] = False,
    options: Annotated[bool, typer.Option("--options", help="List every option with its default, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on preference rows."""
    from prefopt.core.errors import ConfigError
    from prefopt.core.progress import say, set_quiet
    from prefopt.core.resolve import option_table, read_recipe, resolve_config

    if as_json:
        set_quiet(True)
    if options:
        table = option_table()
        typer.echo(
            json.dumps(table) if as_json else "\n".join(f"{key} = {default}\n    {about}" for key, default, about in table)
        )
        return
    words = list(overrides or [])
    if recipe is not None and "=" in str(recipe):
        words.insert(0, str(recipe))
        recipe = None
    if recipe is None and not words:
        raise ConfigError(
            "train: there is no recipe",
            todo="For example: prefopt train recipes/dpo-hh.yaml, or prefopt train data.train=rows.jsonl",
        )
    config = resolve_config(read_recipe(recipe) if recipe else {}, words, source=str(recipe or ""))
    if dry_run:
        _dry_run(config, as_json=as_json)
        return
    from prefopt.pipeline import train_run

    run = train_run(config, resume=resume)
    last = [event for event in run.events() if event["kind"] == "step"][-1]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "run": str(run.path),
                    "steps": last["step"],
                    "loss": last["loss"],
                    "checkpoint": str(run.complete_checkpoints()[-1]),
                }
            )
        )
    say(
        f"{run.path}: {last['step']} steps, last loss {last['loss']:.4f}. Next: prefopt evaluate {run.path} and prefopt report {run.path}"
    )


def _dry_run(config: object, *, as_json: bool) -> None:
    import yaml

    from prefopt.core.config import RunConfig
    from prefopt.data.audit import audit_lines
    from prefopt.data.pack import total_steps
    from prefopt.model.load import load_tokenizer, model_facts
    from prefopt.model.precision import compute_dtype, pick_device
    from prefopt.pipeline import memory_estimate, prepare_rows

    assert isinstance(config, RunConfig)
    facts = model_facts(config.model.name, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    rows = prepare_rows(config, load_tokenizer(config.model.name, revision=config.model.revision), facts.context_tokens)
    steps = total_steps(
        len(rows.train.groups),
        epochs=config.train.epochs,
        groups_per_step=config.train.groups_per_step,
        max_steps=config.train.max_steps,
    )
    dtype, why = compute_dtype(config.train.precision, pick_device())
    memory = memory_estimate(
        facts.parameters,
        dtype_bytes=dtype.itemsize,
        micro_batch_tokens=config.train.micro_batch_tokens,
        hidden=facts.hidden,
        layers=facts.layers,
        vocabulary=facts.vocabulary,
    )
    unique = sum(group.unique_tokens for group in rows.train.groups)
    summary = {
        "config": config.resolved(),
        "audit": rows.audit,
        "train_groups": len(rows.train.groups),
        "held_out_groups": len(rows.held_out.groups),
        "unique_tokens": unique,
        "steps": steps,
        "parameters": facts.parameters,
        "memory_bytes": memory,
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    typer.echo(yaml.safe_dump(config.resolved(), sort_keys=False).rstrip())
    typer.echo("\n" + "\n".join(audit_lines(rows.audit)) + "\n")
    typer.echo(
        f"{len(rows.train.groups)} groups to train on, {len(rows.held_out.groups)} held out, {unique} unique tokens an epoch, {steps} steps"
    )
    typer.echo(f"{facts.parameters / 1e6:.1f} M parameters; {why}; estimated memory {sum(memory.values()) / 2**30:.1f} GiB:")
    for part, size in memory.items():
        typer.echo(f"  {size / 2**30:6.2f} GiB  {part}")
