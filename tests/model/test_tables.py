"""Gradients of embedding and head that are added in place are those of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.tiny_models import CONFIGS, VOCABULARY, awkward_groups, language_model
from prefopt.core.resolve import resolve_config
from prefopt.model import head
from prefopt.model.engine import LanguageModel
from prefopt.model.tables import gradients_into, sum_of
from prefopt.train.optimizer import MasterOptimizer


def loss_of(model: LanguageModel) -> Tensor:
    values = model.token_logps(model.batch(awkward_groups()))
    return (values * torch.randn(len(values), generator=torch.Generator().manual_seed(0))).sum()


def tables_of(model: Any) -> list[Tensor]:
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return weights[:1] if weights[0] is weights[1] else weights


@pytest.mark.parametrize("chunk", [2**25, 5 * VOCABULARY])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt2", "opt"])
def test_the_sum_is_that_of_autograd(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, as with two micro-batches; tied tables (cohere) get both gradients in one sum, padding has none."""
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": chunk})
    model = language_model(name)
    _ = model.sharing
    for _ in range(2):
        loss_of(model).backward()
    wanted = {weight: weight.grad for weight in model.model.parameters()}
    for weight in model.model.parameters():
        weight.grad = None
    sums = {table: torch.zeros_like(table) for table in tables_of(model.model)}
    with gradients_into(sums):
        for _ in range(2):
            loss_of(model).backward()
    for weight in model.model.parameters():
        found = sums.get(weight, weight.grad)
        taken = weight in sums and not (name == "gemma2" and weight.grad is not None)  # its embedding has a forward of its own
        assert not taken or weight.grad is None
        found = found if taken else weight.grad
        if wanted[weight] is None:
            assert found is None
            continue
        torch.testing.assert_close(found, wanted[weight], rtol=1e-4, atol=1e-4)


def test_bf16_adds_to_fp32_in_slices_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_SLICE_NUMBERS", 7 * 32)
    model = language_model("llama")
    _ = model.sharing
    model.dtype = torch.bfloat16
    optimizer = MasterOptimizer(model.model, resolve_config({}).train, torch.bfloat16)
    loss_of(model).backward()
    plain = {name: master.grad.clone() for name, master in optimizer.masters.items() if master.grad is not None}
    optimizer.clear()
    tables = optimizer.table_gradients(model.model)
    assert len(tables) == 2
    with gradients_into(tables):
        loss_of(model).backward()
    for name, master in optimizer.masters.items():
        assert master.grad is not None and float(plain[name].abs().max()) > 0
        assert float((master.grad - plain[name]).abs().max()) <= 0.01 * float(plain[name].abs().max())


def test_gradients_asked_for_by_themselves_are_autograds() -> None:
    """Outside of the block, and for weights that are not in it, nothing is added anywhere."""
    model = language_model("cohere")
    (table,) = tables_of(model.model)
    assert sum_of(table) is None
    total = torch.zeros_like(table)
    with gradients_into({table: total}):
        assert sum_of(table) is total and sum_of(table.clone()) is None
    (gradient,) = torch.autograd.grad(loss_of(model), [table])
    assert float(gradient.abs().max()) > 0 and not total.any()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_embedding_is_known_where_it_is_a_plain_one(name: str) -> None:
    kinds = language_model(name).fused.kinds
    assert ("direct embedding" in kinds) == (name not in ("gemma2", "gemma3"))
