"""Squared probabilities and KL of the chunked head are those of a dense softmax in float64, whatever the chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model.tiny_models import awkward_groups, causal_model, language_model
from prefopt.core.errors import ModelError
from prefopt.model import head
from prefopt.model.batch import packed_batch, padded_batch
from prefopt.model.engine import LanguageModel
from prefopt.model.head import Head

N, D, V = 23, 16, 37
CPU = torch.device("cpu")
KNOBS = [(1.0, None), (0.3, None), (1.0, 2.5), (1.7, 2.5)]


def tensors(seed: int, *, bias: bool, hidden: int = D, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Hidden states, weight and perhaps bias of one side."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(N, hidden), (V, hidden), (V,)] if bias else [(N, hidden), (V, hidden)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def in_float64(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.detach().double().requires_grad_() for value in values]


def dense(values: list[torch.Tensor], scale: float, softcap: float | None) -> torch.Tensor:
    """Log-probs over the vocabulary."""
    logits = F.linear(*values) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


def dense_kl(policy_NV: torch.Tensor, reference_NV: torch.Tensor) -> torch.Tensor:
    return (reference_NV.exp() * (reference_NV - policy_NV)).sum(-1)


def identity_head(logits_NV: torch.Tensor) -> tuple[torch.Tensor, Head]:
    """Hidden states and a head that give just these logits."""
    return logits_NV, Head(torch.eye(logits_NV.shape[1]))


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), KNOBS)
def test_log_square_is_that_of_the_dense_softmax(
    rows: int, bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": rows * V})
    values = tensors(3, bias=bias)
    ours = Head(values[1], values[2] if bias else None, scale, softcap).log_square(values[0])
    exact = (dense(in_float64(values), scale, softcap).exp() ** 2).sum(-1).log()
    assert ours.dtype is torch.float32 and not ours.requires_grad
    assert (ours - exact).abs().max() < 3e-6


@given(st.lists(st.lists(st.floats(-80, 80, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
@settings(deadline=None)
def test_log_square_lies_between_minus_log_v_and_0(rows: list[list[float]]) -> None:
    """By Jensen sum p^2 >= 1 / V, and sum p^2 <= sum p = 1; a constant on all logits changes nothing."""
    hidden, ours = identity_head(torch.tensor(rows))
    values = ours.log_square(hidden)
    assert bool((values >= -math.log(5) - 1e-5).all()) and bool((values <= 1e-6).all())
    assert torch.allclose(values, ours.log_square(hidden + 7.0), atol=1e-4)


def test_log_square_reaches_its_bounds_at_uniform_and_certain_logits() -> None:
    hidden, ours = identity_head(torch.tensor([[0.0] * 8, [50.0] * 8, [300.0] + [0.0] * 7]))
    assert ours.log_square(hidden).tolist() == pytest.approx([-math.log(8), -math.log(8), 0.0], abs=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), KNOBS)
def test_kl_is_dense_in_value_and_gradient(
    rows: int, bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference has its own hidden size, scale and soft cap, and gets no gradient."""
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": rows * V})
    ours, other = tensors(3, bias=bias), tensors(4, bias=not bias, hidden=5)
    theirs = in_float64(ours)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(6))
    reference = Head(other[1], None if bias else other[2], 0.8, 6.0)
    kl = Head(ours[1], ours[2] if bias else None, scale, softcap).kl_from(ours[0], other[0], reference)
    exact = dense_kl(dense(theirs, scale, softcap), dense(in_float64(other), 0.8, 6.0).detach())
    assert kl.dtype is torch.float32
    assert ((kl - exact).abs() <= 1e-5 * (1 + exact)).all()
    (kl * weights).sum().backward()
    (exact * weights.double()).sum().backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.grad is not None and wanted.grad is not None
        assert (mine.grad - wanted.grad).abs().max() < 1e-5 * wanted.grad.abs().max()
    assert all(value.grad is None for value in other)


@pytest.mark.parametrize("rows", [1, 5])
def test_several_chunks_are_one_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (2**22, rows * V):
        monkeypatch.setattr(head, "_CHUNK_LOGITS", {"cpu": limit})
        values, other = tensors(3, bias=True), tensors(4, bias=True)
        ours = Head(values[1], values[2], 1.3, 4.0)
        kl = ours.kl_from(values[0], other[0], Head(*other[1:]))
        kl.sum().backward()
        results.append([kl, ours.log_square(values[0]), *(value.grad for value in values)])
    for whole, parts in zip(*results, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "softcap"), KNOBS)
def test_kl_of_equals_is_0_with_gradient_0(scale: float, softcap: float | None) -> None:
    values = tensors(3, bias=True)
    ours = Head(values[1], values[2], scale, softcap)
    kl = ours.kl_from(values[0], values[0].detach().clone(), ours)
    kl.sum().backward()
    assert not kl.any()
    assert all(value.grad is not None and not value.grad.any() for value in values)


LOGITS = st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=6)


@given(LOGITS, LOGITS)
@settings(deadline=None)
def test_kl_is_never_negative_and_its_gradient_is_p_less_q(policy: list[float], reference: list[float]) -> None:
    """The gradient in the logits sums to 0: only differences of logits matter."""
    hidden, ours = identity_head(torch.tensor([policy]))
    other, theirs = identity_head(torch.tensor([reference]))
    hidden.requires_grad_()
    kl = ours.kl_from(hidden, other, theirs)
    kl.sum().backward()
    assert kl.item() >= -2e-6
    assert torch.allclose(hidden.grad, hidden.detach().softmax(-1) - other.softmax(-1), atol=1e-6)
    assert abs(hidden.grad.sum().item()) < 1e-6


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen: int) -> None:
    other = [value.detach() for value in tensors(4, bias=True)]
    values, wanted = tensors(3, bias=True), tensors(3, bias=True)
    values[frozen].requires_grad_(False)
    for sides in (values, wanted):
        Head(sides[1], sides[2]).kl_from(sides[0], other[0], Head(*other[1:])).sum().backward()
    for at, (value, whole) in enumerate(zip(values, wanted, strict=True)):
        assert (value.grad is None) if at == frozen else torch.equal(value.grad, whole.grad)


def test_bf16_statistics_are_fp32_and_close_to_those_of_the_same_rounded_numbers() -> None:
    values, other = (tensors(seed, bias=False, dtype=torch.bfloat16) for seed in (3, 4))
    ours, theirs = Head(values[1], scale=0.3), Head(other[1], scale=0.3)
    policy, reference = (dense(in_float64(side), 0.3, None) for side in (values, other))
    kl = ours.kl_from(values[0], other[0], theirs)
    kl.sum().backward()
    square = ours.log_square(values[0])
    assert kl.dtype is square.dtype is torch.float32
    assert (kl - dense_kl(policy, reference)).abs().max() < 0.05
    assert (square - (2 * policy).logsumexp(-1)).abs().max() < 0.05
    assert values[0].grad.dtype is values[1].grad.dtype is torch.bfloat16


def test_no_scored_token_has_no_statistics() -> None:
    values = tensors(3, bias=False)
    ours = Head(values[1])
    kl = ours.kl_from(values[0][:0], values[0][:0], ours)
    kl.sum().backward()
    assert kl.shape == ours.log_square(values[0][:0]).shape == (0,)
    assert not values[1].grad.any()


def test_another_vocabulary_is_refused_with_both_sizes() -> None:
    values = tensors(3, bias=False)
    with pytest.raises(ModelError, match=rf"{V} rows and the reference's {V - 1}"):
        Head(values[1]).kl_from(values[0], values[0], Head(values[1][1:]))


class TestTokenStatistics:
    """The engine: one forward of the body, and the reference on the same batch."""

    def test_they_are_those_of_the_dense_logits_one_row_at_a_time(self) -> None:
        groups = awkward_groups()
        policy, reference = language_model(), language_model(seed=5)
        with torch.no_grad():
            got = policy.token_statistics(packed_batch(groups, CPU), log_square=True, reference=reference)
            ours, theirs = ([*rows_of_logps(causal_model("llama", seed=seed), groups)] for seed in (0, 5))
        assert got.log_square_N is not None and got.kl_N is not None
        assert torch.allclose(got.log_square_N, torch.cat([(2 * row).logsumexp(-1) for row in ours]).float(), atol=1e-4)
        wanted = torch.cat([dense_kl(p, q) for p, q in zip(ours, theirs, strict=True)]).float()
        assert wanted.mean() > 0.5
        assert torch.allclose(got.kl_N, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
    def test_packed_is_padded_in_values_and_gradients(self, name: str) -> None:
        groups = awkward_groups()
        results = []
        for make in (packed_batch, padded_batch):
            policy, reference = language_model(name), language_model(name, seed=5)
            got = policy.token_statistics(make(groups, CPU), log_square=True, reference=reference)
            assert got.log_square_N is not None and got.kl_N is not None
            (got.logp_N.sum() - 2 * got.kl_N.sum()).backward()
            results.append((got, dict(policy.model.named_parameters())))
            assert all(parameter.grad is None for parameter in reference.model.parameters())
        (packed, one), (padded, other) = results
        for field in ("logp_N", "log_square_N", "kl_N"):
            assert torch.allclose(getattr(packed, field), getattr(padded, field), rtol=1e-4, atol=1e-4), field
        largest = max(float(parameter.grad.abs().max()) for parameter in other.values())
        for key, parameter in one.items():
            assert (parameter.grad - other[key].grad).abs().max() < 1e-4 * largest, key

    def test_logps_are_those_of_token_logps_and_what_is_not_asked_for_is_none(self) -> None:
        model, batch = language_model(), packed_batch(awkward_groups(), CPU)
        got = model.token_statistics(batch)
        assert torch.equal(got.logp_N, model.token_logps(batch))
        assert got.log_square_N is None and got.kl_N is None

    def test_the_body_runs_once_and_the_reference_without_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, reference = language_model(), language_model(seed=5)
        batch = policy.batch(awkward_groups())
        assert reference.sharing
        calls: list[tuple[LanguageModel, bool]] = []
        plain = LanguageModel.hidden_states

        def counted(self: LanguageModel, batch: object) -> torch.Tensor:
            calls.append((self, torch.is_grad_enabled()))
            return plain(self, batch)

        monkeypatch.setattr(LanguageModel, "hidden_states", counted)
        policy.token_statistics(batch, log_square=True, reference=reference)
        assert calls == [(reference, False), (policy, True)]

    def test_a_policy_is_its_own_reference_inside_a_scope(self) -> None:
        """The scope stands for adapters turned off: it is entered for the reference's forward only."""
        policy, start = language_model(), language_model()
        batch = policy.batch(awkward_groups())
        norm = policy.model.model.norm.weight

        @contextmanager
        def adapters_off() -> Iterator[None]:
            with torch.no_grad():
                norm.sub_(0.1)
            yield
            with torch.no_grad():
                norm.add_(0.1)

        with torch.no_grad():
            norm.add_(0.1)
        own = policy.token_statistics(batch, reference=policy, reference_scope=adapters_off())
        apart = policy.token_statistics(batch, reference=start)
        none = policy.token_statistics(batch, reference=policy)
        assert own.kl_N is not None and apart.kl_N is not None and none.kl_N is not None
        assert apart.kl_N.mean() > 1e-3
        assert torch.allclose(own.kl_N, apart.kl_N, rtol=1e-3, atol=1e-5)
        assert torch.equal(own.logp_N, apart.logp_N)
        assert not none.kl_N.any()

    def test_a_reference_that_cannot_follow_a_packed_batch_is_refused_and_padded_rows_are_not(self) -> None:
        policy, reference, groups = language_model(), language_model("bloom"), awkward_groups()[:2]
        with pytest.raises(ModelError, match="bloom: this reference cannot follow the packed batches of llama"):
            policy.token_statistics(packed_batch(groups, CPU), reference=reference)
        got = policy.token_statistics(padded_batch(groups, CPU), reference=reference)
        assert got.kl_N is not None and got.kl_N.isfinite().all()


def rows_of_logps(model: object, groups: list) -> Iterator[torch.Tensor]:
    """Log-probs over the vocabulary at the scored tokens of each response, from unpadded rows of the plain model."""
    for group in groups:
        for tokens, scored in zip(group.response_ids, group.scored, strict=True):
            row = torch.tensor([*group.prompt_ids.tolist(), *tokens.tolist()])
            places = len(group.prompt_ids) - 1 + torch.from_numpy(scored.nonzero()[0])
            yield model(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)[places]
