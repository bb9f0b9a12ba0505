"""The self-check passes on a sound model, and the check that fails names what is broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.tiny_models import awkward_groups, language_model
from prefopt.core.errors import ModelError
from prefopt.model import attention, attention_direct, engine, layout, reference
from prefopt.model.batch import Batch, packed_batch, sum_per_response
from prefopt.model.head import Head
from prefopt.model.selfcheck import selfcheck

ALL = {"chunked == dense", "packed == padded", "shared == duplicated", "gradients agree", "all == transformers"}


def failed(model: engine.LanguageModel) -> set[str]:
    return {check.name for check in selfcheck(model, awkward_groups()) if not check.passed}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_sound_model_passes_every_check(name: str) -> None:
    checks = selfcheck(language_model(name), awkward_groups())
    assert all(check.passed for check in checks), checks
    names = {check.name for check in checks}
    wanted = (ALL if name != "bloom" else {"chunked == dense", "all == transformers"}) | {"cached == live"}
    fused = ("fused norms", "fused gated MLPs")
    kinds = {"llama": (*fused, "direct embedding", "direct attention"), "gemma2": fused}
    paths = kinds.get(name, ("direct embedding",))
    assert names == wanted | {f"{path} == plain" for path in paths} | {f"{path}, gradients" for path in paths}
    assert all(check.deviation < 1e-4 for check in checks), checks


def test_a_broken_head_fails_the_check_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    assert model.sharing
    logps = Head.logps
    monkeypatch.setattr(Head, "logps", lambda self, hidden, target: logps(self, hidden, target) * 1.01)
    assert failed(model) == {"chunked == dense", "all == transformers"}


def test_a_head_that_is_not_understood_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    logps = Head.logps
    monkeypatch.setattr(Head, "logps", lambda self, hidden, target: logps(self, hidden, target) * 1.01)
    with pytest.raises(ModelError, match="vocabulary head"):
        _ = model.sharing


def test_packed_rows_that_see_their_neighbours_fail_the_check_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    assert model.sharing

    def one_long_row(self: Any, window: int | None, device: torch.device) -> list[layout.Segment]:
        end = self.spans[-1].start + self.spans[-1].tokens
        return [layout.Segment(0, end, ((0, end),), None)]

    monkeypatch.setattr(layout.Layout, "segments", one_long_row)
    assert {"packed == padded", "gradients agree", "all == transformers"} <= failed(model)
    assert "chunked == dense" not in failed(model)


def test_siblings_that_see_each_other_fail_the_check_of_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    assert model.sharing

    def whole_group(span: layout.GroupSpan, window: int | None, device: torch.device) -> Any:
        last = span.start + span.tokens
        yield layout.Segment(span.start, last, ((span.start, last),), None)

    monkeypatch.setattr(layout, "_segments", whole_group)
    assert failed(model) == {"shared == duplicated", "gradients agree", "all == transformers"}


def test_wrong_gradients_behind_right_values_fail_the_check_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    assert model.sharing
    monkeypatch.setattr(attention_direct, "_add_of_keys", lambda *tensors: None)
    assert failed(model) == {"gradients agree", "direct attention, gradients"}


def test_a_cache_that_returns_other_numbers_fails_the_check_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    add = reference.ReferenceCache.add
    monkeypatch.setattr(
        reference.ReferenceCache,
        "add",
        lambda self, groups, logps: add(self, groups, [tuple(v + 0.01 for v in values) for values in logps]),
    )
    (name,) = failed(language_model())
    assert "cache" in name


def test_nan_passes_no_check() -> None:
    model = language_model()
    assert model.sharing
    with torch.no_grad():
        model.model.get_output_embeddings().weight[3, 3] = float("nan")
    with pytest.raises(Exception, match="non-finite"):
        selfcheck(model, awkward_groups())


def test_attention_that_ignores_the_layout_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered function that never asks for the layout, and one that asks and then does something else."""
    model = language_model()
    model.model.set_attn_implementation("sdpa")
    assert model.sharing_deviation() is None
    assert model.sharing is False
    wrong = language_model()
    monkeypatch.setattr(layout, "_in_reach", lambda queries, keys, window: queries[:, None] >= keys[None, :] - 1)
    assert wrong.sharing is False
    assert wrong.batch(awkward_groups()).layout is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    """Backward runs after the layout was left: the recomputation has to find it again."""
    groups = awkward_groups()

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = language_model(name)
        model.model.train()
        model.disable_dropout()
        batches: list[Batch] = [packed_batch(groups[:3], model.device), packed_batch(groups[3:], model.device)]
        if checkpointing:
            model.enable_activation_checkpointing()
        losses = [sum_per_response(model.token_logps(batch), batch)[0::2].sum() for batch in batches]
        before = attention.calls_in_layout
        sum(losses).backward()
        assert (attention.calls_in_layout > before) is checkpointing
        return [parameter.grad for parameter in model.model.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    largest = max(float(gradient.abs().max()) for gradient in plain)
    assert len(plain) == len(recomputed)
    assert all((a - b).abs().max() <= 1e-6 * largest for a, b in zip(plain, recomputed, strict=True))


def test_without_dropout_training_mode_is_evaluation_mode() -> None:
    model = language_model("gpt2")
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = packed_batch(awkward_groups(), model.device)
    with torch.no_grad():
        calm = model.token_logps(batch)
        model.model.train()
        assert (model.token_logps(batch) - calm).abs().max() > 1e-2
        model.disable_dropout()
        assert torch.allclose(model.token_logps(batch), calm, atol=1e-6)
