"""Packed rows with a shared prompt give the log-probs and gradients of the model's own forward, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.tiny_models import CONFIGS, UNSHARED, awkward_groups, causal_model, language_model, plain_logps
from prefopt.model import layout
from prefopt.model.batch import packed_batch, padded_batch, sum_per_response

SQUARE, APART = 1e9, 0.0  # costs of a call that force one of the two ways to attend


def of_each_response(values_N: torch.Tensor, response_N: torch.Tensor) -> list[torch.Tensor]:
    return [values_N[response_N == number] for number in range(int(response_N.max()) + 1)]


@pytest.mark.parametrize("cost", [SQUARE, APART], ids=["square", "apart"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logps_are_those_of_the_plain_forward(name: str, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CALL_COST", {"cpu": cost})
    groups = awkward_groups()
    batch = packed_batch(groups, torch.device("cpu"))
    model = language_model(name)
    with torch.no_grad():
        packed = model.token_logps(batch)
        plain = plain_logps(causal_model(name), groups)
    assert len(plain) == batch.responses
    for ours, theirs in zip(of_each_response(packed, batch.response_N), plain, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().sum() < 1e-4
    assert model.sharing


@pytest.mark.parametrize("cost", [SQUARE, APART], ids=["square", "apart"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_gradients_are_those_of_the_plain_forward(name: str, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CALL_COST", {"cpu": cost})
    groups = awkward_groups()[:4]
    batch = packed_batch(groups, torch.device("cpu"))
    signs = torch.tensor([(-1.0) ** number * (1 + number / 3) for number in range(batch.responses)])
    model, theirs = language_model(name), causal_model(name)
    (sum_per_response(model.token_logps(batch), batch) * signs).sum().backward()
    sum(sign * values.sum() for sign, values in zip(signs, plain_logps(theirs, groups), strict=True)).backward()
    wanted = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    assert largest > 1
    for parameter_name, parameter in model.model.named_parameters():
        other = wanted[parameter_name].grad
        if other is None:
            assert parameter.grad is None or not parameter.grad.any(), parameter_name
            continue
        assert parameter.grad is not None, parameter_name
        assert (parameter.grad - other).abs().max() < 1e-4 * largest, parameter_name


@pytest.mark.parametrize("name", UNSHARED)
def test_architectures_without_attention_of_ours_fall_back_to_padded_rows(name: str) -> None:
    groups = awkward_groups()
    model = language_model(name)
    assert model.sharing is False
    batch = model.batch(groups)
    assert batch.layout is None
    with torch.no_grad():
        padded = model.token_logps(batch)
        plain = plain_logps(causal_model(name), groups)
    for ours, theirs in zip(of_each_response(padded, batch.response_N), plain, strict=True):
        assert (ours - theirs).abs().sum() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-oss"])
def test_padded_rows_agree_with_the_plain_forward_too(name: str) -> None:
    groups = awkward_groups(1)
    batch = padded_batch(groups, torch.device("cpu"), pad_id=7)
    with torch.no_grad():
        padded = language_model(name).token_logps(batch)
        plain = torch.cat(plain_logps(causal_model(name), groups))
    assert (padded - plain).abs().max() < 1e-4


def test_one_response_does_not_see_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in one response leave the log-probs of its siblings and neighbours as they are."""
    groups = awkward_groups()
    changed = awkward_groups()
    victim = changed[2].response_ids[1]
    victim[:] = (victim + 1) % 61
    for cost in (SQUARE, APART):
        monkeypatch.setattr(layout, "_CALL_COST", {"cpu": cost})
        model = language_model("llama")
        batch = packed_batch(groups, model.device)
        with torch.no_grad():
            before, after = model.token_logps(batch), model.token_logps(packed_batch(changed, model.device))
        owner = batch.response_N.numpy()
        others = owner != 2 + 1 + 1  # the groups before it have three responses
        assert np.allclose(before.numpy()[others], after.numpy()[others], atol=1e-6)
        assert np.abs(before.numpy()[~others] - after.numpy()[~others]).min() > 1e-3


def test_a_model_outside_of_a_layout_is_plain_transformers() -> None:
    """Generation and evaluation by others go through the same module after it was registered."""
    ids = torch.arange(20)[None] % 61
    for name in ("llama", "gemma2", "gemma3", "gpt-oss", "mistral"):
        with torch.no_grad():
            ours = language_model(name).model(input_ids=ids).logits
            theirs = causal_model(name)(input_ids=ids).logits
        assert (ours - theirs).abs().max() < 1e-4, name
