"""Recipes of several stages: train those that are not finished, in order; each is a run folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, DataError, Interrupted, StorageError
from prefopt.core.files import check_writable
from prefopt.core.progress import say
from prefopt.core.run_folder import RunFolder
from prefopt.core.run_state import check_same_config, ended, run_state, started
from prefopt.core.stages import Stage
from prefopt.pipeline import train_run
from prefopt.rollout.prompts import read_prompts
from prefopt.rollout.rewards import load_reward
from prefopt.train.requirements import check_machine


def train_stages(stages: Sequence[Stage], *, resume: bool = False) -> list[RunFolder]:
    """Train every stage that is not finished, and return the run folders of all, in their order.

    A finished stage is skipped; one that was interrupted goes on from its newest checkpoint, or starts again where it has
    none. One that ended with an error goes on with `resume` only. Everything that can be checked of all stages is
    checked before the first one starts. Raises what `train_run` raises, ConfigError and DataError for a stage that could
    never run, StorageError for a folder with another run than the stage's.
    """
    check_stages(stages)
    return [finished_run(stage.config, title=f"stage {stage.name}", resume=resume) for stage in stages]


def check_stages(stages: Sequence[Stage]) -> None:
    """What can be known of the stages before any of them runs; raises as `train_stages`."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        title, run = f"stage {stage.name}", RunFolder(stage.folder)
        if run_state(run) not in ("new", "unsaved"):
            check_same_config(run, stage.config, title=title)
            for name in stage.uses:
                _check_order(stage, run, by_name[name])
        if run_state(run) != "complete":
            check_inputs(stage.config, [by_name[name].folder for name in stage.uses], title=title)
    if stages:
        check_writable(stages[0].folder.parent)


def _check_order(stage: Stage, run: RunFolder, used: Stage) -> None:
    other = RunFolder(used.folder)
    if run_state(other) != "complete" or ended(other) > started(run):
        raise StorageError(
            f"stage {stage.name}: {run.path} was trained on another run of stage {used.name} than the one that is there now",
            todo=f"Remove {run.path} to train it again on the new one.",
        )


def check_inputs(config: RunConfig, made_before: Sequence[Path], *, title: str) -> None:
    """Check machine, rows, prompts and reward of a run, as far as they are not below the folders `made_before`.

    ConfigError or DataError begins with `title`.
    """
    try:
        check_machine(config)
        rollout = config.rollout
        if rollout is None and config.data.train is None:
            raise ConfigError("data.train: there are no rows to train on", todo="Set data.train=FILE or a Hub dataset id.")
        for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if file is not None and not _is_below(file, made_before):
                _check_rows_file(key, file)
        if rollout is not None and not _is_below(rollout.prompts, made_before):
            read_prompts(rollout.prompts)
        if rollout is not None and not rollout.reward.startswith(("model:", "implicit:")):
            load_reward(rollout.reward)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{title}: {error.what}", todo=error.todo) from None


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    return any(folder == Path(path) or folder in Path(path).parents for folder in folders)


def _check_rows_file(key: str, file: str) -> None:
    """A Hub id has no suffix and no folder here; what it holds is seen when it is read."""
    path = Path(file)
    if not path.exists() and (path.suffix or path.is_absolute()):
        raise DataError(f'{key}: "{file}" is not there', todo="Check the path: it is read from the current folder.")


def finished_run(config: RunConfig, *, title: str, resume: bool = False, known: bool = False) -> RunFolder:
    """The run of `config`, trained to its end now or before; one line says which.

    `known`: the folder is named by content, so that paths in its configuration may have changed. StorageError where it
    holds another run, or one that ended with an error and `resume` is not given.
    """
    run = RunFolder(Path(config.train.output_dir))
    state = run_state(run)
    if state not in ("new", "unsaved") and not known:
        check_same_config(run, config, title=title)
    if state == "complete":
        say(f"{title}: finished before, {run.path}")
        return run
    if state == "lost":
        raise StorageError(f"{title}: {run.path} is finished, and has no checkpoint", todo="Remove it to train it again.")
    saved = run.complete_checkpoints()
    if state == "failed" and not (resume and saved):
        raise StorageError(f"{title}: {run.path} ended with an error: {failure(run)}", todo=_way_out(run, bool(saved)))
    if saved:
        say(f"{title}: goes on from {saved[-1].name} in {run.path}")
    elif state == "unsaved":
        say(f"{title}: starts again, it stopped before its first checkpoint; {run.path}")
        run.events_path.unlink()
    else:
        say(f"{title}: starts, {run.path}")
    try:
        return train_run(config, resume=bool(saved))
    except Interrupted as error:
        todo = "Go on with the same command: what is finished is skipped, this run goes on from its checkpoint."
        raise Interrupted(f"{title}: {error.what}", todo=todo) from None


def failure(run: RunFolder) -> str:
    """What the last error of a run said, on one line."""
    said = [str(event.get("message", "")) for event in run.events() if event["kind"] == "error"]
    return said[-1].splitlines()[0] if said and said[-1] else "it says none"


def _way_out(run: RunFolder, saved: bool) -> str:
    again = f"Mend the cause and remove {run.path} to start it again"
    return f"{again}, or go on from its newest checkpoint with --resume." if saved else f"{again}."


def plan_config(stage: Stage, stages: Sequence[Stage]) -> RunConfig:
    """The configuration of `stage` with what exists now, to plan with.

    A policy that an unfinished stage will make is that stage's own start, which has the same shape; a reward model that is
    not trained yet is left out of the plan, with a line.
    """
    start = {str(one.folder): one for one in stages if run_state(RunFolder(one.folder)) != "complete"}

    def known(name: str) -> str:
        return known(start[name].config.model.name) if name in start else name

    config = stage.config
    sections: dict[str, Any] = {"model": config.model.model_copy(update={"name": known(config.model.name)})}
    if config.reference.model is not None:
        sections["reference"] = config.reference.model_copy(update={"model": known(config.reference.model)})
    if config.rollout is not None and config.rollout.reward.partition(":")[2] in start:
        say(f"stage {stage.name}: the reward {config.rollout.reward} is not trained yet, and its memory is not in the plan")
        sections["rollout"] = config.rollout.model_copy(update={"reward": "length"})
    return config.model_copy(update=sections)
