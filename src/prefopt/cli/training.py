"""The verbs train and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli.data import JsonOption

if TYPE_CHECKING:
    from prefopt.core.config import RunConfig
    from prefopt.core.run_folder import RunFolder
    from prefopt.core.stages import Stage
    from prefopt.planning import RunPlan


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
    """Train on preference rows, or on the policy's own samples; a recipe with stages trains them one after another."""
    from prefopt.core.progress import say, set_quiet
    from prefopt.core.resolve import option_table

    if as_json:
        set_quiet(True)
    if options:
        table = option_table()
        typer.echo(
            json.dumps(table) if as_json else "\n".join(f"{key} = {default}\n    {about}" for key, default, about in table)
        )
        return
    config = _config_of(recipe, overrides, verb="train")
    if isinstance(config, tuple):
        from prefopt.cli.stages import dry_run_stages, train_all

        if dry_run:
            dry_run_stages(config, as_json=as_json)
        else:
            train_all(config, resume=resume, as_json=as_json)
        return
    if dry_run:
        _dry_run(config, as_json=as_json)
        return
    from prefopt.pipeline import train_run

    run = train_run(config, resume=resume)
    found = run_summary(run)
    if as_json:
        typer.echo(json.dumps(found))
    measure = f"prefopt evaluate {run.path}"
    if config.loss.facts[0].trains_reward_model:
        measure = f"prefopt score --reward-model {run.path} ROWS -o scores.jsonl"
    say(f"{run.path}: {found['steps']} steps, last loss {found['loss']:.4f}. Next: {measure} and prefopt report {run.path}")


def run_summary(run: RunFolder) -> dict[str, Any]:
    """The run folder, its steps, its last loss and its newest checkpoint."""
    last = [event for event in run.events() if event["kind"] == "step"][-1]
    return {
        "run": str(run.path),
        "steps": last["step"],
        "loss": last["loss"],
        "checkpoint": str(run.complete_checkpoints()[-1]),
    }


def _config_of(recipe: Path | None, overrides: list[str] | None, *, verb: str) -> RunConfig | tuple[Stage, ...]:
    """The configuration of a recipe and key=value words, or its stages; without a recipe the first word stands in its place."""
    from prefopt.core.errors import ConfigError
    from prefopt.core.resolve import read_recipe, resolve_config
    from prefopt.core.stages import expand_stages, is_staged

    words = list(overrides or [])
    if recipe is not None and "=" in str(recipe):
        words.insert(0, str(recipe))
        recipe = None
    if recipe is None and not words:
        raise ConfigError(
            f"{verb}: there is no recipe",
            todo=f"For example: prefopt {verb} recipes/dpo-hh.yaml, or prefopt {verb} data.train=rows.jsonl",
        )
    values = read_recipe(recipe) if recipe else {}
    resolved = expand_stages if is_staged(values) else resolve_config
    return resolved(values, words, source=str(recipe or ""))


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe, or the config.json of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB that the program may hold; by default what is free here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run will need: memory by part, whether it fits, what would make it fit, and how long it takes. Trains nothing.

    The exit code is 1 where it does not fit.
    """
    from prefopt.core.progress import set_quiet

    if as_json:
        set_quiet(True)
    config = _config_of(recipe, overrides, verb="plan")
    if isinstance(config, tuple):
        from prefopt.cli.stages import plan_stages

        plan_stages(config, memory, as_json=as_json)
        return
    made, summary = planned(config, memory)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join(plan_lines(made, summary)))
    if not made.fits:
        raise typer.Exit(1)


def planned(config: RunConfig, memory_gib: float | None = None) -> tuple[RunPlan, dict[str, Any]]:
    """The plan of a run, and the same as plain values."""
    from prefopt.model.precision import matmul_flops
    from prefopt.planning import plan_run

    made = plan_run(config, total=round(memory_gib * 2**30) if memory_gib is not None else None)
    speed = matmul_flops(made.machine.device, made.machine.dtype)
    found = made.memory
    summary = {
        "train_groups": len(made.rows.train.groups),
        "held_out_groups": len(made.rows.held_out.groups),
        "unique_tokens": made.unique_tokens,
        "steps": made.steps,
        "parameters": found.weights,
        "trained_parameters": found.trained,
        "micro_batch_tokens": found.micro_batch_tokens,
        "largest_micro_batch": found.largest,
        "memory_bytes": {"program": found.process, **found.parts},
        "reference_pass_bytes": found.reference_pass,
        "peak_bytes": found.peak,
        "total_bytes": made.machine.total,
        "fits": made.fits,
        "changes_that_fit": [{"options": list(change.words), "peak_bytes": change.plan.peak} for change in made.changes],
        "flops": made.flops,
        "matmul_flops_per_second": speed,
        "seconds": made.flops / (_USUAL_SHARE * speed),
    }
    if config.rollout is not None:
        names = ("rounds", "prompts_per_round", "samples_per_prompt", "max_new_tokens")
        summary["rollout"] = {name: getattr(config.rollout, name) for name in names}
    return made, summary


_USUAL_SHARE = 0.6  # of the speed of a large matrix product, that a training step reaches (benchmarks/RESULTS.md)


def plan_lines(made: RunPlan, summary: dict[str, Any]) -> list[str]:
    found, gib = made.memory, 2**30
    trains = f", {found.trained / 1e6:.1f} M train" if found.trained != found.weights else ""
    lines = [
        f"{summary['train_groups']} groups to train on, {summary['held_out_groups']} held out, {made.unique_tokens} unique tokens"
        f" an epoch, {made.steps} steps",
        f"{found.weights / 1e6:.1f} M parameters{trains}; {str(made.machine.dtype).removeprefix('torch.')} on"
        f" {made.machine.device.type}; micro-batches of at most {found.micro_batch_tokens} tokens, the largest {found.largest}",
        "",
    ]
    if drawn := summary.get("rollout"):
        lines[0] = (
            f"{drawn['rounds']} rounds of {drawn['prompts_per_round']} prompts with {drawn['samples_per_prompt']} samples of at most"
            f" {drawn['max_new_tokens']} tokens, {made.steps} steps; memory is planned for the longest"
        )
    lines += [f"  {size / gib:6.2f} GiB  {part}" for part, size in summary["memory_bytes"].items()]
    lines.append(
        f"  {found.peak / gib:6.2f} GiB  peak, of {made.machine.total / gib:.2f} that this program may hold: {_FITS[made.fits]}"
    )
    if found.peak > found.process + sum(found.parts.values()):
        lines.append("  (the peak is the pass that computes the reference's log-probs, before training)")
    if not made.fits:
        lines += ["", "What would fit:"]
        lines += [f"  {change.plan.peak / gib:6.2f} GiB  {' '.join(change.words)}" for change in made.changes]
        if not made.changes:
            lines.append("  none of fewer tokens a pass, recomputed activations and LoRA: a smaller model or shorter rows")
    minutes = summary["seconds"] / 60
    lines += ["", f"roughly {minutes:.0f} min of training" if minutes >= 1 else "less than a minute of training"]
    lines[-1] += f" ({made.flops / 1e12:.3g} TFLOP at {_USUAL_SHARE:.0%} of the measured matrix product speed)"
    if summary.get("rollout"):
        lines[-1] += "; sampling comes on top"
    return lines


_FITS = {True: "fits", False: "does not fit"}


def _dry_run(config: RunConfig, *, as_json: bool) -> None:
    made, summary = planned(config)
    if as_json:
        typer.echo(json.dumps(dry_run_json(config, made, summary), indent=2, ensure_ascii=False))
        return
    typer.echo("\n".join(dry_run_lines(config, made, summary)))


def dry_run_json(config: RunConfig, made: RunPlan, summary: dict[str, Any]) -> dict[str, Any]:
    """Configuration, audit and plan as plain values."""
    return {"config": config.resolved(), "audit": made.rows.audit, **summary}


def dry_run_lines(config: RunConfig, made: RunPlan, summary: dict[str, Any]) -> list[str]:
    """Configuration as YAML, audit (of rows) and plan as text."""
    import yaml

    from prefopt.data.audit import audit_lines

    audit = ["", *audit_lines(made.rows.audit)] if made.rows.audit else []
    return [yaml.safe_dump(config.resolved(), sort_keys=False).rstrip(), *audit, "", *plan_lines(made, summary)]
