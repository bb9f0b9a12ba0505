"""The plan of a run's memory: what the ledger counts, what training really allocates, and what changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from model.tiny_models import token_group
from prefopt.core.config import RunConfig
from prefopt.core.errors import ModelError
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup
from prefopt.model.footprint import Ledger, forward_backward, without_data
from prefopt.model.load import model_config
from prefopt.model.tables import gradients_into
from prefopt.pipeline import train_run
from prefopt.planning import plan_run
from prefopt.train.plan import Machine, MemoryPlan, changes_that_fit, fitting_budget, fullest_micro_batches, plan_memory
from train.tiny_runs import tiny_config, tiny_training

pytestmark = pytest.mark.slow

GIB = 2**30
CPU = torch.device("cpu")


def machine(total: int = GIB, dtype: torch.dtype = torch.float32) -> Machine:
    return Machine(CPU, dtype, total, process=0)


def groups_of(config: RunConfig) -> tuple[TokenGroup, ...]:
    return plan_run(config).rows.train.groups


def plan(folder: Path, *, tokens: int = 200, dtype: torch.dtype = torch.float32, **sections: dict[str, Any]) -> MemoryPlan:
    config = tiny_config(folder, **sections)
    architecture = model_config(config.model.name)
    rows = tiny_config(folder, data=sections.get("data", {}), loss=sections.get("loss", {}))  # whatever else is asked for
    return plan_memory(config, architecture, groups_of(rows), machine(dtype=dtype), micro_batch_tokens=tokens)


class TestLedger:
    def test_a_storage_counts_once_and_until_it_is_freed(self) -> None:
        with Ledger() as ledger:
            first = torch.zeros(256)
            view = first[:10].reshape(2, 5)
            second = torch.ones(128, dtype=torch.float64)
            assert ledger.live == 2048
            del first
            assert ledger.live == 2048  # the view holds it
            del view
            assert (ledger.live, ledger.peak) == (1024, 2048)
            with ledger.peak_of() as inner:
                second = second + 1
            assert inner == [2048] and ledger.peak == 2048
        assert float(second[0]) == 2

    def test_what_is_elsewhere_does_not_count(self) -> None:
        with Ledger(torch.device("meta")) as ledger:
            kept = torch.zeros(256, device="meta")
            away = torch.zeros(256)
            assert (ledger.live, kept.nbytes, away.nbytes) == (1024, 1024, 1024)

    def test_without_data_nothing_is_allocated(self) -> None:
        with without_data() as ledger:
            huge = torch.zeros(1 << 38)
            assert (huge @ huge).shape == ()
            assert ledger.peak >= 4 << 38


@pytest.mark.parametrize(("tokens", "recompute"), [(60, "none"), (400, "none"), (400, "full"), (400, "selective")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_passes_of_a_plan_are_those_of_training(
    tmp_path: Path, tokens: int, precision: str, recompute: str, lora: dict[str, Any] | None
) -> None:
    """The same ledger over the real model: nothing that a pass allocates is missing from the plan."""
    train = {"precision": precision, "activation_checkpointing": recompute, "micro_batch_tokens": tokens}
    config = tiny_config(tmp_path, train=train, model={"lora": lora})
    training = tiny_training(config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    planned = plan_memory(
        config, model_config(config.model.name), training.groups, machine(dtype=dtype), micro_batch_tokens=tokens
    )
    fullest = fullest_micro_batches(config, training.groups, tokens)
    with Ledger() as ledger:
        for parameter in training.policy.model.parameters():
            ledger.enter(parameter)
        for master in training.optimizer.masters.values():
            ledger.enter(master)
            if master.grad is not None:
                ledger.enter(master.grad)
        held = ledger.live
        if all(master.grad is None for master in training.optimizer.masters.values()):
            held += sum(master.nbytes for master in training.optimizer.masters.values())  # a part of their own
        for micro_batch in fullest:
            with gradients_into(training.optimizer.table_gradients(training.policy.model)):
                forward_backward(training.policy, training.policy.batch(micro_batch))
    assert planned.parts["passes over the largest micro-batch"] == pytest.approx(ledger.peak - held, rel=0.03, abs=4096)
    assert planned.trained == sum(master.numel() for master in training.optimizer.masters.values())
    assert planned.weights == training.policy.model.num_parameters() - (planned.trained if lora else 0)


def test_the_parts_add_up(tmp_path: Path) -> None:
    whole = plan(tmp_path)
    assert whole.parts["weights, fp32"] == whole.parts["gradients, fp32"] == 4 * whole.weights
    assert whole.parts["AdamW moments"] == 8 * whole.weights
    half = plan(tmp_path, dtype=torch.bfloat16)
    assert half.parts["weights, compute copy"] == 2 * whole.weights
    assert half.parts["passes over the largest micro-batch"] < whole.parts["passes over the largest micro-batch"]
    assert plan(tmp_path, reference={"kind": "live", "cache_dir": None}).parts["reference model"] == 4 * whole.weights
    assert (
        plan(tmp_path, dtype=torch.bfloat16, reference={"kind": "ema", "cache_dir": None}).parts["reference model"]
        == 4 * whole.weights
    )
    codes = plan(tmp_path, train={"optimizer": "adamw_8bit"}).parts
    assert codes["AdamW moments"] < whole.parts["AdamW moments"] and codes["weights, fp32"] == whole.parts["weights, fp32"]
    without = plan(tmp_path, dtype=torch.bfloat16, train={"optimizer": "adamw_bf16", "precision": "bf16"}).parts
    assert without["weights, bf16"] == without["gradients, bf16"] == without["AdamW moments"] // 2 == 2 * whole.weights
    assert not {"weights, fp32", "weights, compute copy", "gradients, fp32"} & without.keys()
    adapter = plan(tmp_path, model={"lora": {"r": 4}})
    assert adapter.parts["AdamW moments"] == 8 * adapter.trained < 8 * whole.trained
    assert 0 < whole.reference_pass < sum(whole.parts.values())


def test_a_larger_budget_takes_more_and_recomputing_less(tmp_path: Path) -> None:
    passes = [plan(tmp_path, tokens=tokens).parts["passes over the largest micro-batch"] for tokens in (60, 120, 240)]
    assert passes == sorted(set(passes))
    some, most = (
        plan(tmp_path, tokens=240, train={"activation_checkpointing": kind}).parts["passes over the largest micro-batch"]
        for kind in ("selective", "full")
    )
    assert most < some < passes[-1]


def test_the_budget_is_halved_until_it_fits_and_no_further_than_the_longest_row(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"groups_per_step": 40})
    groups, architecture = groups_of(config), model_config(config.model.name)

    def chosen(total: int) -> int:
        return fitting_budget(config, architecture, groups, machine(total))

    assert chosen(64 * GIB) == 1024
    for budget in (512, 256):
        fits = plan_memory(config, architecture, groups, machine(), micro_batch_tokens=budget).peak
        assert chosen(int(fits / 0.9) + 1) == budget
    assert max(group.unique_tokens for group in groups) <= chosen(1000) < 2 * max(group.unique_tokens for group in groups)


def test_changes_are_those_that_fit(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"groups_per_step": 40, "micro_batch_tokens": 1024})
    groups, architecture = groups_of(config), model_config(config.model.name)
    found = list(changes_that_fit(config, architecture, groups, machine(GIB)))
    assert found and all(change.plan.peak <= machine(GIB).room for change in found)
    peaks = sorted(change.plan.peak for change in found)
    fewer = list(changes_that_fit(config, architecture, groups, machine(int(peaks[0] / 0.9) + 1)))
    assert 0 < len(fewer) < len(found)
    assert list(changes_that_fit(config, architecture, groups, machine(1000))) == []


def test_auto_is_saved_as_the_number_that_it_became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, train={"max_steps": 1, "groups_per_step": 20})
    assert config.train.micro_batch_tokens == "auto"
    assert train_run(config).read("config.json")["train"]["micro_batch_tokens"] == 1024  # type: ignore[index]
    monkeypatch.setattr("prefopt.train.plan.available_bytes", lambda: 2_000_000)
    again = tiny_config(tmp_path, train={"max_steps": 1, "groups_per_step": 20, "output_dir": str(tmp_path / "small")})
    small = train_run(again).read("config.json")["train"]["micro_batch_tokens"]  # type: ignore[index]
    assert small in (64, 128, 256, 512)
    monkeypatch.undo()
    longer = again.model_copy(update={"train": again.train.model_copy(update={"max_steps": 2})})
    assert longer.train.micro_batch_tokens == "auto"
    with pytest.MonkeyPatch.context() as patch:  # a resumed run cuts as it did, whatever is free by now
        patch.setattr("prefopt.pipeline.fitting_budget", lambda *given: pytest.fail("planned again"))
        train_run(longer, resume=True)


def test_a_model_that_cannot_be_followed_is_trained_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    groups, architecture = groups_of(config), model_config(config.model.name)

    def by_data(*given: Any) -> None:
        raise RuntimeError("the output shape depends on data")

    monkeypatch.setattr("prefopt.train.plan.forward_backward", by_data)
    with pytest.raises(ModelError, match=r"cannot be counted without its weights \(RuntimeError\)") as raised:
        plan_memory(config, architecture, groups, machine(), micro_batch_tokens=100)
    assert "train.micro_batch_tokens" in str(raised.value.todo)
    assert fitting_budget(config, architecture, groups, machine(1000)) == 1024


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_beyond_the_weights_memory_does_not_grow_with_the_vocabulary(dtype: torch.dtype, tied: bool) -> None:
    """Eight times the vocabulary, the same passes, of a small decoder where a table would be most of it."""
    random = np.random.default_rng(0)
    groups = [token_group(random, 128, (64, 64)) for _ in range(12)]  # more than a chunk of logits at either size
    config = resolve_config({"train": {"precision": "bf16" if dtype == torch.bfloat16 else "fp32", "groups_per_step": 12}})

    def passes(vocabulary: int) -> int:
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
        architecture = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, num_key_value_heads=4, **shape)
        planned = plan_memory(config, architecture, groups, machine(dtype=dtype), micro_batch_tokens=3072)
        return planned.parts["passes over the largest micro-batch"]

    assert passes(2**18) == pytest.approx(passes(2**15), rel=0.07)  # blocks are cut evenly: some are a little smaller
