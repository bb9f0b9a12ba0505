"""Stages as runs: what is trained, skipped, resumed, started again or refused, and that the command line says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import prefopt
from prefopt import stages as module
from prefopt.core import progress
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, DataError, Interrupted, StorageError
from prefopt.core.events import EventLog
from prefopt.core.files import write_json
from prefopt.core.run_folder import RunFolder
from prefopt.core.run_state import changed_option, run_state
from prefopt.core.stages import Stage, expand_stages
from prefopt.stages import plan_config, train_stages
from train.tiny_runs import write_model, write_rows


class FakeTraining:
    """Stands in for train_run: writes what a run writes, and stops where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.stops: dict[str, str] = {}

    def __call__(self, config: RunConfig, *, resume: bool = False) -> RunFolder:
        run = RunFolder(Path(config.train.output_dir))
        name, log = run.path.name, None
        self.calls.append((name, resume))
        run.path.mkdir(parents=True, exist_ok=True)
        log = EventLog(run.events_path)
        if not resume:
            run.write("config.json", config.resolved())
            log.write("start", step=0)
        else:
            log.write("resume", step=1)
        stop = self.stops.pop(name, "")
        log.write("step", step=1, loss=0.5)
        if stop == "unsaved":
            raise RuntimeError("killed")
        checkpoint(run, 1)
        if stop == "error":
            log.write("error", step=1, message="the loss is not finite\nand more")
            raise RuntimeError("error")
        if stop == "stop":
            log.write("stop", step=1)
            raise Interrupted("Stopped after step 1", todo="resume it")
        if stop:
            raise RuntimeError("killed")
        log.write("step", step=2, loss=0.4)
        log.write("end", step=2)
        return run


def checkpoint(run: RunFolder, step: int) -> None:
    folder = run.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", {"step": step, "files": {}})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    training = FakeTraining()
    monkeypatch.setattr(module, "train_run", training)
    return training


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, ...]:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    return three()


def three(*words: str) -> tuple[Stage, ...]:
    recipe = {
        "data": {"train": "rows.jsonl"},
        "model": {"name": "base"},
        "train": {"output_dir": "out"},
        "stages": [
            {"name": "a", "loss": {"name": "sft"}},
            {"name": "b", "model": {"name": "{a}"}},
            {"name": "c", "model": {"name": "{b}"}, "loss": {"name": "ipo"}},
        ],
    }
    return expand_stages(recipe, words)


def test_stages_run_in_order_and_finished_ones_are_skipped(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    runs = train_stages(stages)
    assert fake.calls == [("a", False), ("b", False), ("c", False)]
    assert [run.path for run in runs] == [stage.folder for stage in stages]
    assert [run.path for run in train_stages(stages)] == [stage.folder for stage in stages]
    assert len(fake.calls) == 3


@pytest.mark.parametrize(
    ("how", "resumed"), [("killed", True), ("unsaved", False)], ids=["behind a checkpoint", "before the first"]
)
def test_a_killed_stage_goes_on_where_it_can(fake: FakeTraining, stages: tuple[Stage, ...], how: str, resumed: bool) -> None:
    fake.stops["b"] = how
    with pytest.raises(RuntimeError):
        train_stages(stages)
    assert run_state(RunFolder(stages[1].folder)) == ("interrupted" if resumed else "unsaved")
    train_stages(stages)
    assert fake.calls == [("a", False), ("b", False), ("b", resumed), ("c", False)]
    starts = [event["kind"] for event in RunFolder(stages[1].folder).events() if event["kind"] == "start"]
    assert starts == ["start"], "events of a start without a checkpoint are not mixed with those of the next one"


def test_a_stopped_stage_says_that_the_same_command_goes_on(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    fake.stops["b"] = "stop"
    with pytest.raises(Interrupted, match=r"stage b: Stopped after step 1\n.*same command"):
        train_stages(stages)
    train_stages(stages)
    assert fake.calls[2:] == [("b", True), ("c", False)]


def test_a_stage_that_failed_goes_on_only_when_asked_to(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    fake.stops["b"] = "error"
    with pytest.raises(RuntimeError):
        train_stages(stages)
    with pytest.raises(StorageError, match=r"stage b: out/b ended with an error: the loss is not finite\n.*--resume"):
        train_stages(stages)
    train_stages(stages, resume=True)
    assert fake.calls[2:] == [("b", True), ("c", False)]


def test_other_options_than_those_of_a_finished_run_are_refused(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    train_stages(stages)
    with pytest.raises(StorageError, match=r"stage c: out/c holds a run with loss.beta=0.1, and now it is 0.2"):
        train_stages(three("stages.c.loss.beta=0.2"))
    train_stages(three("train.keep_last=3", "train.micro_batch_tokens=64"))
    assert len(fake.calls) == 3, "how a run is kept and cut into passes does not make it another one"


def test_a_stage_trained_on_an_older_run_of_another_is_refused(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    train_stages(stages)
    events = stages[0].folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    events.write_text("\n".join(json.dumps({**line, "time": line["time"] + 3600}) for line in lines))
    with pytest.raises(StorageError, match=r"stage b: out/b was trained on another run of stage a"):
        train_stages(stages)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["stages.c.data.train=missing.jsonl"], DataError, 'stage c: data.train: "missing.jsonl" is not there'),
        (["stages.b.data.train=null"], ConfigError, "stage b: data.train: there are no rows"),
        (["stages.c.train.offload_activations=true"], ConfigError, "stage c: train.offload_activations"),
    ],
)
def test_all_stages_are_checked_before_the_first_one_starts(
    fake: FakeTraining, stages: tuple[Stage, ...], words: list[str], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as caught:
        train_stages(three(*words))
    assert str(caught.value).startswith(said) and fake.calls == []
    assert not Path("out").exists()


def test_rows_that_an_earlier_stage_will_write_are_not_asked_for(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    train_stages(three('stages.b.data.train="{a}/rows.jsonl"'))
    assert len(fake.calls) == 3


def test_a_plan_takes_the_start_of_an_unfinished_stage_for_its_end(fake: FakeTraining, stages: tuple[Stage, ...]) -> None:
    assert [plan_config(stage, stages).model.name for stage in stages] == ["base", "base", "base"]
    fake.stops["b"] = "killed"
    with pytest.raises(RuntimeError):
        train_stages(stages)
    assert [plan_config(stage, stages).model.name for stage in stages] == ["base", "out/a", "out/a"]
    assert plan_config(stages[2], stages).loss == stages[2].config.loss


def test_the_first_changed_option_is_found() -> None:
    assert changed_option({"a": {"b": 1, "c": {}}}, {"a": {"b": 1, "c": {}}}) is None
    assert changed_option({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert changed_option({"a": 1, "d": 0}, {"a": 1}) == ("d", 0, None)
    assert changed_option({"train": {"keep_last": 1}}, {"train": {"keep_last": 2}}) is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("stages") / "model")


def write_recipe(model: Path) -> list[Any]:
    Path("recipe.yaml").write_text(
        f"""
model: {{name: {model}}}
data: {{train: rows.jsonl}}
train: {{output_dir: out, max_steps: 2, groups_per_step: 4, precision: fp32, lr: 1.0e-3}}
stages:
  - {{name: sft, loss: {{name: sft}}}}
  - {{name: dpo, model: {{name: "{{sft}}"}}, data: {{eval_rows: 8}}}}
"""
    )
    return ["train", "recipe.yaml"]


def test_the_command_trains_the_stages_and_says_what_it_does(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    words = write_recipe(tiny)
    planned = prefopt("plan", "recipe.yaml")
    assert planned.code == 0, planned.err
    assert "stage sft (new, out/sft)" in planned.out and "stage dpo (new, out/dpo)" in planned.out
    dry = prefopt(*words, "--dry-run", "--json")
    assert [stage["config"]["loss"]["name"] for stage in json.loads(dry.out)["stages"]] == ["sft", "dpo"]
    assert not Path("out").exists(), "neither writes anything"
    monkeypatch.setattr(progress, "_QUIET", False)
    done = prefopt(*words, "stages.dpo.loss.beta=0.5")
    assert done.code == 0, done.err
    assert "stage sft: starts, out/sft" in done.err and "stage dpo: starts, out/dpo" in done.err
    first = RunFolder(Path("out/sft")).complete_checkpoints()[-1]
    assert RunFolder(Path("out/dpo")).read("config.json")["model"]["name"] == "out/sft"
    again = prefopt(*words, "stages.dpo.loss.beta=0.5", "--json")
    found = json.loads(again.out)["stages"]
    assert [(stage["stage"], stage["steps"], stage["checkpoint"]) for stage in found] == [
        ("sft", 2, str(first)),
        ("dpo", 2, "out/dpo/checkpoints/step-000002"),
    ]
    wrong = prefopt(*words, "stages.dpo.loss.bta=0.5")
    assert wrong.code == 2 and 'stage "dpo", recipe.yaml' in wrong.err
