"""Scores of f-divergence DPO are the derivatives of f, agree where one divergence is another's limit, and hide no overflow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.objective.divergences import DIVERGENCES, divergence_score

RATIOS = st.floats(-20, 20).map(lambda value: round(value, 6))
ALPHAS = st.floats(-0.5, 1.5).map(lambda value: round(value, 6)).filter(lambda value: abs(value * (value - 1)) > 1e-3)
NAMES = st.sampled_from(DIVERGENCES)


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def generator_of(t: torch.Tensor, divergence: str, a: float) -> torch.Tensor:
    """f of each divergence as the paper writes it; its alpha is 1 - a."""
    paper = 1 - a
    formulas = {
        "reverse_kl": lambda: t * t.log(),
        "forward_kl": lambda: -t.log(),
        "js": lambda: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
        "alpha": lambda: (t ** (1 - paper) - (1 - paper) * t - paper) / (paper * (paper - 1)),
    }
    return formulas[divergence]()


@given(NAMES, RATIOS, ALPHAS)
@settings(deadline=None)
def test_the_score_is_the_derivative_of_f_less_its_value_at_1(divergence: str, ratio: float, alpha: float) -> None:
    t = torch.stack([torch.tensor(ratio, dtype=torch.float64).exp(), torch.tensor(1.0, dtype=torch.float64)]).requires_grad_()
    (slope,) = torch.autograd.grad(generator_of(t, divergence, alpha).sum(), t)
    wanted = (slope[0] - slope[1]).item()
    score = divergence_score(tensor(ratio), divergence=divergence, alpha=alpha)
    assert score.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("alpha", "paper"), [(0.3, 0.7), (0.7, 0.3), (0.1, 0.9), (0.5, 0.5)])
def test_alpha_is_1_minus_the_alpha_of_the_paper(alpha: float, paper: float) -> None:
    """The paper: f' = (1 - u^-alpha) / alpha."""
    ratio = torch.linspace(-5, 5, 11, dtype=torch.float64)
    wanted = (1 - ratio.exp() ** -paper) / paper
    assert torch.allclose(divergence_score(ratio, divergence="alpha", alpha=alpha), wanted, rtol=1e-12, atol=1e-12)


@given(NAMES, ALPHAS)
@settings(deadline=None)
def test_where_policy_is_reference_the_score_is_0_and_the_slope_that_of_the_log_ratio(divergence: str, alpha: float) -> None:
    """js is twice the Jensen-Shannon divergence, whose f'' at 1 is 1/4; f''(1) is 1 for the others."""
    ratio = tensor(0.0)
    score = divergence_score(ratio, divergence=divergence, alpha=alpha)
    (slope,) = torch.autograd.grad(score.sum(), ratio)
    assert score.item() == pytest.approx(0.0, abs=1e-15)
    assert slope.item() == pytest.approx(0.5 if divergence == "js" else 1.0, rel=1e-12)


@given(NAMES, st.floats(-60, 60), st.floats(0, 20), ALPHAS)
@settings(deadline=None)
def test_a_response_that_became_more_likely_never_scores_less(divergence: str, low: float, more: float, alpha: float) -> None:
    for dtype in (torch.float32, torch.float64):
        ratio = torch.tensor([low, low + more], dtype=dtype)
        lower, higher = divergence_score(ratio, divergence=divergence, alpha=alpha)
        assert lower <= higher + 4 * torch.finfo(dtype).eps * (1 + higher.abs())


@given(st.floats(-60, 60), st.floats(0.5, 20), st.floats(0.0, 1.0))
@settings(deadline=None)
def test_what_becomes_unlikely_scores_without_a_bound(ratio: float, less: float, alpha: float) -> None:
    """f' is unbounded at 0, which the paper's proof needs: below the reference every nat less costs at least half of one."""
    for divergence in DIVERGENCES:
        high = min(ratio, 0.0)
        pair = torch.tensor([high - less, high], dtype=torch.float64)
        lower, higher = divergence_score(pair, divergence=divergence, alpha=alpha)
        assert (higher - lower).item() >= 0.5 * less * (1 - 1e-9)


@given(RATIOS)
@settings(deadline=None)
def test_alpha_runs_from_forward_to_reverse_kl(ratio: float) -> None:
    for alpha, same in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        value = divergence_score(tensor(ratio), divergence="alpha", alpha=alpha)
        assert value.item() == divergence_score(tensor(ratio), divergence=same).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_goes_to_reverse_kl_without_losing_digits(dtype: torch.dtype) -> None:
    """(t^p - 1) / p = x + p x^2 / 2 + ... at x = log t; the plain formula has no digit left in fp32 at p = 1e-9."""
    for gap in (1e-3, 1e-6, 1e-9, 1e-14):
        for alpha in (1 - gap, 1 + gap):
            ratio = tensor(-30.0, -1.0, -1e-3, 0.5, 30.0, dtype=dtype)
            score = divergence_score(ratio, divergence="alpha", alpha=alpha)
            (slope,) = torch.autograd.grad(score.sum(), ratio)
            power = alpha - 1
            wanted = ratio + power * ratio**2 / 2
            rest = (power * ratio.detach()) ** 2
            precision = 4 * torch.finfo(dtype).eps
            assert bool(((score - wanted).abs() <= ratio.abs() * (rest + precision)).all())
            assert bool(((slope - (1 + power * ratio)).abs() <= rest + precision).all())


class TestOverflow:
    """exp(88.73) is above the largest fp32 number."""

    @pytest.mark.parametrize(("divergence", "alpha", "edge"), [("forward_kl", 0.5, -88.8), ("alpha", 0.5, -178.0)])
    @pytest.mark.parametrize("beyond", [0.0, 1e3, 1e6])
    def test_a_pair_settled_rightly_has_loss_0_and_gradient_0(
        self, divergence: str, alpha: float, edge: float, beyond: float
    ) -> None:
        ratio = tensor(0.3, edge - beyond, dtype=torch.float32)
        chosen, rejected = divergence_score(ratio, divergence=divergence, alpha=alpha)
        loss = -F.logsigmoid(0.1 * (chosen - rejected))
        loss.backward()
        assert rejected == -math.inf
        assert loss == 0
        assert ratio.grad.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("chosen", "rejected", "alpha"), [(-90.0, 0.0, 0.0), (-90.0, -95.0, 0.0), (-200.0, 5.0, 0.5), (0.0, 100.0, 2.0)]
    )
    def test_any_other_pair_has_a_loss_that_is_not_finite(self, chosen: float, rejected: float, alpha: float) -> None:
        ratio = tensor(chosen, rejected, dtype=torch.float32)
        better, worse = divergence_score(ratio, divergence="alpha", alpha=alpha)
        assert not torch.isfinite(-F.logsigmoid(0.1 * (better - worse)))

    def test_up_to_the_edge_values_and_gradients_are_finite(self) -> None:
        ratio = tensor(*(-88.7 + step * 1e-3 for step in range(-40, 1)), dtype=torch.float32)
        score = divergence_score(ratio, divergence="forward_kl")
        (slope,) = torch.autograd.grad(score.sum(), ratio)
        assert not slope.isnan().any() and not slope.isinf().any()
        assert bool((slope[score.isinf()] == 0).all())
        assert torch.allclose(slope[score.isfinite()], (-ratio).exp()[score.isfinite()], rtol=1e-5)
        assert bool(score.isinf().any()) and bool(score.isfinite().any())

    @pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
    def test_the_others_do_not_overflow(self, divergence: str) -> None:
        ratio = tensor(-1e6, 1e6, dtype=torch.float32)
        score = divergence_score(ratio, divergence=divergence)
        (slope,) = torch.autograd.grad(score.sum(), ratio)
        assert bool(score.isfinite().all()) and bool(slope.isfinite().all())

    def test_nan_stays_nan(self) -> None:
        for divergence in DIVERGENCES:
            assert divergence_score(torch.tensor([math.nan]), divergence=divergence).isnan().all()


def test_an_unknown_divergence_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'"chi".*reverse_kl, forward_kl, js, alpha'):
        divergence_score(torch.zeros(1), divergence="chi")
