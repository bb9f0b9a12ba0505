"""Training a reward model through train_run: what is measured, what transformers reads of it, and going on after a stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from model.tiny_reward_models import plain_scores
from prefopt.core.config import RunConfig
from prefopt.core.run_folder import RunFolder
from prefopt.data.encode import encode_groups
from prefopt.data.load import load_groups
from prefopt.model.load import load_reward_model
from prefopt.pipeline import train_run
from train.rows_of_kinds import Row, pairs, scores
from train.tiny_objectives import Models, step_of
from train.tiny_runs import preference_rows, stop_after, tiny_config, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config_of(folder: Path, name: str, rows: list[Row], loss: str = "reward", **train: Any) -> RunConfig:
    file = write_rows(folder / "given.jsonl", rows)
    settings = {"max_steps": 4, "save_every_steps": 1, "output_dir": str(folder / name), **train}
    data = {"train": str(file), "eval_rows": 6}
    return tiny_config(folder, loss={"name": loss}, data=data, reference={"cache_dir": None}, train=settings)


def history(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    timed = ("time", "tokens_per_second", "step_seconds", "mfu")
    events = [event for event in run.events() if event["kind"] == kind]
    return [{key: value for key, value in event.items() if key not in timed} for event in events]


@pytest.mark.parametrize(("loss", "rows"), [("reward", preference_rows(40)), ("reward_ranking", scores(40, tied=True))])
def test_a_run_measures_its_held_out_rows_and_transformers_reads_its_scores(tmp_path: Path, loss: str, rows: list[Row]) -> None:
    run = train_run(config_of(tmp_path, "run", rows, loss))
    first, *_, last = history(run, "eval")
    assert first["step"] == 0 and last["step"] == 4
    assert first["eval/rewards/accuracies"] == 0.5 and first["eval/rewards/margins"] == 0.0, "the head starts at 0"
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["eval/loss"] < first["eval/loss"]
    assert first["eval/rewards/accuracies_low"] < 0.5 < first["eval/rewards/accuracies_high"]
    assert len(last["margins"]) == last["eval/groups"] == 6
    steps = history(run, "step")
    assert not any(name.startswith(("logps", "drift")) for event in steps for name in event)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= steps[-1].keys()

    folder = run.complete_checkpoints()[-1]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    groups = encode_groups(load_groups(rows[:8]), AutoTokenizer.from_pretrained(folder)).groups
    with torch.no_grad():
        plain = plain_scores(theirs, groups).numpy()
    ours = np.concatenate(load_reward_model(str(run.path), precision="fp32", require_trained=True).score_groups(groups))
    assert plain.std() > 1e-3 and np.abs(ours - plain).max() < 1e-5


def test_a_reward_model_that_was_interrupted_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = train_run(config_of(tmp_path, "unbroken", pairs(40)))
    config = config_of(tmp_path, "broken", pairs(40))
    stop_after(2, config)
    resumed = train_run(config, resume=True)
    ours, theirs = (run.complete_checkpoints()[-1] for run in (resumed, unbroken))
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(ours / file), load_file(theirs / file)
        assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    for kind in ("step", "eval"):
        assert history(resumed, kind) == history(unbroken, kind)


def test_a_trained_reward_model_is_trained_further(tmp_path: Path) -> None:
    first = train_run(config_of(tmp_path, "first", pairs(40)))
    values = config_of(tmp_path, "second", pairs(40)).resolved()
    values["model"]["name"] = str(first.path)
    second = train_run(RunConfig.model_validate(values))
    assert history(second, "eval")[0]["eval/loss"] == pytest.approx(history(first, "eval")[-1]["eval/loss"], abs=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.made_in(tmp_path_factory.mktemp("rewards"))


@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_the_loss_of_scored_responses_is_the_mean_over_their_ordered_pairs(models: Models, centering: float) -> None:
    """Mean over better i and worse j of log(1 + exp(s_j - s_i)) + centering (s_i + s_j)^2, by plain transformers' scores."""
    training = models.training({"name": "reward_ranking", "centering": centering}, scores(12, tied=True))
    groups = training.groups_of(0)
    values, _ = step_of(training, groups)
    plain_model = AutoModelForSequenceClassification.from_pretrained(models.folder / "reward")
    assert {len(group.response_ids) for group in groups} >= {2, 3}
    for group, loss in zip(groups, values.loss, strict=True):
        with torch.no_grad():
            said = plain_scores(plain_model, [group]).double().numpy()
        worth = group.feedback.scores
        each = [
            np.log1p(np.exp(said[j] - said[i])) + centering * (said[i] + said[j]) ** 2
            for i in range(len(worth))
            for j in range(len(worth))
            if worth[i] > worth[j]
        ]
        assert loss == pytest.approx(np.mean(each), abs=1e-4)


def test_a_margin_is_by_how_much_scores_should_differ(models: Models) -> None:
    training = models.training({"name": "reward", "centering": 0.0}, pairs(8))
    groups = training.groups_of(0)
    values, _ = step_of(training, groups)
    assert all(group.feedback.margin for group in groups)
    scores_S = values.reward.reshape(-1, 2)
    wanted = [
        np.log1p(np.exp(group.feedback.margin - (good - bad)))  # type: ignore[operator]
        for group, (good, bad) in zip(groups, scores_S, strict=True)
    ]
    assert values.loss == pytest.approx(wanted, abs=1e-5)
