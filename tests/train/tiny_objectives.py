"""Training objects of any loss on any rows, from models that are loaded once: a policy, a reference near it, a reward model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prefopt.core.config import RunConfig
from prefopt.core.losses.table import resolve_parts
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup
from prefopt.model.engine import LanguageModel
from prefopt.model.load import load_model, load_reward_model
from prefopt.pipeline import prepare_rows, start_training
from prefopt.train.loop import Training
from prefopt.train.record import StepRecord, StepValues
from train.rows_of_kinds import Row
from train.tiny_reward_runs import write_reward_model
from train.tiny_runs import write_model

NEAR = 0.02  # by how much weights differ between policy and reference: log-ratios of a few nats a response


def write_near(base: Path, folder: Path, *, seed: int = 1, by: float = NEAR) -> Path:
    """A copy of the model `base` with noise on every weight."""
    write_model(folder)
    random = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    noisy = {name: value + by * torch.randn(value.shape, generator=random) for name, value in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Models:
    """A policy, a reference that is not far from it, and a reward model with a random head."""

    folder: Path
    policy: LanguageModel
    reference: LanguageModel
    reward_model: LanguageModel

    @classmethod
    def made_in(cls, folder: Path) -> Models:
        base = write_model(folder / "model")
        near = write_near(base, folder / "near")
        reward = write_reward_model(folder / "reward")
        return cls(
            folder,
            load_model(str(base), precision="fp32", for_training=True),
            load_model(str(near), precision="fp32"),
            load_reward_model(str(reward), precision="fp32", for_training=True),
        )

    def training(self, section: Row, rows: Sequence[Row], *, fresh: bool = False, **sections: Any) -> Training:
        """The Training of the loss `section` on `rows`, as train_run makes it.

        Its policy is shared between tests that make no step; `fresh` gives one of its own, whose reference is itself.
        """
        config = self.config(section, **sections)
        parts = [part.facts for part in resolve_parts(section)]
        policy = self.reward_model if any(facts.trains_reward_model for facts in parts) else self.policy
        if fresh:
            policy = _copied(policy)
        prepared = prepare_rows(config, policy.tokenizer, policy.context_tokens, train_rows=list(rows))
        reference = None if fresh or not config.loss.needs_reference else self.reference
        return start_training(config, policy, prepared, reference_model=reference)

    def config(self, section: Row, **sections: Any) -> RunConfig:
        """The configuration of that Training."""
        train = {"groups_per_step": 4, "max_steps": 4, "lr": 1e-3, "precision": "fp32", **sections.pop("train", {})}
        model = {"name": str(self.folder / "model")}
        return resolve_config({"model": model, "data": {"train": "rows"}, "loss": section, "train": train, **sections})


def _copied(policy: LanguageModel) -> LanguageModel:
    kind = type(policy)
    return kind(
        copy.deepcopy(policy.model),
        policy.tokenizer,
        name=policy.name,
        dtype=policy.dtype,
        device=policy.device,
        identity=policy.identity,
    )


Gradients = dict[str, torch.Tensor]


def step_of(training: Training, groups: Sequence[TokenGroup]) -> tuple[StepValues, Gradients]:
    """Values and gradients of a step over `groups` that is not made."""
    values = training.accumulate_gradients(groups)
    masters = training.optimizer.masters
    found = {name: master.grad.clone() for name, master in masters.items() if master.grad is not None}
    training.optimizer.clear()
    return values, found


def assert_same_gradients(first: Gradients, second: Gradients, *, relative: float = 1e-4) -> None:
    """Equal up to `relative` of the largest gradient, which is not 0."""
    scale = max(float(value.abs().max()) for value in first.values())
    assert first.keys() == second.keys() and scale > 0
    worst = max(float((value - second[name]).abs().max()) for name, value in first.items())
    assert worst <= relative * scale, f"{worst:.3g} of {scale:.3g}"


class Records:
    """An observer that keeps every step."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def after_step(self, record: StepRecord) -> None:
        self.steps.append(record)


def run(training: Training) -> list[StepRecord]:
    """The records of all steps."""
    records = Records()
    training.run([records])
    return records.steps
