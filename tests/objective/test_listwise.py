"""Closed forms, limits and invariances of the losses of K responses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import group, judged, randoms, ranking, scores, values
from prefopt.objective.listwise import all_pairs, best_of_k, plackett_luce
from prefopt.objective.pairs import dpo

pytestmark = pytest.mark.slow

RATIOS = st.floats(-30, 30).map(lambda value: round(value, 6))
SEVERAL = st.lists(RATIOS, min_size=2, max_size=6)
BETAS = st.floats(0.01, 2).map(lambda value: round(value, 6))
LISTWISE = [
    {"name": "plackett_luce"},
    {"name": "all_pairs"},
    {"name": "all_pairs", "weighting": "gap"},
    {"name": "all_pairs", "weighting": "lambda"},
    {"name": "best_of_k"},
]
EACH = pytest.mark.parametrize("options", LISTWISE, ids=lambda options: " ".join(options.values()))
THREE_TWO_ONE = (math.log(3), math.log(2), 0.0)  # exp(ratio) = 3, 2, 1


def one(ratios: Any, options: dict[str, Any], row: Any = None) -> Any:
    """The outcome for one group whose responses have these log-ratios and are in their order, unless `row` says otherwise."""
    row = row or ranking(*range(1, len(ratios) + 1))
    ratio_N = values(*ratios)
    return judged(options, [group(row, *[1] * len(ratios))], ratio_N, torch.zeros_like(ratio_N))


def present(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.bool)


class TestAll:
    @EACH
    @given(c=RATIOS, r=RATIOS, beta=BETAS)
    @settings(deadline=None)
    def test_two_responses_are_dpo(self, options: dict[str, Any], c: float, r: float, beta: float) -> None:
        wanted = dpo(values(c), values(r), beta=beta).item()
        assert one((c, r), {**options, "beta": beta}).loss.item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        assert one((r, c), {**options, "beta": beta}, scores(0.3, 7.0)).loss.item() == pytest.approx(
            wanted, rel=1e-12, abs=1e-15
        )

    @EACH
    @given(ratios=SEVERAL, shift=st.floats(-20, 20), beta=BETAS)
    @settings(deadline=None)
    def test_a_constant_of_the_prompt_cancels(
        self, options: dict[str, Any], ratios: list[float], shift: float, beta: float
    ) -> None:
        """Rounded, so that a shift does not undo a tie of the ratios, which lambda's ranks would show."""
        moved = [ratio + round(shift) for ratio in map(round, ratios)]
        here, there = one([*map(round, ratios)], {**options, "beta": beta}), one(moved, {**options, "beta": beta})
        assert there.loss.item() == pytest.approx(here.loss.item(), rel=1e-9, abs=1e-12)

    @EACH
    @given(ratios=st.lists(RATIOS, min_size=4, max_size=4, unique=True), order=st.permutations(range(4)))
    @settings(deadline=None)
    def test_the_order_of_the_responses_in_the_row_does_not_matter(
        self, options: dict[str, Any], ratios: list[float], order: list[int]
    ) -> None:
        worth = (2.5, -1.0, 0.5, 2.0)
        straight = one(ratios, options, scores(*worth)).loss.item()
        mixed = one([ratios[place] for place in order], options, scores(*(worth[place] for place in order))).loss.item()
        assert mixed == pytest.approx(straight, rel=1e-12)

    @EACH
    def test_a_group_does_not_feel_the_places_that_it_lacks(self, options: dict[str, Any]) -> None:
        """Beside a group of five, smaller ones have what they have alone: values and gradients.

        Also one whose best score is 0, and one far below 0: what stands in the places that they lack is 0, too.
        """
        rows = [
            group(ranking(2, 1), 1, 1),
            group(scores(4.0, 1.0, -3.0, 2.0, 9.0), *[1] * 5),
            group(ranking(3, 1, 2), 1, 1, 1),
            group(scores(-1.0, 0.0), 1, 1),
            group(scores(-5000.0, -5001.0, -5002.0), 1, 1, 1),
        ]
        ratio_N = randoms(15, scale=3.0)
        together = judged(options, rows, ratio_N, torch.zeros_like(ratio_N))
        (slope_N,) = torch.autograd.grad(together.loss, ratio_N)
        start = 0
        for row, loss in zip(rows, together.loss_G, strict=True):
            places = slice(start, start := start + len(row.response_ids))
            own_N = ratio_N[places].detach().requires_grad_()
            alone = judged(options, [row], own_N, torch.zeros_like(own_N))
            assert alone.loss.item() == pytest.approx(loss.item(), rel=1e-14)
            assert torch.allclose(torch.autograd.grad(alone.loss, own_N)[0] / len(rows), slope_N[places], rtol=1e-12)

    @EACH
    @pytest.mark.parametrize("beta", [1e-12, 0.1])
    def test_where_nothing_is_learnt_yet(self, options: dict[str, Any], beta: float) -> None:
        """Policy == reference, or beta -> 0: every order of K is as likely: log(K!), ln 2 a pair, ln K for the first place."""
        found = one((0.0,) * 4 if beta > 1e-6 else (5.0, -3.0, 2.0, 0.0), {**options, "beta": beta}).loss.item()
        wanted = {"plackett_luce": math.log(24), "all_pairs": math.log(2), "best_of_k": math.log(4)}[options["name"]]
        assert found == pytest.approx(wanted, abs=1e-10)

    @EACH
    def test_a_single_response_says_nothing(self, options: dict[str, Any]) -> None:
        outcome = one((3.0,), options)
        outcome.loss.backward()
        assert outcome.loss.item() == 0.0


class TestPlackettLuce:
    def test_value(self) -> None:
        """Weights 3, 2, 1: in that order 3/6 of being first, then 2/3: 1/3. In the reverse order 1/6, then 2/5: 1/15."""
        options = {"name": "plackett_luce", "beta": 1.0}
        assert one(THREE_TWO_ONE, options).loss.item() == pytest.approx(math.log(3), abs=1e-14)
        assert one(THREE_TWO_ONE, options, ranking(3, 2, 1)).loss.item() == pytest.approx(math.log(15), abs=1e-14)

    @given(st.lists(RATIOS, min_size=2, max_size=4), BETAS)
    @settings(deadline=None, max_examples=40)
    def test_the_probabilities_of_all_orders_add_up_to_1(self, ratios: list[float], beta: float) -> None:
        count = len(ratios)
        orders = torch.tensor(list(itertools.permutations(ratios)), dtype=torch.float64)
        loss = plackett_luce(orders, torch.ones(len(orders), count, dtype=torch.bool), beta=beta)
        assert torch.exp(-loss).sum().item() == pytest.approx(1.0, rel=1e-10)

    @given(SEVERAL, BETAS)
    @settings(deadline=None)
    def test_gradient(self, ratios: list[float], beta: float) -> None:
        """beta (sum over places k <= i of the chance of i among those left at k, minus 1; the last has none to lose)."""
        at = values(*ratios)
        plackett_luce(at[None], present(len(ratios)), beta=beta).sum().backward()
        for i in range(len(ratios)):
            chances = [1 / sum(math.exp(min(beta * (other - ratios[i]), 700)) for other in ratios[k:]) for k in range(i + 1)]
            assert at.grad[i].item() == pytest.approx(beta * (sum(chances) - 1), rel=1e-6, abs=1e-9)


class TestBestOfK:
    def test_value(self) -> None:
        """Weights 3 | 2, 1: the best has 3/6. From either place of the others."""
        for row in (ranking(1, 2, 3), ranking(1, 3, 2), scores(9.0, 1.0, 1.0)):
            found = one(THREE_TWO_ONE, {"name": "best_of_k", "beta": 1.0}, row).loss.item()
            assert found == pytest.approx(math.log(2), abs=1e-14)

    @given(SEVERAL, BETAS)
    @settings(deadline=None)
    def test_it_is_the_first_place_of_plackett_luce(self, ratios: list[float], beta: float) -> None:
        whole = one(ratios, {"name": "plackett_luce", "beta": beta}).loss.item()
        rest = one(ratios[1:], {"name": "plackett_luce", "beta": beta}).loss.item()
        assert one(ratios, {"name": "best_of_k", "beta": beta}).loss.item() == pytest.approx(whole - rest, rel=1e-9, abs=1e-9)

    def test_equally_best_ones_are_each_set_against_the_worse_ones_alone(self) -> None:
        """Weights 3 and 2 both best, 1 worse: the mean of -ln(3/4) and -ln(2/3), in either order."""
        for row, ratios in ((scores(5, 5, 1), THREE_TWO_ONE), (scores(1, 5, 5), THREE_TWO_ONE[::-1])):
            found = one(ratios, {"name": "best_of_k", "beta": 1.0}, row).loss.item()
            assert found == pytest.approx((math.log(4 / 3) + math.log(3 / 2)) / 2, abs=1e-14)

    def test_all_equally_good_say_nothing(self) -> None:
        ratios = values(1.0, -2.0, 0.5)
        loss = best_of_k(ratios[None], torch.ones(1, 3), present(3), beta=1.0)
        loss.sum().backward()
        assert loss.item() == 0.0 and ratios.grad.tolist() == [0.0, 0.0, 0.0]


class TestAllPairs:
    @given(SEVERAL, BETAS, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.sampled_from(["uniform", "gap", "lambda"]))
    @settings(deadline=None, max_examples=150)
    def test_against_a_loop(self, ratios: list[float], beta: float, worth: list[int], weighting: str) -> None:
        """Every pair with a better and a worse one; LiPO's weights with gains 2^value - 1 as the paper has them."""
        count = len(ratios)
        by_policy = sorted(range(count), key=lambda place: (-ratios[place], -worth[place], place))
        rank = {place: number for number, place in enumerate(by_policy, start=1)}
        total = weights = 0.0
        for i, j in itertools.permutations(range(count), 2):
            if worth[i] <= worth[j]:
                continue
            discounts = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
            gains = abs((2 ** worth[i] - 1) - (2 ** worth[j] - 1))
            weight = {"uniform": 1.0, "gap": worth[i] - worth[j], "lambda": gains * discounts}[weighting]
            total += weight * dpo(values(ratios[i]), values(ratios[j]), beta=beta).item()
            weights += weight
        wanted = total / weights if weights else 0.0
        row = scores(*map(float, worth[:count]))
        found = one(ratios, {"name": "all_pairs", "beta": beta, "weighting": weighting}, row).loss.item()
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)

    def test_a_mean_over_the_three_pairs(self) -> None:
        """Weights 3, 2, 1 in that order: probabilities 3/5, 3/4, 2/3."""
        wanted = -(math.log(3 / 5) + math.log(3 / 4) + math.log(2 / 3)) / 3
        assert one(THREE_TWO_ONE, {"name": "all_pairs", "beta": 1.0}).loss.item() == pytest.approx(wanted, abs=1e-14)

    def test_a_gap_of_two_counts_twice(self) -> None:
        """Scores 4, 3, 2: gaps 1, 2, 1."""
        wanted = -(math.log(3 / 5) + 2 * math.log(3 / 4) + math.log(2 / 3)) / 4
        options = {"name": "all_pairs", "beta": 1.0, "weighting": "gap"}
        assert one(THREE_TWO_ONE, options, scores(4, 3, 2)).loss.item() == pytest.approx(wanted, abs=1e-14)
        assert one(THREE_TWO_ONE, options).loss.item() == pytest.approx(wanted, abs=1e-14), "a ranking has steps of 1"

    @pytest.mark.parametrize("weighting", ["uniform", "gap", "lambda"])
    def test_equal_scores_say_nothing(self, weighting: str) -> None:
        ratios = values(1.0, -2.0, 0.5)
        loss = all_pairs(ratios[None], torch.ones(1, 3), present(3), weighting=weighting)
        loss.sum().backward()
        assert loss.item() == 0.0 and ratios.grad.tolist() == [0.0, 0.0, 0.0]

    def test_lambda_takes_scores_of_any_size(self) -> None:
        """2^50000 is no number, but relative to the best gain every weight is."""
        options = {"name": "all_pairs", "weighting": "lambda"}
        for row in (scores(50000.0, 49999.0, -50000.0), scores(-50000.0, -50001.0, -60000.0)):
            assert math.isfinite(one(THREE_TWO_ONE, options, row).loss.item())

    def test_uniform_takes_the_order_of_the_scores_alone(self) -> None:
        here, there = (
            one(THREE_TWO_ONE, {"name": "all_pairs"}, row).loss.item()
            for row in (scores(0.3, 0.2, 0.1), scores(90.0, 2.0, -7.0))
        )
        assert here == there
