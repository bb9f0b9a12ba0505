"""The chunked head computes log-softmax of the logits, and its gradients, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model.tiny_models import causal_model
from prefopt.model import head
from prefopt.model.footprint import without_data
from prefopt.model.head import Head, head_of

N, D, V = 23, 16, 37
CPU = torch.device("cpu")


def tensors(*, bias: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = [(N, D), (V, D), (V,)] if bias else [(N, D), (V, D)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def dense(values: list[torch.Tensor], target: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = F.linear(*values) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


# Rows of a chunk, of a block, and of what is kept: one of each, several chunks of a block, several blocks, several of each; kept or not.
CUTS = [(rows, block, kept) for rows, block in ((99, 99), (23, 23), (1, 99), (4, 10), (99, 7), (11, 13)) for kept in (N, 0)]


def cut_into(monkeypatch: pytest.MonkeyPatch, rows: int, block: int, kept: int = N, dtype: torch.dtype = torch.float32) -> None:
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": rows * V})
    monkeypatch.setattr(head, "_BLOCK_BYTES", {"cpu": block * V * dtype.itemsize})
    monkeypatch.setattr(head, "_KEPT_BYTES", kept * V * dtype.itemsize)


@pytest.mark.parametrize(("rows", "block", "kept"), CUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.5), (1.7, 2.5)])
def test_chunked_is_dense_in_value_and_gradient(
    rows: int, block: int, kept: int, bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(monkeypatch, rows, block, kept)
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    weights = torch.randn(N, generator=torch.Generator().manual_seed(6))
    ours, theirs = tensors(bias=bias), [t.detach().double().requires_grad_() for t in tensors(bias=bias)]
    chunked = Head(ours[1], ours[2] if bias else None, scale, softcap).logps(ours[0], target)
    exact = dense(theirs, target, scale, softcap)
    assert (chunked - exact).abs().max() < 1e-5
    (chunked * weights).sum().backward()
    (exact * weights.double()).sum().backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.grad is not None and wanted.grad is not None
        assert (mine.grad - wanted.grad).abs().max() < 2e-5 * wanted.grad.abs().max()


@pytest.mark.parametrize(("rows", "block", "kept"), CUTS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1.7, 2.5)])
def test_a_head_that_does_not_train_passes_the_gradient_on(
    rows: int, block: int, kept: int, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(monkeypatch, rows, block, kept)
    target = torch.arange(N) * 5 % V
    weights = torch.randn(N, generator=torch.Generator().manual_seed(6))
    hidden, weight, bias = (value.detach() for value in tensors(bias=True))
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (Head(weight, bias, scale, softcap).logps(ours, target) * weights).sum().backward()
    (dense([theirs, weight.double(), bias.double()], target, scale, softcap) * weights.double()).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() < 2e-5 * theirs.grad.abs().max()


def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 inside, so a central difference with a wide step and a directional derivative of the sum."""
    cut_into(monkeypatch, 5, 99)
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    values = tensors(bias=True)
    random = torch.Generator().manual_seed(9)
    for place, value in enumerate(values):
        direction = torch.randn(value.shape, generator=random)
        direction /= direction.norm()

        def shifted(step: float, place: int = place, direction: torch.Tensor = direction) -> float:
            moved = [v.detach() + step * direction if at == place else v.detach() for at, v in enumerate(values)]
            return float(Head(moved[1], moved[2], 1.3, 4.0).logps(moved[0], target).double().sum())

        slope = (shifted(0.02) - shifted(-0.02)) / 0.04
        total = Head(values[1], values[2], 1.3, 4.0).logps(values[0], target).sum()
        (gradient,) = torch.autograd.grad(total, value)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen: int) -> None:
    target = torch.arange(N) % V
    values, wanted = tensors(bias=True), tensors(bias=True)
    values[frozen].requires_grad_(False)
    Head(values[1], values[2]).logps(values[0], target).sum().backward()
    dense(wanted, target, 1.0, None).sum().backward()
    for at, (value, other) in enumerate(zip(values, wanted, strict=True)):
        assert (value.grad is None) if at == frozen else torch.allclose(value.grad, other.grad, atol=1e-4)


def test_bf16_logps_are_fp32_and_close_to_those_of_the_same_rounded_numbers() -> None:
    values = [value.detach() for value in tensors(bias=False, dtype=torch.bfloat16)]
    target = torch.arange(N) % V
    ours = Head(values[1]).logps(values[0], target)
    exact = dense([value.float() for value in values], target, 1.0, None)
    assert ours.dtype is torch.float32
    assert (ours - exact).abs().max() < 0.1


@pytest.mark.parametrize(("rows", "block", "kept"), CUTS)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_bf16_gradients_are_as_close_as_those_of_dense_logits(
    rows: int, block: int, kept: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for tokens that are nearly certain: 1 - p is rounded, not p."""
    cut_into(monkeypatch, rows, block, kept, torch.bfloat16)
    random = torch.Generator().manual_seed(3)
    values = [torch.randn(size, generator=random).to(torch.bfloat16) for size in ((N, D), (V, D), (V,))]
    target = F.linear(*(value.float() for value in values)).argmax(dim=1)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(6))

    def gradients(logps: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [value.to(dtype).requires_grad_() for value in values]
        found = torch.autograd.grad((logps(inputs) * weights).sum(), inputs)
        return [gradient.double() for gradient in found]

    exact = gradients(lambda inputs: dense(inputs, target, 1.0, softcap), torch.float64)
    plain = gradients(lambda inputs: dense(inputs, target, 1.0, softcap).float(), torch.bfloat16)
    ours = gradients(lambda inputs: Head(*inputs[1:], 1.0, softcap).logps(inputs[0], target), torch.bfloat16)
    for mine, other, wanted in zip(ours, plain, exact, strict=True):
        assert (mine - wanted).norm() <= 1.1 * (other - wanted).norm() + 0.005 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "block"), [(16, 40), (40, 16), (64, 64)])
def test_no_more_than_a_block_and_a_chunk_is_made_at_once(
    rows: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens: a block in the compute dtype, a chunk in fp32 and its own product; never N x V."""
    wide = 50 * V
    cut_into(monkeypatch, 50 * rows, 50 * block, 0, dtype)
    with without_data(CPU) as ledger:
        hidden, weight = (torch.empty(size, dtype=dtype, requires_grad=True) for size in ((800, D), (wide, D)))
        target = torch.empty(800, dtype=torch.long)
        given = ledger.live
        Head(weight).logps(hidden, target).sum().backward()
        learning = ledger.peak - given
        with ledger.peak_of() as frozen:
            Head(weight.detach()).logps(hidden, target).sum().backward()
    of_results = (len(hidden) + wide) * (D + 8) * 8
    assert frozen[0] - given <= rows * wide * (4 + 2 * dtype.itemsize) + of_results
    assert learning <= block * wide * dtype.itemsize + rows * wide * (4 + dtype.itemsize) + of_results
    assert learning < 0.4 * 800 * wide * dtype.itemsize


def test_no_scored_token_is_no_logp() -> None:
    values = tensors(bias=False)
    logps = Head(values[1]).logps(values[0][:0], torch.zeros(0, dtype=torch.long))
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not values[1].grad.any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "gpt2"])
def test_the_head_of_a_model_gives_its_logits(name: str) -> None:
    """Scale and soft cap are found in the configuration under each family's name for them."""
    model = causal_model(name)
    ids = torch.arange(12)[None] * 3 % 61
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
        target = torch.arange(12) * 5 % 61
        assert torch.allclose(head_of(model).logps(hidden, target), logps[torch.arange(12), target], atol=1e-5)


def test_a_second_backward_gives_the_same_gradients() -> None:
    hidden, weight, bias = (value.requires_grad_() for value in tensors(bias=True))
    target = torch.arange(len(hidden))
    loss = Head(weight, bias).logps(hidden, target).square().sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
