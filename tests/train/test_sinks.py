"""Sinks get every metric, and none of them can break a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import ConfigError
from prefopt.core.run_folder import RunFolder
from prefopt.pipeline import train_run
from prefopt.train import sinks
from train.tiny_runs import tiny_config


class Failing:
    """Fails from its second step on."""

    made = 0
    calls = 0

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        type(self).made += 1

    def log(self, metrics: dict[str, float], step: int) -> None:
        type(self).calls += 1
        if step > 1:
            raise ConnectionError("the service went away")


class Unreachable:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        raise ConnectionError("no such host")


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


def test_a_sink_that_fails_is_switched_off_and_the_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sinks, "say", said.append)
    monkeypatch.setattr(sinks, "SINKS", {"wandb": Failing, "trackio": Unreachable})
    with_sinks = train_run(tiny_config(tmp_path, train={"sinks": ["wandb", "trackio"]}))
    without = train_run(tiny_config(tmp_path, train={"output_dir": str(tmp_path / "without")}))
    assert losses(with_sinks) == losses(without)
    assert with_sinks.events()[-1]["kind"] == "end"
    assert (Failing.made, Failing.calls) == (1, 2)
    assert [line.split(";")[0] for line in said] == [
        "warning: trackio failed and is switched off",
        "warning: wandb failed and is switched off",
    ]


def test_a_sink_that_is_not_installed_is_a_configuration_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.WandbSink, "package", "no_such_package_here")
    with pytest.raises(ConfigError, match=r"train\.sinks: no_such_package_here is not installed"):
        train_run(tiny_config(tmp_path, train={"sinks": ["wandb"]}))
    assert not any(event["kind"] == "step" for event in RunFolder(tmp_path / "run").events())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_gets_every_metric_of_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_run(tiny_config(tmp_path, train={"sinks": ["tensorboard"]}, data={"eval_rows": 4}))
    read = EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    steps = [event for event in run.events() if event["kind"] == "step"]
    for name in ("loss", "rewards/margins", "grad_norm", "lr", "drift/chosen"):
        assert [(point.step, point.value) for point in read.Scalars(name)] == [
            (event["step"], pytest.approx(event[name], rel=1e-6, abs=1e-12)) for event in steps
        ]
    evaluations = [event for event in run.events() if event["kind"] == "eval"]
    assert [point.value for point in read.Scalars("eval/loss")] == pytest.approx([event["eval/loss"] for event in evaluations])
