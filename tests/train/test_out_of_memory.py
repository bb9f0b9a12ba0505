"""Memory that runs out in a step: the step is made in smaller pieces with the same result, or the run says what would fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.core.errors import TrainingError
from prefopt.model.batch import Batch
from prefopt.train.loop import Training
from prefopt.train.memory import is_out_of_memory, smaller_budget
from train.tiny_runs import preference_rows, tiny_config, tiny_tokenizer, tiny_training, weights_of, write_rows

pytestmark = pytest.mark.slow

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({}, RuntimeError),
        ({"train": {"precision": "bf16"}}, MemoryError),
        ({"loss": {"name": "bco_pair"}}, torch.OutOfMemoryError),
        ({"loss": {"name": "aot"}}, RuntimeError),
    ],
    ids=str,
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


LIMITED = """
import json, resource, sys
import prefopt.pipeline, prefopt.trainer, peft, transformers  # what the program takes before its limit
from prefopt.core.memory import available_bytes
from prefopt.core.resolve import resolve_config
from prefopt.model.load import model_config
from prefopt.planning import plan_run
from prefopt.train.plan import Machine, plan_memory

config = resolve_config({}, json.loads(sys.argv[1]))
groups, architecture = plan_run(config, total=64 << 30).rows.train.groups, model_config(config.model.name)
here = Machine.here(config, total=64 << 30)
needs = {budget: plan_memory(config, architecture, groups, here, micro_batch_tokens=budget) for budget in (256, 1024)}
rest = sum(needs[256].parts.values()) + int(float(sys.argv[2]) * (needs[1024].peak - needs[256].peak))
data = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (data + rest, data + rest))
assert 0 < available_bytes() <= rest, (available_bytes(), rest)
run = prefopt.pipeline.train_run(config)
print(json.dumps([run.read("config.json")["train"]["micro_batch_tokens"], needs[1024].peak - needs[256].peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts allocated memory on Linux only")
@pytest.mark.parametrize(("share", "budgets"), [(3.0, {1024}), (0.5, {256, 512})])
def test_auto_stays_below_a_limit_of_the_system(tmp_path: Path, share: float, budgets: set[int]) -> None:
    """The limit leaves what 256 tokens need and `share` of what 1,024 need more: beyond it every allocation fails."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", preference_rows(200))
    words = [
        f"model.name={tmp_path / 'model'}",
        f"data.train={tmp_path / 'rows.jsonl'}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_steps=2",
        "train.groups_per_step=40",
        "train.precision=fp32",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(words), str(share)],
        capture_output=True,
        text=True,
        env={**os.environ, "PREFOPT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory" not in done.stderr  # it fitted at the first attempt
    chosen, difference = json.loads(done.stdout)
    assert difference > 150 << 20
    assert chosen in budgets
