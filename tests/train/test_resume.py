"""A run that was killed, stopped or damaged goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli.command_line import prefopt
from prefopt.core.config import RunConfig
from prefopt.core.errors import StorageError, TrainingError
from prefopt.core.events import read_events
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder
from prefopt.pipeline import train_run
from prefopt.train import checkpoint, observers
from prefopt.train.loop import Training
from train.tiny_runs import preference_rows, stop_after, tiny_config, write_rows

pytestmark = pytest.mark.slow

STEPS = 6
MEASURED = ("loss", "rewards/margins", "logps/chosen", "grad_norm", "lr", "num_tokens", "epoch")


def config_of(folder: Path, name: str, **train: Any) -> RunConfig:
    values = {"max_steps": STEPS, "save_every_steps": 1, "output_dir": str(folder / name), **train}
    return tiny_config(folder, train=values)


def recipe_of(config: RunConfig, path: Path) -> Path:
    path.write_text(json.dumps(config.resolved()), encoding="utf-8")
    return path


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def unbroken(tmp_path: Path, one_thread: None) -> RunFolder:
    return train_run(config_of(tmp_path, "unbroken"))


def losses(run: RunFolder) -> list[tuple[float, ...]]:
    return [tuple(event[name] for name in MEASURED) for event in run.events() if event["kind"] == "step"]


def assert_same_run(run: RunFolder, unbroken: RunFolder) -> None:
    """Weights, optimizer state and history, bit by bit."""
    ours, theirs = run.complete_checkpoints()[-1], unbroken.complete_checkpoints()[-1]
    assert ours.name == theirs.name == f"step-{STEPS:06d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(ours / file), load_file(theirs / file)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert json.loads((ours / "training.json").read_text()) == json.loads((theirs / "training.json").read_text())
    assert losses(run) == losses(unbroken)
    assert [event["step"] for event in run.events() if event["kind"] == "step"] == list(range(1, STEPS + 1))


SLOW_STEPS = """
import os, signal, time, torch
torch.set_num_threads(1)
from prefopt.train import checkpoint, loop
step = loop.Training.train_step
def slow(self, groups):
    time.sleep(0.05)
    return step(self, groups)
loop.Training.train_step = slow
sync = checkpoint._sync
def killed(folder):
    if "step-000004" in folder.name and os.environ.get("KILL") == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    sync(folder)
checkpoint._sync = killed
remove = checkpoint.shutil.rmtree
def killed_after_one_file(folder, **how):
    if "step-000003" in folder.name and folder.is_dir() and os.environ.get("KILL") == "removing":
        (folder / "optimizer.safetensors").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    remove(folder, **how)
checkpoint.shutil.rmtree = killed_after_one_file
from prefopt.cli import main
main()
"""


def start_command(*words: object, kill: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL": kill}
    command = [sys.executable, "-c", SLOW_STEPS, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(event["kind"] == "step" and event["step"] >= step for event in read_events(path)):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not seen: {process.communicate()}")


@pytest.mark.parametrize("kill", ["anywhere", "writing", "removing"])
def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path, unbroken: RunFolder, kill: str) -> None:
    config = config_of(tmp_path, "killed")
    process = start_command("train", recipe_of(config, tmp_path / "recipe.yaml"), kill=kill)
    run = RunFolder(Path(config.train.output_dir))
    if kill == "anywhere":
        wait_for_step(run.events_path, random.randint(2, STEPS - 1), process)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    if kill == "writing":
        assert [path.name for path in run.complete_checkpoints()] == ["step-000003"]
        assert (run.checkpoints / ".step-000004.partial").is_dir()
    if kill == "removing":
        assert [path.name for path in run.complete_checkpoints()] == ["step-000004"]
        assert (run.checkpoints / ".step-000003.removed").is_dir()
    assert len(run.complete_checkpoints()) >= 1
    train_run(config, resume=True)
    assert_same_run(run, unbroken)
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{STEPS:06d}"]


def test_ctrl_c_on_the_command_saves_and_says_how_to_go_on(tmp_path: Path, unbroken: RunFolder) -> None:
    config = config_of(tmp_path, "stopped", save_every_steps=None)
    process = start_command("train", recipe_of(config, tmp_path / "recipe.yaml"))
    run = RunFolder(Path(config.train.output_dir))
    wait_for_step(run.events_path, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and out == ""
    assert f"Go on with: prefopt train {run.path / 'config.json'} --resume" in err
    train_run(config, resume=True)
    assert_same_run(run, unbroken)


def test_ctrl_c_finishes_the_step_saves_and_the_printed_command_goes_on(
    tmp_path: Path, unbroken: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "stopped run", save_every_steps=None)
    step = Training.train_step

    def interrupted(self: Training, groups: Any) -> Any:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, groups)

    monkeypatch.setattr(Training, "train_step", interrupted)
    done = prefopt("train", recipe_of(config, tmp_path / "recipe.yaml"))
    monkeypatch.undo()
    run = RunFolder(Path(config.train.output_dir))
    assert done.code == 130
    assert "error: Stopped after step 3 of 6; a checkpoint is saved\n  Go on with: prefopt train '" in done.err
    assert [path.name for path in run.complete_checkpoints()] == ["step-000003"]
    assert [event["kind"] for event in run.events()][-2:] == ["checkpoint", "stop"]
    import shlex

    words = shlex.split(done.err.rsplit("Go on with: ", 1)[1])
    assert prefopt(*words[1:]).code == 0
    assert_same_run(run, unbroken)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: Training, groups: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "train_step", twice)
    done = prefopt("train", recipe_of(config_of(tmp_path, "stopped"), tmp_path / "recipe.yaml"))
    assert done.code == 130
    assert "error: stopped at once; nothing was saved after the last checkpoint" in done.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_resumed_from_any_step_equals_the_unbroken_one(tmp_path: Path, unbroken: RunFolder, step: int) -> None:
    config = config_of(tmp_path, "broken")
    stop_after(step, config)
    assert_same_run(train_run(config, resume=True), unbroken)


def test_bf16_resumes_bit_by_bit_from_its_masters(tmp_path: Path, one_thread: None) -> None:
    whole = train_run(config_of(tmp_path, "whole", precision="bf16"))
    config = config_of(tmp_path, "broken", precision="bf16")
    stop_after(3, config)
    assert_same_run(train_run(config, resume=True), whole)


@pytest.mark.parametrize("damage", ["truncated weights", "truncated optimizer", "no manifest", "no optimizer"])
def test_a_half_written_checkpoint_is_never_loaded_the_one_before_is(tmp_path: Path, unbroken: RunFolder, damage: str) -> None:
    config = config_of(tmp_path, "broken", keep_last=3)
    run = stop_after(4, config)
    newest = run.complete_checkpoints()[-1]
    shutil.copytree(newest, newest.with_name(".step-000009.partial"))
    file = newest / {"truncated weights": "model.safetensors", "no manifest": "manifest.json"}.get(
        damage, "optimizer.safetensors"
    )
    if damage.startswith("truncated"):
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    assert [path.name for path in run.complete_checkpoints()] == ["step-000002", "step-000003"]
    train_run(config, resume=True)
    assert [event["step"] for event in _all_events(run) if event["kind"] == "resume"] == [3]
    assert_same_run(run, unbroken)


def _all_events(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events_path.read_text().splitlines()]


def test_a_failed_save_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "full", keep_last=1)
    save = checkpoint.save_file

    def full(state: Any, path: Path) -> None:
        if "step-000003" in str(path):
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        save(state, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        train_run(config)
    run = RunFolder(Path(config.train.output_dir))
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    assert [event["kind"] for event in run.events()][-1] == "error"
    assert "the disk is full" in run.events()[-1]["message"]


def test_an_error_at_the_last_checkpoint_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, path: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = config_of(tmp_path, "full", save_every_steps=None)
    with pytest.raises(StorageError):
        train_run(config)
    assert [event["kind"] for event in RunFolder(Path(config.train.output_dir)).events()][-1] == "error"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"train": "other.jsonl"}}, "its data was"),
        ({"loss": {"beta": 0.2}}, "its loss was"),
        ({"train": {"groups_per_step": 4}}, "its groups_per_step was 8 and is now 4"),
        ({"data": {"seed": 5}}, "its data_seed was 0 and is now 5"),
        ({"reference": {"model": "other"}}, "its reference was"),
    ],
)
def test_a_run_is_not_resumed_with_another_meaning(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    config = config_of(tmp_path, "broken")
    stop_after(2, config)
    write_rows(tmp_path / "other.jsonl", preference_rows(39))
    from train.tiny_runs import write_model

    write_model(tmp_path / "other", seed=7)
    values = config.resolved()
    for section, options in change.items():
        for key, value in options.items():
            values[section][key] = str(tmp_path / value) if isinstance(value, str) else value
    with pytest.raises(TrainingError, match=f"cannot be resumed, {named}"):
        train_run(resolve_config(values), resume=True)
    assert losses(RunFolder(tmp_path / "broken"))


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, unbroken: RunFolder) -> None:
    before = unbroken.events_path.read_bytes()
    with pytest.raises(StorageError, match="already holds a run"):
        train_run(config_of(tmp_path, "unbroken"))
    assert unbroken.events_path.read_bytes() == before


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    run = train_run(config_of(tmp_path, "run", keep_last=keep))
    assert [path.name for path in run.complete_checkpoints()] == [f"step-{s:06d}" for s in range(STEPS - keep + 1, STEPS + 1)]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_checkpoint_is_kept_even_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    measured = iter([0.3, 0.6, 0.4, 0.5, 0.7, 0.45, 0.9])  # the first is before any step: nothing to keep
    true = observers.held_out_metrics

    def scripted(values: Any) -> dict[str, Any]:
        return {**true(values), "eval/loss": next(measured)}

    monkeypatch.setattr(observers, "held_out_metrics", scripted)
    values = config_of(tmp_path, "run", keep_last=1, eval_every_steps=None).resolved()
    values["data"]["eval_rows"] = 6
    values["train"] |= {"eval_every_steps": 1, "keep_best": True}
    config = resolve_config(values)
    if resumed:
        stop_after(3, config)
    run = train_run(config, resume=resumed)
    assert [path.name for path in run.complete_checkpoints()] == ["step-000002", "step-000006"]
