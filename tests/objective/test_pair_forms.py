"""Closed forms of every loss of pairs with a reference: numbers with their derivation, minima, probabilities, bounds.

c and r are the log-ratios of the chosen and of the rejected response, m = c - r.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objective.made_rows import PAIR, group, judged, label, pairs, said, values
from prefopt.core.losses import pair_variants as variant_facts
from prefopt.core.losses import pairs as pair_facts
from prefopt.objective.apply import Objective
from prefopt.objective.pair_variants import beta_dpo, cal_dpo, odpo, r_dpo, soft_dpo
from prefopt.objective.pairs import bco_pair, discopop, dpo, exo, nca, robust, sppo
from prefopt.objective.ties import davidson, rao_kupper
from prefopt.objective.transport import aot_unpaired

LN2 = math.log(2)
RATIOS = st.floats(-30, 30).map(lambda value: round(value, 6))
BETAS = st.floats(0.01, 2).map(lambda value: round(value, 6))


def at(name: str, chosen: float, rejected: float, **options: Any) -> float:
    """The loss of one pair with these log-ratios, of one token each, through the public Objective."""
    row = {key: options.pop(key) for key in ("margin", "probability", "tie") if key in options}
    groups = [group(replace(PAIR, **row), 1, 1)]
    return judged({"name": name, **options}, groups, values(chosen, rejected), values(0.0, 0.0).detach()).loss.item()


# With beta = ln 2 and c = 2, r = -1: exp(beta c) = 4, exp(beta r) = 1/2 and exp(beta m) = 8, so
# sigmoid(beta c) = 4/5, sigmoid(beta r) = 1/3, sigmoid(beta m) = 8/9.
CLOSED_FORMS: list[tuple[str, dict[str, Any], float]] = [
    ("dpo", {}, math.log(9 / 8)),
    ("dpo", {"label_smoothing": 0.25}, 0.75 * math.log(9 / 8) + 0.25 * math.log(9)),
    ("cdpo", {}, 0.9 * math.log(9 / 8) + 0.1 * math.log(9)),
    ("robust", {}, (0.9 * math.log(9 / 8) - 0.1 * math.log(9)) / 0.8),
    ("ipo", {}, (3 - 1 / (2 * LN2)) ** 2),
    ("hinge", {}, 0.0),  # beta m = 3 ln 2 > 1
    ("hinge", {"beta": 0.25}, 0.25),
    ("sigmoid_norm", {}, math.log(9 / 8)),  # one token each
    ("exo", {"label_smoothing": 0.1}, 8 / 9 * math.log(80 / 81) + 1 / 9 * math.log(10 / 9)),
    ("discopop", {"tau": 1.0}, 1 / 9 * math.log(9 / 8) + 8 / 9 * 1 / 8),  # tau = 1: the weight is sigmoid(beta m)
    ("nca", {}, math.log(5 / 4) + 0.5 * math.log(5) + 0.5 * math.log(3 / 2)),
    ("bco_pair", {}, math.log(5 / 4) + math.log(3 / 2)),  # nothing seen yet: baseline 0
    ("sppo", {}, (2 - 1 / (2 * LN2)) ** 2 + (-1 + 1 / (2 * LN2)) ** 2),
    ("apo_zero", {}, 1 / 5 + 1 / 3),
    ("apo_down", {}, 4 / 5 + 1 / 9),
    ("odpo", {"margin": 4.0}, math.log(1 + 4 / 8)),  # exp(-(beta m - log 4)) = 4 / 8
    ("odpo", {"margin": 4.0, "alpha": 0.5}, math.log(1 + 2 / 8)),
    ("odpo", {"margin": LN2, "scaling": "identity"}, math.log(1 + 2 / 8)),
    ("odpo", {"margin": -LN2, "scaling": "identity"}, math.log(1 + 0.5 / 8)),
    ("dpop", {}, math.log(9 / 8)),  # the chosen response is likelier than under the reference: no penalty
    ("r_dpo", {"alpha": 5.0}, math.log(9 / 8)),  # one token each
    ("beta_dpo", {"alpha": 0.0}, math.log(9 / 8)),
    ("cal_dpo", {}, math.log(1 + math.exp(-3)) + (2 - 1 / (2 * LN2)) ** 2 + (-1 + 1 / (2 * LN2)) ** 2),
    ("soft_dpo", {"probability": 0.75}, 0.75 * math.log(9 / 8) + 0.25 * math.log(9)),
    ("rao_kupper", {"nu": 2.0}, math.log(5 / 4)),  # odds 8 : 1 against nu = 2
    ("rao_kupper", {"nu": 2.0, "tie": True}, -math.log(3 * 4 / 5 * 1 / 17)),  # (nu^2 - 1) 8 / (8 + 2) 1 / (1 + 2 * 8)
    ("davidson", {"nu": 2.0, "beta": 2 * LN2 / 3}, math.log(1 + 1 / 4 + 4 / 2)),  # strengths 4 : 1, geometric mean 2
    ("davidson", {"nu": 2.0, "beta": 2 * LN2 / 3, "tie": True}, -math.log(8 / (4 + 1 + 8))),
    ("aot", {}, math.log(9 / 8)),  # one pair has one quantile
    ("aot_unpaired", {"label_smoothing": 0.25}, 0.75 * math.log(9 / 8) + 0.25 * math.log(9)),
]


@pytest.mark.parametrize(("name", "options", "wanted"), CLOSED_FORMS, ids=[f"{name}-{o}" for name, o, _ in CLOSED_FORMS])
def test_closed_forms(name: str, options: dict[str, Any], wanted: float) -> None:
    assert at(name, 2.0, -1.0, **{"beta": LN2, **options}) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_every_loss_has_a_closed_form() -> None:
    """tdpo has its own below: it needs the KL of each token."""
    named = {facts.name for table in (pair_facts, variant_facts) for facts in table.FACTS}
    assert named - {name for name, _, _ in CLOSED_FORMS} == {"tdpo"}


def test_dpop_takes_the_penalty_from_the_margin_where_the_chosen_response_got_less_likely() -> None:
    """c = -1, r = -3: m = 2, and penalty 3 takes 3 nats of it; at beta ln 2 the odds are 1 : 2."""
    assert at("dpop", -1.0, -3.0, beta=LN2, penalty=3.0) == pytest.approx(math.log(3))
    assert at("dpop", -1.0, -3.0, beta=LN2, penalty=0.0) == pytest.approx(math.log(5 / 4))


def test_r_dpo_takes_length_that_explains_the_preference_off_the_margin() -> None:
    """5 tokens against 2 at a price of ln(2) / 3: beta m = 3 ln 2 becomes 4 ln 2, and what is left to learn shrinks."""
    groups = [group(PAIR, 5, 2), group(PAIR, 2, 5)]
    policy_N = values(1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0)
    outcome = judged({"name": "r_dpo", "beta": LN2, "alpha": LN2 / 3}, groups, policy_N, torch.zeros(14).double())
    assert outcome.loss_G.tolist() == pytest.approx([math.log(17 / 16), math.log(5 / 4)])


def test_r_dpo_on_bradley_terry_preferences_ends_at_the_policy_of_the_penalised_reward() -> None:
    """Stationary at reference * exp((R - alpha |y|) / beta) / Z, which settles the sign: with a minus it would not be."""
    random = torch.Generator().manual_seed(3)
    reward = torch.randn(5, generator=random, dtype=torch.float64)
    tokens = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0], dtype=torch.float64)
    ratio = ((reward - 0.2 * tokens) / 0.5).requires_grad_()  # log(policy / reference) up to the constant log Z
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    probability = torch.sigmoid(reward[first] - reward[second])

    def slope(alpha: float) -> Tensor:
        loss = r_dpo(ratio[first], ratio[second], tokens[first], tokens[second], beta=0.5, alpha=alpha)
        return torch.autograd.grad((probability * loss).sum(), ratio)[0]

    assert slope(0.2).abs().max() < 1e-12 < 0.1 < slope(0.0).abs().max()


class TestTokenLevel:
    """KL 3 nats of the chosen and 5 of the rejected response, c = 2, r = -1."""

    @staticmethod
    def loss(**options: Any) -> tuple[float, list[float]]:
        groups = [group(PAIR, 2, 1)]
        kl_N = values(1.0, 2.0, 5.0)
        outcome = judged(
            {"name": "tdpo", "beta": LN2, **options}, groups, values(1.5, 0.5, -1.0), torch.zeros(3).double(), kl_N=kl_N
        )
        return outcome.loss.item(), torch.autograd.grad(outcome.loss, kl_N)[0].tolist()

    def test_tdpo1_takes_the_difference_of_the_kls_from_the_margin(self) -> None:
        """m - 2 = 1: odds 2 : 1; the slope in the margin is -beta / 3, in both KLs."""
        loss, slope = self.loss(version="tdpo1")
        assert loss == pytest.approx(math.log(3 / 2))
        assert slope == pytest.approx([-LN2 / 3, -LN2 / 3, LN2 / 3])

    def test_tdpo2_weighs_it_and_does_not_train_the_kl_of_the_chosen(self) -> None:
        """m - 0.5 * 2 = 2: odds 4 : 1."""
        loss, slope = self.loss()
        assert loss == pytest.approx(math.log(5 / 4))
        assert slope == pytest.approx([0.0, 0.0, 0.5 * LN2 / 5])

    def test_both_have_the_same_value_at_alpha_1_and_dpos_at_alpha_0(self) -> None:
        assert self.loss(alpha=1.0)[0] == pytest.approx(self.loss(version="tdpo1")[0], rel=1e-14)
        assert self.loss(alpha=0.0)[0] == pytest.approx(math.log(9 / 8))


class TestRunning:
    def test_bco_pair_subtracts_the_mean_reward_of_everything_seen_this_step_included(self) -> None:
        """Step 1: rewards ln 2 (2, -1) have mean ln(2) / 2; step 2 adds (0, 3), so the mean of the four is ln 2."""
        objective = Objective({"name": "bco_pair", "beta": LN2})
        groups = pairs(1)
        totals = objective.totals(groups)
        nothing = torch.zeros(2).double()
        first = objective(said(groups, values(2.0, -1.0), nothing), totals=totals, learn=True).loss.item()
        root = 2**0.5  # exp(ln(2) / 2)
        assert first == pytest.approx(math.log1p(root / 4) + math.log1p(0.5 / root))
        second = objective(said(groups, values(0.0, 3.0), nothing), totals=totals, learn=True).loss.item()
        assert second == pytest.approx(math.log1p(2) + math.log1p(8 / 2))
        again = objective(said(groups, values(0.0, 3.0), nothing), totals=totals).loss.item()
        assert again == second and objective.step_wide

    def test_beta_dpo_follows_the_mean_margin_of_the_step(self) -> None:
        """Step 1 sets M to its mean margin, 3, and beta stays. Step 2 has 5: M = 0.9 * 3 + 0.1 * 5 = 3.2, and beta grows by
        0.5 * (5 - 3.2) = 90 %. Step 3 has -20: M = 0.88, and 1 + 0.5 * (-20.88) is under the floor of a hundredth."""
        objective = Objective({"name": "beta_dpo", "beta": 0.2, "alpha": 0.5, "momentum": 0.9})
        groups = pairs(2)
        for means, beta in (((3.0, 3.0), 0.2), ((6.0, 4.0), 0.38), ((-21.0, -19.0), 0.002)):
            policy_N = values(means[0], 0.0, means[1], 0.0)
            outcome = objective(said(groups, policy_N, torch.zeros(4).double()), totals=(2.0,), learn=True)
            wanted = dpo(values(*means), values(0.0, 0.0), beta=beta)
            assert outcome.loss_G.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
            (slope,) = torch.autograd.grad(outcome.loss, policy_N)
            (plain,) = torch.autograd.grad(dpo(policy_N[::2], policy_N[1::2], beta=beta).mean(), policy_N)
            assert torch.allclose(slope, plain, rtol=1e-12), "no gradient through beta"

    def test_beta_dpo_has_one_beta_for_a_step_and_a_row_of_weight_2_counts_twice_in_it(self) -> None:
        margins, nothing = values(1.0, 4.0), torch.zeros(6).double()
        objective = Objective({"name": "beta_dpo"})
        objective.load_state({"beta_dpo.margin_mean": {"value": 1.5, "count": 4.0}})
        heavy = [group(PAIR, 1, 1), group(PAIR, 1, 1, weight=2.0)]
        outcome = objective(said(heavy, values(1.0, 0.0, 4.0, 0.0), nothing[:4]), totals=(3.0,))
        wanted = beta_dpo(margins, torch.zeros(2).double(), torch.tensor(3.0).double(), torch.tensor(1.5).double())
        assert (outcome.loss_G / torch.tensor([1.0, 2.0])).tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
        twice = objective(said(pairs(3), values(1.0, 0.0, 4.0, 0.0, 4.0, 0.0), nothing), totals=(3.0,))
        assert twice.loss.item() == pytest.approx(outcome.loss.item(), rel=1e-12)


class TestTransport:
    def test_aot_compares_quantiles_and_not_pairs(self) -> None:
        """Log-odds 3, 0 under the policy and 1, 2 under the reference, sorted: 0 - 1 and 3 - 2."""
        policy_N, reference_N = values(-1.0, -4.0, -2.0, -2.0), values(-1.0, -2.0, -1.0, -3.0).detach()
        outcome = judged({"name": "aot", "beta": LN2}, pairs(2), policy_N, reference_N)
        assert outcome.loss.item() == pytest.approx((math.log(3) + math.log(3 / 2)) / 2)
        assert outcome.loss_G.isnan().all(), "a quantile belongs to no pair"

    def test_aot_unpaired_takes_pairs_as_one_response_of_each_class(self) -> None:
        """Good 2, 5 and bad 4, 1, sorted: 2 - 1 and 5 - 4, though the first pair is in the wrong order."""
        outcome = judged({"name": "aot_unpaired", "beta": LN2}, pairs(2), values(2.0, 4.0, 5.0, 1.0), torch.zeros(4).double())
        assert outcome.loss.item() == pytest.approx(math.log(3 / 2))

    def test_of_unequal_counts_the_larger_class_is_interpolated_at_the_levels_of_the_smaller(self) -> None:
        """Bad 0, 1, 2, 3 at levels 1/4 and 3/4 of two good ones: places 4 / 4 - 1/2 = 0.5 and 2.5, so 0.5 and 2.5."""
        bad, good = (1.0, 3.0, 0.0, 2.0), (3.5, 1.5)
        rows = [group(label(False), 1) for _ in bad] + [group(label(True), 1) for _ in good]
        policy_N = values(*bad, *good)
        outcome = judged({"name": "aot_unpaired", "beta": LN2}, rows, policy_N, torch.zeros(6).double())
        assert outcome.loss.item() == pytest.approx(math.log(3 / 2))
        (slope,) = torch.autograd.grad(outcome.loss, policy_N)
        push = LN2 / 3 / 2  # beta sigmoid(-beta), halved by the mean over two quantiles; shared by the two neighbours
        assert slope.tolist() == pytest.approx([push / 2] * 4 + [-push] * 2)

    def test_one_of_a_class_is_compared_with_the_median_of_the_other(self) -> None:
        lone = aot_unpaired(values(5.0, 9.0, 1.0, 2.0), torch.tensor([True, False, False, False]), beta=LN2)
        assert lone.tolist() == pytest.approx([math.log(9 / 8)])

    def test_a_step_of_one_class_teaches_nothing_and_breaks_nothing(self) -> None:
        rows = [group(label(True), 1), group(label(True), 2)]
        policy_N = values(-1.0, -2.0, -3.0)
        outcome = judged({"name": "aot_unpaired"}, rows, policy_N, torch.zeros(3).double())
        outcome.loss.backward()
        assert outcome.loss.item() == 0 and policy_N.grad.tolist() == [0, 0, 0]


@given(RATIOS, BETAS, st.floats(0, 0.45))
@settings(deadline=None)
def test_robust_is_dpo_on_average_over_flipped_labels(margin: float, beta: float, share: float) -> None:
    """(1 - e) robust(m) + e robust(-m) = dpo(m): what 'unbiased' means."""
    (m,), nothing = values(margin), torch.zeros(()).double()
    kept, flipped = (robust(side, nothing, beta=beta, label_smoothing=share) for side in (m, -m))
    wanted = dpo(m, nothing, beta=beta)
    assert ((1 - share) * kept + share * flipped).item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-9)


@given(RATIOS, BETAS, st.floats(1e-3, 0.5))
@settings(deadline=None)
def test_exo_is_a_kl_that_is_0_where_cdpo_is_smallest(margin: float, beta: float, share: float) -> None:
    nothing = torch.zeros(()).double()
    assert exo(values(margin)[0], nothing, beta=beta, label_smoothing=share).item() > -1e-12
    best = math.log((1 - share) / share) / beta
    assert exo(values(best)[0], nothing, beta=beta, label_smoothing=share).item() == pytest.approx(0, abs=1e-12)


@given(RATIOS, BETAS, st.floats(0.01, 0.99))
@settings(deadline=None)
def test_soft_dpo_is_at_least_the_entropy_of_the_probability_and_reaches_it(margin: float, beta: float, p: float) -> None:
    probability, nothing = torch.tensor(p).double(), torch.zeros(()).double()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert soft_dpo(values(margin)[0], nothing, probability, beta=beta).item() >= entropy - 1e-9
    best = values(math.log(p / (1 - p)) / beta)[0]
    assert soft_dpo(best, nothing, probability, beta=beta).item() == pytest.approx(entropy, abs=1e-6)


@given(RATIOS, RATIOS, BETAS)
@settings(deadline=None)
def test_win_loss_and_tie_have_probabilities_that_add_up_to_1(c: float, r: float, beta: float) -> None:
    (chosen, rejected), tie, none = values(c, r), torch.ones(()).double(), torch.zeros(()).double()
    for loss, nu in ((rao_kupper, 1.7), (davidson, 0.6)):
        win, defeat = loss(chosen, rejected, none, beta=beta, nu=nu), loss(rejected, chosen, none, beta=beta, nu=nu)
        tied = loss(chosen, rejected, tie, beta=beta, nu=nu)
        assert sum(math.exp(-one.item()) for one in (win, defeat, tied)) == pytest.approx(1, rel=1e-9)


def test_equally_good_responses_tie_half_of_the_time_with_the_defaults() -> None:
    for name in ("rao_kupper", "davidson"):
        assert math.exp(-at(name, 3.0, 3.0, tie=True)) == pytest.approx(0.5)
        assert math.exp(-at(name, 3.0, 3.0)) == pytest.approx(0.25)


@given(RATIOS, RATIOS, BETAS, st.floats(-5, 5))
@settings(deadline=None)
def test_bco_pair_bounds_dpo_from_above_whatever_its_baseline(c: float, r: float, beta: float, shift: float) -> None:
    """sigmoid(a) sigmoid(b) <= sigmoid(a + b)."""
    chosen, rejected = values(c, r)
    bound = bco_pair(chosen, rejected, torch.tensor(shift).double(), beta=beta)
    assert bound.item() >= dpo(chosen, rejected, beta=beta).item() - 1e-12


@given(st.floats(-3, 3), BETAS)
@settings(deadline=None)
def test_targets_of_the_losses_that_have_one(offset: float, beta: float) -> None:
    """The smallest value of nca in c is at ln(2) / beta; of sppo at +-1 / (2 beta), and cal_dpo's squares vanish there."""

    target = 1 / (2 * beta)
    assert sppo(*values(target, -target), beta=beta).item() == 0
    assert sppo(*values(target + offset, -target), beta=beta).item() == pytest.approx(offset**2, abs=1e-9)
    assert cal_dpo(*values(target, -target), beta=beta).item() == pytest.approx(math.log1p(math.exp(-1 / beta)), abs=1e-9)
    chosen = values(LN2 / beta)
    (slope,) = torch.autograd.grad(nca(chosen, torch.zeros(1).double(), beta=beta).sum(), chosen)
    assert slope.item() == pytest.approx(0, abs=1e-12)


def test_discopop_rises_in_the_margin_around_0_and_falls_on_both_sides() -> None:
    """Slope at 0, in x = beta m: w'(0) (1 - ln 2) - 1/4 - 1/2 with w'(0) = 1 / (4 tau): positive for tau = 0.05."""
    for tau, at_zero in ((0.05, 5 * (1 - LN2) - 0.75), (0.5, 0.5 * (1 - LN2) - 0.75)):
        margin = values(-4.0, 0.0, 4.0)
        slope = torch.autograd.grad(discopop(margin, torch.zeros(3).double(), beta=1.0, tau=tau).sum(), margin)[0]
        assert slope[1].item() == pytest.approx(at_zero) and slope[0] < 0 > slope[2]


def test_a_margin_that_has_no_logarithm_is_not_made_up_by_odpo() -> None:
    margins = torch.tensor([0.0, -1.0]).double()
    losses = odpo(values(1.0, 1.0), values(0.0, 0.0), margins)
    assert losses[0].item() == 0 and losses[1].isnan()
