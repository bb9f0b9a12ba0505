"""References that follow the policy: where they are after each step, and that a run with one goes on as if never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt.core.config import RunConfig
from prefopt.core.run_folder import RunFolder
from prefopt.pipeline import train_run
from prefopt.train.checkpoint import checkpoint_bytes, save_checkpoint
from prefopt.train.loop import Training
from prefopt.train.moving_reference import MovingReference
from prefopt.train.record import StepRecord
from train.rows_of_kinds import labels
from train.tiny_objectives import run
from train.tiny_runs import stop_after, tiny_config, tiny_training, weights_of, write_model, write_rows

pytestmark = pytest.mark.slow  # whole runs

Weights = dict[str, torch.Tensor]
TR_DPO = {"kind": "tr-dpo", "cache_dir": None}
EMA = {"kind": "ema", "cache_dir": None}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def reference_of(training: Training) -> Weights:
    """Copies of the fp32 weights of a moving reference."""
    assert isinstance(training.reference, MovingReference)
    return {name: value.clone() for name, value in training.reference.weights.items()}


class Followed:
    """Weights of policy and reference after every step; before the first at place 0."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.policy, self.reference = [weights_of(training)], [reference_of(training)]

    def after_step(self, record: StepRecord) -> None:
        self.policy.append(weights_of(self.training))
        self.reference.append(reference_of(self.training))


def assert_weights(found: Weights, wanted: Weights, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys() and found
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance, msg=name)


def moved(first: Weights, second: Weights) -> float:
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hard_update_makes_the_reference_the_policy(tmp_path: Path, precision: str) -> None:
    reference = {**TR_DPO, "sync_every_steps": 2, "sync_mix": 1.0}
    training = tiny_training(tiny_config(tmp_path, reference=reference, train={"precision": precision, "max_steps": 5}))
    followed = Followed(training)
    records: list[StepRecord] = []
    while training.step < training.total_steps:
        records.append(training.train_step(training.groups_of(training.step)))
        followed.after_step(records[-1])
    assert_weights(followed.reference[0], followed.policy[0])
    assert_weights(followed.reference[1], followed.policy[0])
    for step in (2, 3, 4, 5):
        assert_weights(followed.reference[step], followed.policy[step - step % 2])
    assert moved(followed.policy[4], followed.policy[2]) > 1e-4
    at_ln_2 = [abs(record.values.total - math.log(2)) < 1e-5 for record in records]
    assert at_ln_2 == [True, False, True, False, True]


def test_a_soft_update_is_the_mean_with_the_share_of_the_policy(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path, reference={**TR_DPO, "sync_every_steps": 2, "sync_mix": 0.3}))
    followed = Followed(training)
    training.run([followed])
    for step in (2, 4):
        old, policy = followed.reference[step - 1], followed.policy[step]
        wanted = {name: 0.3 * policy[name] + 0.7 * value for name, value in old.items()}
        assert_weights(followed.reference[step], wanted, 3e-7)
        assert moved(followed.reference[step], old) > 1e-5
    assert_weights(followed.reference[3], followed.reference[2])


@pytest.mark.parametrize(("given", "decay"), [({}, 0.99), ({"ema_decay": 0.7}, 0.7)])
def test_an_average_over_n_steps_has_its_closed_form(tmp_path: Path, given: dict[str, float], decay: float) -> None:
    """decay^n * first + (1 - decay) * the sum of decay^(n - i) * policy after step i."""
    training = tiny_training(tiny_config(tmp_path, reference={**EMA, **given}))
    followed = Followed(training)
    training.run([followed])
    n = training.total_steps
    for name, first in followed.policy[0].items():
        wanted = decay**n * first
        for step in range(1, n + 1):
            wanted = wanted + (1 - decay) * decay ** (n - step) * followed.policy[step][name]
        torch.testing.assert_close(followed.reference[n][name], wanted, rtol=0, atol=1e-6)


def test_a_reference_of_another_model_moves_from_there(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=4)
    training = tiny_training(tiny_config(tmp_path, reference={**EMA, "model": str(other), "ema_decay": 0.5}))
    first = {name: value.clone() for name, value in load_file(other / "model.safetensors").items()}
    assert_weights(reference_of(training), first)
    training.train_step(training.groups_of(0))
    wanted = {name: 0.5 * first[name] + 0.5 * value for name, value in weights_of(training).items()}
    assert_weights(reference_of(training), wanted, 1e-7)


def test_drift_is_from_the_first_weights_and_ends_with_the_first_update(tmp_path: Path) -> None:
    moving = tiny_training(tiny_config(tmp_path, reference={**TR_DPO, "sync_every_steps": 3}))
    assert ["drift/chosen" in record.metrics() for record in run(moving)] == [True, True, False, False]
    still = tiny_training(tiny_config(tmp_path))
    assert all("drift/chosen" in record.metrics() for record in run(still))


def test_until_the_first_update_a_moving_reference_is_a_frozen_one(tmp_path: Path) -> None:
    moving = run(tiny_training(tiny_config(tmp_path, reference={**TR_DPO, "sync_every_steps": 3})))
    frozen = run(tiny_training(tiny_config(tmp_path)))
    pairs = list(zip(moving, frozen, strict=True))
    assert [ours.values.total for ours, _ in pairs[:3]] == pytest.approx(
        [theirs.values.total for _, theirs in pairs[:3]], abs=1e-5
    )
    assert abs(pairs[3][0].values.total - pairs[3][1].values.total) > 1e-3


RESUMED: dict[str, dict[str, Any]] = {
    "tr-dpo": {"reference": {**TR_DPO, "sync_every_steps": 2}},
    "tr-dpo between updates": {"reference": {**TR_DPO, "sync_every_steps": 3, "sync_mix": 1.0}},
    "ema": {"reference": {**EMA, "ema_decay": 0.8}},
    "ema in bf16": {"reference": {**EMA, "ema_decay": 0.9}, "train": {"precision": "bf16"}},
    "bco": {"loss": {"name": "bco"}, "data": {"train": "labels.jsonl"}},
    "beta_dpo": {"loss": {"name": "beta_dpo"}},
    "kto with ema": {"loss": {"name": "kto"}, "data": {"train": "labels.jsonl"}, "reference": EMA},
    "tdpo": {"loss": {"name": "tdpo"}, "reference": {"cache_dir": None}},
    "bco_pair and sft": {"loss": {"bco_pair": 1.0, "sft": 0.1}},
}


def config_of(folder: Path, name: str, case: dict[str, Any]) -> RunConfig:
    sections = {section: dict(options) for section, options in case.items()}
    saved = {"max_steps": 4, "groups_per_step": 4, "save_every_steps": 1, "output_dir": str(folder / name)}
    train = {**saved, **sections.pop("train", {})}
    return tiny_config(folder, train=train, **sections)


def history(run_folder: RunFolder) -> list[dict[str, Any]]:
    """All that was logged of each step but how long it took."""
    timed = ("time", "tokens_per_second", "step_seconds", "mfu")
    steps = [event for event in run_folder.events() if event["kind"] == "step"]
    return [{key: value for key, value in event.items() if key not in timed} for event in steps]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_interrupted_equals_the_unbroken_one(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "labels.jsonl", labels(30))
    unbroken = train_run(config_of(tmp_path, "unbroken", RESUMED[name]))
    config = config_of(tmp_path, "broken", RESUMED[name])
    stop_after(2, config)
    resumed = train_run(config, resume=True)
    ours, theirs = (one.complete_checkpoints()[-1] for one in (resumed, unbroken))
    files = {path.name for path in theirs.glob("*.safetensors")}
    moving = config.reference_kind in ("tr-dpo", "ema")
    assert files == {"model.safetensors", "optimizer.safetensors"} | ({"reference.safetensors"} if moving else set())
    for file in files:
        assert_weights(load_file(ours / file), load_file(theirs / file))
    assert json.loads((ours / "training.json").read_text()) == json.loads((theirs / "training.json").read_text())
    assert history(resumed) == history(unbroken)
    assert len(history(resumed)) == 4


def test_the_checkpoint_holds_the_reference_and_what_runs(tmp_path: Path) -> None:
    case = {"loss": {"name": "beta_dpo"}, "reference": {**TR_DPO, "sync_every_steps": 2, "sync_mix": 1.0}}
    run_folder = train_run(config_of(tmp_path, "run", {**case, "train": {"keep_last": 2}}))
    third, last = run_folder.complete_checkpoints()
    assert_weights(load_file(last / "reference.safetensors"), load_file(last / "model.safetensors"))
    assert moved(load_file(third / "reference.safetensors"), load_file(third / "model.safetensors")) > 1e-4
    state = json.loads((last / "training.json").read_text())
    assert state["running"]["beta_dpo.margin_mean"] == {
        "value": pytest.approx(history(run_folder)[-1]["margin_mean"], abs=1e-9),
        "count": 16.0,
    }


@pytest.mark.parametrize("kind", ["cached", "tr-dpo"])
def test_the_space_asked_for_is_what_a_checkpoint_takes(tmp_path: Path, kind: str) -> None:
    """Weights, two moments, and the reference where it moves; steps and names come on top."""
    reference = {**TR_DPO, "sync_every_steps": 1} if kind == "tr-dpo" else {}
    training = tiny_training(tiny_config(tmp_path, reference=reference, train={"max_steps": 2}))
    run(training)
    folder = save_checkpoint(training, tmp_path / "step-000002")
    weights = sum(value.nbytes for path in folder.glob("*.safetensors") for value in load_file(path).values())
    assert 0 <= weights - checkpoint_bytes(training) <= 4 * len(training.optimizer.masters)
