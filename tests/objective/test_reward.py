"""Closed forms and invariances of the losses of a reward model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import PAIR, group, judged, pairs, ranking, scores, values
from prefopt.objective.apply import Objective

pytestmark = pytest.mark.slow

SCORES = st.floats(-20, 20).map(lambda value: round(value, 6))


class TestReward:
    def test_value(self) -> None:
        """Scores 2 and 0.5, margin 0.5: logit 1. Centering: 0.01 * 2.5^2."""
        row = group(replace(PAIR, margin=0.5), 3, 2)
        outcome = judged({"name": "reward"}, [row], values(2.0, 0.5))
        assert outcome.loss.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.01 * 6.25, abs=1e-14)
        assert outcome.reward_S.tolist() == [2.0, 0.5]
        assert outcome.ratio_S.isnan().all()

    def test_a_row_without_a_margin_has_a_margin_of_0(self) -> None:
        plain, nought = (
            judged({"name": "reward"}, [group(feedback, 1, 1)], values(0.3, -0.4)).loss
            for feedback in (PAIR, replace(PAIR, margin=0.0))
        )
        assert plain == nought

    def test_scores_of_0_are_ln_2(self) -> None:
        assert judged({"name": "reward"}, pairs(3), values(*[0.0] * 6)).loss.item() == pytest.approx(math.log(2), abs=1e-15)

    @given(SCORES, SCORES, st.floats(-5, 5), st.floats(-10, 10))
    @settings(deadline=None)
    def test_without_centering_only_the_difference_counts(self, c: float, r: float, margin: float, shift: float) -> None:
        row = [group(replace(PAIR, margin=margin), 1, 1)]
        here, there = (judged({"name": "reward", "centering": 0.0}, row, values(c + by, r + by)).loss for by in (0.0, shift))
        assert there.item() == pytest.approx(here.item(), rel=1e-9, abs=1e-12)

    @given(SCORES, SCORES, st.floats(0, 2))
    @settings(deadline=None)
    def test_gradient(self, c: float, r: float, centering: float) -> None:
        at = values(c, r)
        judged({"name": "reward", "centering": centering}, pairs(1), at).loss.backward()
        preference = -0.5 * (1 + math.tanh((r - c) / 2))
        assert at.grad.tolist() == pytest.approx(
            [preference + 2 * centering * (c + r), -preference + 2 * centering * (c + r)], rel=1e-6, abs=1e-9
        )

    def test_centering_brings_the_mean_score_to_0_and_leaves_the_differences(self) -> None:
        """Scores 3 and 1: moving both by s changes the loss by centering * (4 + 2 s)^2 alone, smallest at s = -2."""
        shifts = values(-3.0, -2.0, -1.0)
        losses = [judged({"name": "reward"}, pairs(2), torch.tensor([3.0, 1.0, 3.0, 1.0]).double() + by).loss for by in shifts]
        (slopes,) = torch.autograd.grad(torch.stack(losses).sum(), shifts)
        assert slopes.tolist() == pytest.approx([-0.08, 0.0, 0.08], abs=1e-14)

    def test_it_trains_a_reward_model_and_needs_no_reference(self) -> None:
        objective = Objective({"name": "reward"})
        assert objective.trains_reward_model and not objective.needs_reference and objective.beta == 1.0


class TestRewardRanking:
    @given(SCORES, SCORES, st.floats(0, 1))
    @settings(deadline=None)
    def test_two_responses_are_reward_without_a_margin(self, c: float, r: float, centering: float) -> None:
        wanted = judged({"name": "reward", "centering": centering}, pairs(1), values(c, r)).loss.item()
        for row, at in ((PAIR, (c, r)), (ranking(2, 1), (r, c)), (scores(8.0, 2.5), (c, r))):
            found = judged({"name": "reward_ranking", "centering": centering}, [group(row, 1, 1)], values(*at)).loss.item()
            assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)

    def test_value(self) -> None:
        """Scores ln 3, ln 2, 0 from best to worst: 3/5, 3/4, 2/3; the mean of three pairs, and of three centerings."""
        ln2, ln3 = math.log(2), math.log(3)
        outcome = judged(
            {"name": "reward_ranking", "centering": 0.1}, [group(ranking(1, 2, 3), 1, 1, 1)], values(ln3, ln2, 0.0)
        )
        wanted = -(math.log(3 / 5) + math.log(3 / 4) + math.log(2 / 3)) + 0.1 * ((ln3 + ln2) ** 2 + ln3**2 + ln2**2)
        assert outcome.loss.item() == pytest.approx(wanted / 3, abs=1e-14)

    def test_equal_scores_of_the_row_say_nothing_of_their_pair(self) -> None:
        tied = judged({"name": "reward_ranking", "centering": 0.0}, [group(scores(2, 1, 1), 1, 1, 1)], values(0.5, 0.1, -0.7))
        wanted = math.log1p(math.exp(-0.4)) + math.log1p(math.exp(-1.2))
        assert tied.loss.item() == pytest.approx(wanted / 2, abs=1e-14)
        at = values(0.5, 0.1, -0.7)
        nothing = judged({"name": "reward_ranking"}, [group(scores(1, 1, 1), 1, 1, 1)], at).loss
        nothing.backward()
        assert nothing.item() == 0.0 and at.grad.tolist() == [0.0, 0.0, 0.0]

    @given(st.lists(SCORES, min_size=3, max_size=3), st.floats(-10, 10))
    @settings(deadline=None)
    def test_without_centering_a_constant_cancels(self, at: list[float], shift: float) -> None:
        row = [group(scores(0.5, 3.0, -1.0), 1, 1, 1), group(PAIR, 1, 1)]
        here, there = (
            judged({"name": "reward_ranking", "centering": 0.0}, row, values(*at, 0.0, 1.0) + by).loss for by in (0.0, shift)
        )
        assert there.item() == pytest.approx(here.item(), rel=1e-9, abs=1e-12)
