"""A checkpoint of a reward model is one that plain transformers loads, and one that training goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from model.tiny_reward_models import plain_scores
from prefopt.core.config import TrainConfig
from prefopt.data.encode import TokenGroup, encode_groups
from prefopt.data.load import load_groups
from prefopt.model.load import load_reward_model
from prefopt.model.reward_model import RewardModel
from prefopt.train import checkpoint
from prefopt.train.checkpoint import load_checkpoint, save_checkpoint
from prefopt.train.optimizer import MasterOptimizer
from train.tiny_runs import preference_rows, write_model

LR = 3e-3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tied=True)


def in_training(base: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a checkpoint needs of a Training: a policy and its optimizer, and an objective without a state."""
    monkeypatch.setattr(checkpoint, "identities", lambda training: {})
    policy = load_reward_model(str(base), precision=precision, for_training=True)
    assert policy.sharing
    return SimpleNamespace(
        policy=policy,
        optimizer=MasterOptimizer(policy.model, TrainConfig(lr=LR), policy.dtype),
        objective=SimpleNamespace(state=dict, load_state=lambda state: None),
        reference=None,
        step=0,
        num_tokens=0,
    )


def steps(training: Any, groups: Sequence[TokenGroup], count: int) -> None:
    for _ in range(count):
        scores_S = training.policy.scores(training.policy.batch(groups))
        (-F.logsigmoid(scores_S[0::2] - scores_S[1::2]).mean()).backward()
        training.optimizer.step(LR)
        training.step += 1


def rows_of(policy: RewardModel) -> list[TokenGroup]:
    return list(encode_groups(load_groups(preference_rows(8)), policy.tokenizer).groups)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_transformers_reads_the_scores_of_the_masters(tmp_path: Path, base: Path, precision: str, monkeypatch: Any) -> None:
    training = in_training(base, precision, monkeypatch)
    rows = rows_of(training.policy)
    steps(training, rows, 4)
    folder = save_checkpoint(training, tmp_path / "run" / "checkpoints" / "step-000004")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["dtype"] == "float32" and config["pad_token_id"] == training.policy.pad_id
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == training.policy.pad_id

    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        plain = plain_scores(theirs, rows).numpy()
    assert plain.std() > 0.05
    masters = load_reward_model(str(folder), precision="fp32", require_trained=True)
    assert np.abs(np.concatenate(masters.score_groups(rows)) - plain).max() < 1e-5
    live = np.concatenate(training.policy.score_groups(rows))
    assert np.abs(live - plain).max() < (1e-5 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, base: Path, precision: str, monkeypatch: Any) -> None:
    torch.set_num_threads(1)
    whole, first, second = (in_training(base, precision, monkeypatch) for _ in range(3))
    rows = rows_of(whole.policy)
    steps(whole, rows, 5)
    steps(first, rows, 2)
    load_checkpoint(second, save_checkpoint(first, tmp_path / "step-000002"))
    assert second.step == 2
    steps(second, rows, 3)
    assert whole.optimizer.masters.keys() == second.optimizer.masters.keys()
    for name, master in whole.optimizer.masters.items():
        assert torch.equal(master, second.optimizer.masters[name]), name
