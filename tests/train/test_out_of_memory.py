"""Memory that runs out in a step: the step is made in smaller pieces with the same result, or the run says what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.core.errors import TrainingError
from prefopt.model.batch import Batch
from prefopt.train.loop import Training
from prefopt.train.memory import is_out_of_memory, smaller_budget
from train.tiny_runs import tiny_config, tiny_training, weights_of

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def limit(training: Training, tokens: int, *, error: type[Exception] = RuntimeError) -> list[int]:
    """Let passes over more than `tokens` fail as an allocation does, behind the forward; returns the sizes that were tried."""
    whole, tried = training.policy.token_statistics, []

    def limited(batch: Batch, **options: Any) -> Any:
        statistics = whole(batch, **options)
        tried.append(batch.token_ids.numel())
        if batch.token_ids.numel() > tokens:
            raise error(CPU_ERROR)
        return statistics

    training.policy.token_statistics = limited  # type: ignore[method-assign]
    return tried


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    "sections", [{}, {"train": {"precision": "bf16"}}, {"loss": {"name": "bco_pair"}}, {"loss": {"name": "aot"}}], ids=str
)
def test_the_step_is_made_again_in_smaller_micro_batches(
    tmp_path: Path, sections: dict[str, Any], error: type[Exception]
) -> None:
    small = {**sections, "train": {**sections.get("train", {}), "micro_batch_tokens": 80}}
    wanted = tiny_training(tiny_config(tmp_path, **small))
    training = tiny_training(tiny_config(tmp_path, **sections))
    tried = limit(training, 90, error=error)
    for _ in range(2):
        ours, theirs = training.train_step(training.groups_of(training.step)), wanted.train_step(wanted.groups_of(wanted.step))
        assert ours.values.total == pytest.approx(theirs.values.total, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-3)
    assert tried[0] > 90 and max(tried[-4:]) <= 90
    for name, values in wanted.objective.state().items():
        assert training.objective.state()[name] == pytest.approx(values)
    assert training.micro_batch_tokens < 1024


def test_evaluation_too(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))
    wanted = training.evaluate(training.groups[:12]).total
    limit(training, 90)
    assert training.evaluate(training.groups[:12]).total == pytest.approx(wanted, rel=1e-5)


def test_a_group_that_does_not_fit_alone_ends_the_run(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))
    before = weights_of(training)
    limit(training, 10)
    with pytest.raises(TrainingError, match=r"Step 1: memory ran out on a single group of \d+ tokens") as raised:
        training.train_step(training.groups_of(0))
    assert "prefopt plan" in str(raised.value.todo)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(training).items())
    assert training.step == 0


def test_other_errors_go_on_their_way(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))

    def broken(batch: Batch, **options: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    training.policy.token_statistics = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="mat1"):
        training.train_step(training.groups_of(0))


def test_what_an_allocators_error_is() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize(
    ("lengths", "budget", "smaller"),
    [([10, 10, 10, 10], 1024, 20), ([100, 20, 20], 1024, 70), ([100], 1024, None), ([100, 90], 100, None), ([8, 8, 8], 24, 16)],
)
def test_a_smaller_budget_cuts_more_finely(lengths: list[int], budget: int, smaller: int | None) -> None:
    assert smaller_budget(lengths, budget) == smaller
