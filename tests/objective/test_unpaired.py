"""Closed forms, limits and invariances of the losses of responses that are desirable or not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import PAIR, group, judged, label, pairs, said, values
from prefopt.objective.apply import Objective
from prefopt.objective.pairs import dpo
from prefopt.objective.unpaired import apo_zero_unpaired, bco, kto

RATIOS = st.floats(-50, 50).map(lambda value: round(value, 6))
BETAS = st.floats(0.01, 2).map(lambda value: round(value, 6))
WEIGHTS = st.floats(0, 3).map(lambda value: round(value, 6))
GOOD, BAD = torch.tensor([True]), torch.tensor([False])


def sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class TestKto:
    def test_value(self) -> None:
        """kl 1, ratios 3 and -1, beta 0.5: gains 1 and -1. 1.5 sigmoid(-1) and 0.5 sigmoid(-1), averaged."""
        rows = [group(label(True), 2), group(label(False), 1)]
        options = {"name": "kto", "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5}
        outcome = judged(options, rows, values(-1.0, -2.0, -3.0), values(-2.0, -4.0, -2.0), mismatch=1.0)
        assert outcome.loss.item() == pytest.approx((1.5 + 0.5) / 2 / (1 + math.e), abs=1e-14)
        assert outcome.reward_S.tolist() == [1.5, -0.5]

    @given(RATIOS, BETAS, WEIGHTS, WEIGHTS)
    @settings(deadline=None)
    def test_at_the_reference_point_it_is_half_the_weight(self, kl: float, beta: float, good: float, bad: float) -> None:
        weights = {"desirable_weight": good, "undesirable_weight": bad}
        assert kto(values(kl), GOOD, number(kl), beta=beta, **weights).item() == pytest.approx(good / 2, rel=1e-12)
        assert kto(values(kl), BAD, number(kl), beta=beta, **weights).item() == pytest.approx(bad / 2, rel=1e-12)

    @given(RATIOS, st.floats(0, 20), BETAS, WEIGHTS)
    @settings(deadline=None)
    def test_gradient(self, ratio: float, kl: float, beta: float, weight: float) -> None:
        """-w beta sigmoid(g) sigmoid(-g), g = beta (r - kl): steepest at the reference point, fading on both sides."""
        good, bad = values(ratio), values(ratio)
        kto(good, GOOD, number(kl), beta=beta, desirable_weight=weight).sum().backward()
        kto(bad, BAD, number(kl), beta=beta, undesirable_weight=weight).sum().backward()
        gain = beta * (ratio - kl)
        wanted = -weight * beta * sigmoid(gain) * sigmoid(-gain)
        assert good.grad.item() == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        assert bad.grad.item() == pytest.approx(-wanted, rel=1e-6, abs=1e-12)

    @given(RATIOS, st.floats(0, 20), BETAS)
    @settings(deadline=None)
    def test_what_a_response_gains_as_desirable_it_loses_as_undesirable(self, ratio: float, kl: float, beta: float) -> None:
        both = kto(values(ratio), GOOD, number(kl), beta=beta) + kto(values(ratio), BAD, number(kl), beta=beta)
        assert both.item() == pytest.approx(1.0, rel=1e-12)

    def test_a_kl_below_0_counts_as_0(self) -> None:
        rows = [group(label(True), 1), group(label(False), 1)]
        below, at_0 = (
            judged({"name": "kto"}, rows, values(-1.0, -2.0), values(-2.0, -5.0), mismatch=kl).loss for kl in (-3.0, 0.0)
        )
        assert below == at_0

    def test_a_pair_is_a_desirable_and_an_undesirable_response(self) -> None:
        policy, reference = values(-1.0, -2.0, -2.0), values(-2.0, -2.0, -4.0)
        paired = judged({"name": "kto"}, [group(PAIR, 2, 1)], policy, reference, mismatch=0.5)
        single = judged({"name": "kto"}, [group(label(True), 2), group(label(False), 1)], policy, reference, mismatch=0.5)
        assert paired.loss.item() == pytest.approx(single.loss.item(), rel=1e-14)

    def test_shifting_ratios_matters_unless_the_kl_shifts_with_them(self) -> None:
        ratios, sides = values(1.0, -2.0, 0.5), torch.tensor([True, False, True])
        here = kto(ratios, sides, number(0.5), beta=1.0)
        assert not torch.allclose(kto(ratios + 1.0, sides, number(0.5), beta=1.0), here)
        assert torch.allclose(kto(ratios + 1.0, sides, number(1.5), beta=1.0), here, rtol=1e-12)


class TestApoZeroUnpaired:
    def test_value(self) -> None:
        """Ratios 2 and -2 with beta 0.5: sigmoid(-1) on both sides."""
        rows = [group(label(True), 1), group(label(False), 1)]
        outcome = judged({"name": "apo_zero_unpaired", "beta": 0.5}, rows, values(-1.0, -5.0), values(-3.0, -3.0))
        assert outcome.loss.item() == pytest.approx(1 / (1 + math.e), abs=1e-14)

    @given(RATIOS, BETAS, WEIGHTS, WEIGHTS, st.booleans())
    @settings(deadline=None)
    def test_it_is_kto_at_a_kl_of_0(self, ratio: float, beta: float, good: float, bad: float, desirable: bool) -> None:
        knobs = {"beta": beta, "desirable_weight": good, "undesirable_weight": bad}
        side = torch.tensor([desirable])
        assert apo_zero_unpaired(values(ratio), side, **knobs).item() == kto(values(ratio), side, number(0.0), **knobs).item()

    def test_equal_to_the_reference_it_is_a_half_whatever_beta(self) -> None:
        for beta in (1e-9, 0.1, 10.0):
            assert apo_zero_unpaired(values(0.0), GOOD, beta=beta).item() == 0.5
        assert apo_zero_unpaired(values(30.0), GOOD, beta=1e-12).item() == pytest.approx(0.5, abs=1e-10)


class TestBco:
    def test_the_first_shift_is_the_mean_of_the_step(self) -> None:
        """Ratios 3 and -1, beta 0.5: rewards 1.5 and -0.5, mean 0.5, logits 1 and -1: log(1 + 1/e) each."""
        rows = [group(label(True), 1), group(label(False), 1)]
        outcome = judged({"name": "bco", "beta": 0.5}, rows, values(-1.0, -3.0), values(-4.0, -2.0), learn=True)
        assert outcome.loss.item() == pytest.approx(math.log1p(math.exp(-1)), abs=1e-14)

    def test_the_shift_is_the_mean_over_all_responses_so_far(self) -> None:
        objective = Objective({"name": "bco", "beta": 2.0})
        steps = [[1.0, -0.5, 2.0], [0.25], [-3.0, 1.0]]
        seen: list[float] = []
        for ratios in steps:
            rows = [group(label(ratio > 0), 1) for ratio in ratios]
            heard = said(rows, values(*ratios), torch.zeros(len(rows), dtype=torch.float64))
            outcome = objective(heard, totals=objective.totals(rows), learn=True)
            seen += [2.0 * ratio for ratio in ratios]
            mean = sum(seen) / len(seen)
            wanted = bco(values(*ratios), torch.tensor(ratios) > 0, number(mean), beta=2.0).mean()
            assert outcome.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert objective.state() == {"bco.reward_mean": {"value": pytest.approx(mean, rel=1e-12), "count": 6.0}}

    def test_only_training_moves_the_shift_and_a_checkpoint_carries_it(self) -> None:
        rows = pairs(2)
        heard = said(rows, values(-1.0, -2.0, -3.0, -1.0), values(-2.0, -1.0, -1.0, -1.5).detach())
        objective = Objective({"name": "bco"})
        totals = objective.totals(rows)
        objective(heard, totals=totals, learn=True)
        kept = objective.state()
        evaluated = objective(heard, totals=totals).loss
        assert objective.state() == kept
        resumed = Objective({"name": "bco"})
        resumed.load_state(kept)
        assert resumed(heard, totals=totals).loss == evaluated
        assert resumed(heard, totals=totals, learn=True).loss == objective(heard, totals=totals, learn=True).loss

    def test_it_needs_the_whole_step(self) -> None:
        assert Objective({"name": "bco"}).step_wide and not Objective({"name": "kto"}).step_wide

    def test_the_shift_takes_up_what_all_ratios_have_in_common(self) -> None:
        rows = pairs(2)
        reference = values(-2.0, -1.0, -1.0, -1.5)
        here, there = (
            judged({"name": "bco"}, rows, values(-1.0, -2.0, -3.0, -1.0), reference - shift, learn=True).loss
            for shift in (0.0, 7.0)
        )
        assert there.item() == pytest.approx(here.item(), rel=1e-12)

    @given(RATIOS, RATIOS, st.floats(-5, 5), BETAS)
    @settings(deadline=None)
    def test_of_a_pair_it_bounds_dpo_from_above(self, c: float, r: float, shift: float, beta: float) -> None:
        """The paper's theorem: sigmoid(x) sigmoid(y) < sigmoid(x + y), with x = chosen - shift and y = shift - rejected."""
        bound = bco(values(c), GOOD, number(shift), beta=beta) + bco(values(r), BAD, number(shift), beta=beta)
        assert bound.item() >= dpo(values(c), values(r), beta=beta).item() - 1e-12

    @given(RATIOS, st.floats(-5, 5), BETAS)
    @settings(deadline=None)
    def test_gradient(self, ratio: float, shift: float, beta: float) -> None:
        """That of logistic regression: beta (probability - label)."""
        for side, target in ((GOOD, 1.0), (BAD, 0.0)):
            at = values(ratio)
            bco(at, side, number(shift), beta=beta).sum().backward()
            logit = beta * ratio - shift
            wanted = -beta * sigmoid(-logit) if target else beta * sigmoid(logit)
            assert at.grad.item() == pytest.approx(wanted, rel=1e-6, abs=1e-12)

    def test_policy_equal_to_the_reference_is_ln_2(self) -> None:
        equal = values(-1.0, -2.0, -3.0, -1.0)
        assert judged({"name": "bco"}, pairs(2), equal, equal.detach(), learn=True).loss.item() == pytest.approx(math.log(2))
