"""Losses of one's own, `module:function`, through train_run: alone, in a mix, logged by name, resumed with the same options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, TrainingError
from prefopt.core.losses.custom import custom_facts
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder
from prefopt.pipeline import train_run
from prefopt.train.checkpoint import load_checkpoint
from train.rows_of_kinds import labels
from train.tiny_runs import stop_after, tiny_config, tiny_training, write_rows

SOURCE = '''
import torch
import torch.nn.functional as F

STEP_WIDE = {"centred"}


def scaled(chosen_G, rejected_G, *, beta=0.1, factor=1.0):
    """DPO times a number."""
    return -factor * F.logsigmoid(beta * (chosen_G - rejected_G))


def signed(ratio_S, desirable_S, *, beta=0.1):
    return -F.logsigmoid(torch.where(desirable_S, beta * ratio_S, -beta * ratio_S))


def centred(chosen_G, rejected_G, *, beta=0.1):
    """Margins less the mean of the step."""
    margin_G = beta * (chosen_G - rejected_G)
    return -F.logsigmoid(margin_G - margin_G.mean().detach() + 1)


def averaged(chosen_G, rejected_G):
    return -F.logsigmoid(chosen_G - rejected_G).mean()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where the module of the losses lies."""
    torch.set_num_threads(1)
    (tmp_path / "losses_of_mine.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "losses_of_mine", raising=False)
    custom_facts.cache_clear()
    return tmp_path


def config_of(folder: Path, name: str, loss: dict[str, Any], **train: Any) -> RunConfig:
    settings = {"max_steps": 3, "save_every_steps": 1, "output_dir": str(folder / name), **train}
    return tiny_config(folder, loss=loss, train=settings)


def steps(run: RunFolder, name: str) -> list[float]:
    return [event[name] for event in run.events() if event["kind"] == "step"]


def test_alone_it_trains_with_the_options_of_the_recipe(folder: Path) -> None:
    """A factor of 1 is dpo at every step. One of 2 is twice its loss and, without a bound on the norm, twice its gradient."""
    dpo = train_run(config_of(folder, "dpo", {"name": "dpo"}, max_grad_norm=1e9))
    same = train_run(config_of(folder, "same", {"name": "losses_of_mine:scaled"}, max_grad_norm=1e9))
    twice = train_run(config_of(folder, "twice", {"name": "losses_of_mine:scaled", "factor": 2}, max_grad_norm=1e9))
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert steps(same, name) == pytest.approx(steps(dpo, name), rel=1e-5, abs=1e-7)
    assert steps(twice, "loss")[0] == pytest.approx(2 * steps(dpo, "loss")[0], rel=1e-6)
    assert steps(twice, "grad_norm")[0] == pytest.approx(2 * steps(dpo, "grad_norm")[0], rel=1e-5)
    saved = json.loads((twice.path / "config.json").read_text())
    assert saved["loss"] == {"name": "losses_of_mine:scaled", "beta": 0.1, "factor": 2.0}


def test_in_a_mix_it_is_logged_by_its_name(folder: Path) -> None:
    loss = {"losses_of_mine:scaled": {"weight": 0.5, "factor": 3.0}, "sft": 0.2}
    run = train_run(config_of(folder, "mix", loss))
    own, imitation, total = (steps(run, name) for name in ("loss/losses_of_mine:scaled", "loss/sft", "loss"))
    assert total == pytest.approx([0.5 * one + 0.2 * other for one, other in zip(own, imitation, strict=True)], rel=1e-6)
    assert own[0] == pytest.approx(3 * 0.6931472, rel=1e-5)


def test_it_may_be_of_responses(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", labels(20))
    run = train_run(config_of(folder, "run", {"name": "losses_of_mine:signed"}))
    assert steps(run, "loss")[0] == pytest.approx(0.6931472, rel=1e-5)
    assert steps(run, "loss")[-1] < steps(run, "loss")[0]


def test_one_that_needs_the_whole_step_gets_it(folder: Path) -> None:
    loss = {"name": "losses_of_mine:centred", "beta": 0.5}
    values = []
    for tokens in (16, 4096):
        run = train_run(config_of(folder, f"run-{tokens}", loss, micro_batch_tokens=tokens))
        values.append((steps(run, "loss"), steps(run, "grad_norm")))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-5)
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-3)


def test_it_is_resumed_with_its_options_and_not_with_others(folder: Path) -> None:
    loss = {"name": "losses_of_mine:scaled", "factor": 2.0}
    unbroken = train_run(config_of(folder, "unbroken", loss))
    config = config_of(folder, "broken", loss)
    run = stop_after(1, config)
    other = config_of(folder, "broken", {**loss, "factor": 2.5})
    with pytest.raises(TrainingError, match=r"cannot be resumed, its loss was .*'factor': 2\.0.* and is now .*'factor': 2\.5"):
        train_run(other, resume=True)
    resumed = train_run(resolve_config(json.loads((run.path / "config.json").read_text())), resume=True)
    assert steps(resumed, "loss") == steps(unbroken, "loss")


def test_a_mix_is_not_resumed_with_another_weight(folder: Path) -> None:
    run = stop_after(1, config_of(folder, "run", {"dpo": 1.0, "sft": 0.1}))
    training = tiny_training(config_of(folder, "run", {"dpo": 1.0, "sft": 0.2}))
    with pytest.raises(TrainingError, match="cannot be resumed, its loss was"):
        load_checkpoint(training, run.complete_checkpoints()[-1])


def test_a_mean_is_refused_at_the_first_step(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'"losses_of_mine:averaged" gave \(\), and it must be a tensor of shape \(8,\)'):
        train_run(config_of(folder, "run", {"name": "losses_of_mine:averaged"}))
