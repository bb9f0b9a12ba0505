"""A frontier as a command: what is made once, what is found again, and that a killed one ends as the unbroken one does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from cli.command_line import prefopt
from prefopt import frontier as module
from prefopt import stages as stages_module
from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError, TrainingError
from prefopt.core.events import EventLog
from prefopt.core.files import write_json
from prefopt.core.frontier_recipe import Asked, FrontierPlan, expand_frontier
from prefopt.core.run_folder import RunFolder
from prefopt.evaluate.frontier import exactly
from prefopt.frontier import keeping, key_of, make_frontier, planned_steps, spaced
from prefopt.train.checkpoint import prune_checkpoints
from train.tiny_runs import write_model, write_rows


class Killed(BaseException):
    """As a kill: nothing catches it."""


class World:
    """Fakes of training and measuring that count what they do, and are killed at the wanted moment."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.kill_at = -1
        self.moments = 0
        self.diverges = ""
        self.interrupted = ("", 0)  # beginning of a run's name, step

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.kill_at:
            raise Killed

    def train(self, config: RunConfig, *, resume: bool = False) -> RunFolder:
        run = RunFolder(Path(config.train.output_dir))
        run.path.mkdir(parents=True, exist_ok=True)
        log = EventLog(run.events_path)
        saved = [int(folder.name[5:]) for folder in run.complete_checkpoints()]
        if not resume:
            run.write("config.json", config.resolved())
            log.write("start", step=0)
        else:
            log.write("resume", step=saved[-1])
        for step in range(saved[-1] + 1 if saved else 1, 9):
            self.moment()
            self.done.append(f"{run.path.name} trains {step}")
            log.write("step", step=step, loss=0.5)
            if run.path.name.startswith(self.diverges or "nothing"):
                log.write("error", step=step, message="the loss is not finite")
                raise TrainingError("the loss is not finite", todo="Lower train.lr.")
            interrupted = run.path.name.startswith(self.interrupted[0] or "nothing") and step == self.interrupted[1]
            if interrupted or step % int(config.train.save_every_steps or 8) == 0:
                folder = run.checkpoints / f"step-{step:06d}"
                folder.mkdir(parents=True)
                write_json(folder / "manifest.json", {"step": step, "files": {}})
                prune_checkpoints(run.checkpoints, keep_last=config.train.keep_last, keep=set())
            if interrupted:
                raise KeyboardInterrupt
        self.moment()
        log.write("end", step=8)
        return run

    def measure(self, policy: str, *_: Any, **__: Any) -> dict[str, Any]:
        self.moment()
        name = f"{Path(policy).parts[-3]} {Path(policy).name}"
        self.done.append(f"measures {name}")
        number = sum(map(ord, name)) % 97  # anything that depends on the policy alone
        interval = {"value": number / 7, "low": number / 8, "high": number / 6, "n": 3}
        return {"reward": interval, "kl": interval, "more": {"tokens": number}}

    def measure_reference(self, *_: Any, **__: Any) -> dict[str, Any]:
        self.moment()
        self.done.append("measures reference")
        return {"reward": exactly(1.0, 3), "kl": exactly(0.0, 3), "more": {"tokens": 1.0}}

    def measure_best(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        self.moment()
        self.done.append("measures best-of-n")
        return [{"n": n, "reward": exactly(float(n)), "kl": exactly(n / 2), "more": {}} for n in (1, 2)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "eval.txt").write_text("What of it?\nAnd now?\n")
    found = World()
    monkeypatch.setattr(stages_module, "train_run", found.train)
    monkeypatch.setattr(module, "load_model", lambda name, precision: name)
    monkeypatch.setattr(module, "policy_point", found.measure)
    monkeypatch.setattr(module, "reference_point", found.measure_reference)
    monkeypatch.setattr(module, "best_of_n_points", found.measure_best)
    monkeypatch.setattr(module, "save_frontier_figure", lambda path, *_, **__: path.touch())
    return found


def recipe(**section: Any) -> dict[str, Any]:
    return {
        "model": {"name": "base"},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 8},
        "frontier": {
            "evaluation": {"prompts": "eval.txt", "reward": "length", "samples_per_prompt": 2},
            "methods": {"dpo": {}, "sft": {}, "best-of-n": {"n": 2}},
            "betas": [0.1, 0.5],
            **section,
        },
    }


def plan(output: Path, *words: str, given: dict[str, Any] | None = None, **asked: Any) -> FrontierPlan:
    return expand_frontier(given or recipe(), words, output=output, asked=Asked(**asked))


def run(output: Path, *words: str, **options: Any) -> dict[str, Any]:
    return make_frontier(plan(output, *words), output, **options)


def test_runs_are_trained_evaluated_at_checkpoints_and_put_into_one_table(world: World, tmp_path: Path) -> None:
    found = run(tmp_path / "out")
    counted = Counter(point["method"] for point in found["points"])
    assert counted == {"reference": 1, "best-of-n": 2, "dpo": 8, "sft": 4}
    steps = [(point["beta"], point["step"]) for point in found["points"] if point["method"] == "dpo"]
    assert steps == [(beta, step) for beta in (0.1, 0.5) for step in (2, 4, 6, 8)]
    assert found["complete"] and json.loads((tmp_path / "out/frontier.json").read_text()) == found
    assert len((tmp_path / "out/frontier.csv").read_text().splitlines()) == 16
    assert (tmp_path / "out/frontier.png").exists() and (tmp_path / "out/frontier.svg").exists()


def test_nothing_is_made_twice(world: World, tmp_path: Path) -> None:
    first = run(tmp_path / "out")
    before = list(world.done)
    assert run(tmp_path / "out") == first and world.done == before
    run(tmp_path / "out", "frontier.betas=[0.1,0.5,1]")
    added = Counter(name.split("-seed0")[0] for name in world.done[len(before) :])
    assert added == {"dpo-1": 8, "measures dpo-1": 4}, "one more beta is one more run"


def test_evaluations_in_another_precision_are_others(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is bf16 on one machine and fp32 on another: one table never holds both."""
    precisions: list[str] = []

    def load(name: str, precision: str) -> str:
        precisions.append(precision)
        return name

    monkeypatch.setattr(module, "load_model", load)
    run(tmp_path / "out", "train.precision=fp32")
    assert set(precisions) == {"fp32"} and len(precisions) == 3 * 4 + 1
    before = list(world.done)
    run(tmp_path / "out", "train.precision=fp32", "frontier.evaluation.precision=bf16")
    added = world.done[len(before) :]
    assert len(added) == 3 * 4 + 1 and all("measures" in name for name in added), "no run is trained again"
    run(tmp_path / "out", "train.precision=fp32", "frontier.evaluation.precision=auto")
    assert len(world.done) == len(before) + len(added), "auto is fp32 where bf16 is not native"


MOMENTS = 3 * (8 + 1) + 3 * 4 + 1  # steps and ends of three runs, their evaluations, and that of best-of-n


@pytest.mark.parametrize("when", range(1, MOMENTS + 1, 4))
def test_a_killed_frontier_ends_as_the_unbroken_one(world: World, tmp_path: Path, when: int) -> None:
    """Killed at a moment, started again, and killed once more later: the same table, and no finished work done again."""
    world.kill_at = when
    with pytest.raises(Killed):
        run(tmp_path / "out")
    world.kill_at = world.moments + 6
    with contextlib.suppress(Killed):
        run(tmp_path / "out")
    world.kill_at = -1
    broken = run(tmp_path / "out")
    measured = Counter(name for name in world.done if name.startswith("measures"))
    assert max(measured.values()) == 1
    trained = Counter(name for name in world.done if "trains" in name)
    repeated = [name for name, times in trained.items() if times > 1]
    assert all(int(name.split()[-1]) % 2 for name in repeated), "only steps behind the last checkpoint"
    shutil.rmtree(tmp_path / "out")
    assert run(tmp_path / "out") == broken


def test_the_checkpoint_of_an_interruption_is_no_point(world: World, tmp_path: Path) -> None:
    for step in (3, 7):
        world.interrupted = ("dpo-0.5", step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    world.interrupted = ("", 0)
    broken = run(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert run(tmp_path / "out") == broken


def test_two_commands_share_the_work_and_end_with_one_table(world: World, tmp_path: Path) -> None:
    """What another command holds comes last, when that lets go of it; nothing is trained by both."""
    (tmp_path / "out" / "locks").mkdir(parents=True)
    tables: list[dict[str, Any]] = []
    work = threading.Thread(target=lambda: tables.append(run(tmp_path / "out")))
    with FileLock(tmp_path / "out" / "locks" / "dpo-0.1-seed0.lock"):
        work.start()
        deadline = time.monotonic() + 60
        while not any(name.startswith("measures sft") and name.endswith("8") for name in world.done):
            assert work.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        assert any(name.startswith("dpo-0.5") for name in world.done)
        assert not any(name.startswith("dpo-0.1") for name in world.done)
    work.join(60)
    alone = run(tmp_path / "out")
    assert tables == [alone] and max(Counter(world.done).values()) == 1
    assert [point["method"] for point in alone["points"]][3::4] == ["dpo", "dpo", "sft"], "in the order of the plan"


def test_the_reference_is_best_of_one_and_is_measured_alone_without_best_of_n(world: World, tmp_path: Path) -> None:
    reference, one, _ = run(tmp_path / "out")["points"][:3]
    assert (one["method"], one["n"], one["reward"]) == ("best-of-n", 1, reference["reward"])
    assert "measures reference" not in world.done
    make_frontier(plan(tmp_path / "out", methods=["dpo"]), tmp_path / "out")
    assert world.done.count("measures reference") == 1


def test_a_frontier_found_under_another_path_is_the_same(world: World, tmp_path: Path) -> None:
    run(tmp_path / "out")
    done = len(world.done)
    (tmp_path / "out").rename(tmp_path / "moved")
    run(tmp_path / "moved")
    assert len(world.done) == done


def test_other_rows_options_or_prompts_are_other_runs_and_evaluations(world: World, tmp_path: Path) -> None:
    run(tmp_path / "out")
    done = len(world.done)
    (tmp_path / "eval.txt").write_text("Other?\n")
    run(tmp_path / "out")
    assert all(name.startswith("measures") for name in world.done[done:]) and len(world.done) - done == 1 + 8 + 4
    done = len(world.done)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    run(tmp_path / "out")
    assert sum("trains" in name for name in world.done[done:]) == 3 * 8


def test_a_run_that_was_removed_is_trained_and_measured_again(world: World, tmp_path: Path) -> None:
    run(tmp_path / "out")
    done = len(world.done)
    folder = next((tmp_path / "out" / "runs").glob("sft-*"))
    shutil.rmtree(folder)
    run(tmp_path / "out")
    assert sum("trains" in name for name in world.done[done:]) == 8
    assert sum("measures" in name for name in world.done[done:]) == 4


def test_pruned_runs_keep_their_points(world: World, tmp_path: Path) -> None:
    first = run(tmp_path / "out", prune=True)
    for folder in (tmp_path / "out" / "runs").iterdir():
        assert [path.name for path in RunFolder(folder).complete_checkpoints()] == ["step-000008"]
    done = len(world.done)
    assert run(tmp_path / "out") == first and len(world.done) == done


def test_a_run_that_diverges_is_left_out_and_said(world: World, tmp_path: Path) -> None:
    world.diverges = "dpo-0.5"
    found = run(tmp_path / "out")
    assert [one["error"] for one in found["failed"]] == ["the loss is not finite"]
    assert Counter(point["method"] for point in found["points"])["dpo"] == 4
    done = len(world.done)
    assert run(tmp_path / "out")["failed"] == found["failed"] and len(world.done) == done


def test_the_command_prints_the_table_and_takes_lists(world: World, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe()))  # JSON is YAML
    words = ["frontier", "recipe.yaml", "-o", "out", "--methods", "dpo,best-of-n", "--betas", "0.1, 0.3", "--seeds", "0,1"]
    done = prefopt(*words, "--checkpoints", 1)
    assert done.code == 0, done.err
    assert sum(line[2:].startswith("dpo ") for line in done.out.splitlines()) == 4
    found = json.loads(prefopt(*words, "--checkpoints", 1, "--json").out)
    assert [(one["beta"], one["seeds"]) for one in found["over_seeds"]] == [(0.1, 2), (0.3, 2)]
    for wrong, said in (
        (["--betas", "a,b"], '--betas: "a,b" is not a list of numbers'),
        (["--methods", ","], "the list is empty"),
    ):
        refused = prefopt("frontier", "recipe.yaml", "-o", "out", *wrong)
        assert refused.code == 2 and said in refused.err


def test_all_is_checked_before_anything_is_trained(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'method sft: data.train: "none.jsonl" is not there'):
        run(tmp_path / "out", "frontier.methods.sft.data.train=none.jsonl")
    with pytest.raises(DataError, match=r"missing.txt"):
        run(tmp_path / "out", "frontier.evaluation.prompts=missing.txt")
    assert world.done == [] and not (tmp_path / "out").exists()


def test_how_a_run_is_kept_is_no_part_of_its_key(world: World, tmp_path: Path) -> None:
    config = plan(tmp_path / "out").jobs[0].config
    assert key_of(keeping(config, 2)) == key_of(keeping(config, 4)) == key_of(config)
    other = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.5})})
    assert key_of(other) != key_of(config)
    kept = keeping(config, 3)
    assert (kept.train.save_every_steps, kept.train.keep_last, planned_steps(config)) == (3, 10**6, 8)


@given(st.lists(st.integers(1, 500), unique=True, min_size=1, max_size=30), st.integers(1, 12))
def test_spaced_steps_are_as_many_as_asked_and_end_with_the_last(steps: list[int], count: int) -> None:
    steps = sorted(steps)
    found = spaced(steps, count)
    assert len(found) == min(count, len(steps)) == len(set(found))
    assert found == sorted(found) and found[-1] == steps[-1]


RECIPE = """
model: {{name: {model}}}
data: {{train: rows.jsonl}}
train: {{max_steps: 4, groups_per_step: 4, precision: fp32, lr: 1.0e-2}}
stages:
  - {{name: start, loss: {{name: sft}}}}
frontier:
  defaults: {{model: {{name: "{{start}}"}}}}
  evaluation: {{prompts: eval.txt, reward: length, samples_per_prompt: 2, max_new_tokens: 6}}
  checkpoints: 2
  betas: [0.1]
  methods: {{dpo: {{}}, sft: {{}}, best-of-n: {{n: 4}}}}
"""


@pytest.mark.slow
def test_the_command_killed_by_the_system_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs of a tiny model, with kill -9 as soon as the first run's first evaluation is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "eval.txt").write_text("What of the river?\nWhat of a stone?\nWhat of my boat?\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=write_model(tmp_path / "model")))
    command = [sys.executable, "-m", "prefopt", "frontier", "recipe.yaml", "-o", "out"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/evaluations/dpo-*.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/evaluations/*.json")}
    done = prefopt("frontier", "recipe.yaml", "-o", "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert all(path.stat().st_mtime_ns == then for path, then in written.items()), "no evaluation is made again"
    whole = prefopt("frontier", "recipe.yaml", "-o", "whole", "--json")
    assert whole.code == 0, whole.err
    unbroken = json.loads(whole.out)

    def numbers(table: dict[str, Any]) -> list[Any]:
        return [{key: value for key, value in point.items() if key != "run"} for point in table["points"]]

    assert numbers(found) == numbers(unbroken)
    assert Counter(point["method"] for point in found["points"]) == {"reference": 1, "best-of-n": 3, "dpo": 2, "sft": 2}
    kl = {(point["method"], point["step"]): point["kl"]["value"] for point in found["points"]}
    assert kl["reference", None] == 0 and kl["sft", 4] > 0.1
