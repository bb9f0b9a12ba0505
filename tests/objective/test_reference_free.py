"""Closed forms and limits of simpo, cpo and orpo, which look at the policy alone."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import PAIR, group, judged, pairs, values
from prefopt.objective.pairs import dpo
from prefopt.objective.reference_free import cpo, log_odds, orpo, simpo

LOGPS = st.floats(-30, -0.01).map(lambda value: round(value, 6))
BETAS = st.floats(0.01, 5).map(lambda value: round(value, 6))
GAMMAS = st.floats(0, 3).map(lambda value: round(value, 6))


def softplus(value: float) -> float:
    """log(1 + exp(value)), which is -log sigmoid(-value)."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))


class TestSimpo:
    def test_it_averages_over_tokens(self) -> None:
        """Means -2 and -3, so the logit is 2 (-2 + 3) - 1 = 1, whatever the lengths."""
        rows = [group(PAIR, 2, 4)]
        outcome = judged({"name": "simpo"}, rows, values(-1.0, -3.0, -2.0, -2.0, -4.0, -4.0))
        assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-14)
        assert outcome.reward_S.tolist() == [-4.0, -6.0], "beta times the mean log-prob"
        assert outcome.ratio_S.isnan().all(), "there is no reference"

    @given(LOGPS, BETAS, GAMMAS)
    @settings(deadline=None)
    def test_of_equally_likely_responses_it_is_a_softplus_of_gamma(self, logp: float, beta: float, gamma: float) -> None:
        loss = simpo(values(logp), values(logp), beta=beta, gamma=gamma)
        assert loss.item() == pytest.approx(math.log1p(math.exp(gamma)), rel=1e-12)

    @given(LOGPS, LOGPS, BETAS, GAMMAS)
    @settings(deadline=None)
    def test_gradient(self, c: float, r: float, beta: float, gamma: float) -> None:
        """d/dc [-log sigmoid(beta (c - r) - gamma)] = -beta sigmoid(gamma - beta (c - r))."""
        chosen, rejected = values(c), values(r)
        simpo(chosen, rejected, beta=beta, gamma=gamma).sum().backward()
        wanted = -beta * sigmoid(gamma - beta * (c - r))
        assert chosen.grad.item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)
        assert rejected.grad.item() == pytest.approx(-wanted, rel=1e-9, abs=1e-14)

    def test_only_the_difference_of_the_means_counts(self) -> None:
        """Shifting both means changes nothing; nor does writing a response twice, with the same mean."""
        first = judged({"name": "simpo"}, [group(PAIR, 2, 1)], values(-1.0, -2.0, -4.0)).loss
        longer = judged({"name": "simpo"}, [group(PAIR, 4, 2)], values(-1.0, -2.0, -1.0, -2.0, -4.0, -4.0)).loss
        shifted = judged({"name": "simpo"}, [group(PAIR, 2, 1)], values(-1.5, -2.5, -4.5)).loss
        assert [longer.item(), shifted.item()] == pytest.approx([first.item()] * 2, rel=1e-14)

    def test_without_a_margin_and_a_beta_it_says_nothing(self) -> None:
        assert simpo(values(-1.0), values(-9.0), beta=1e-12, gamma=0.0).item() == pytest.approx(math.log(2), abs=1e-11)


class TestCpo:
    def test_value(self) -> None:
        """Sums -4 and -6 with beta 0.5: logit 1; the chosen response's mean is -2."""
        outcome = judged({"name": "cpo", "beta": 0.5, "alpha": 0.3}, [group(PAIR, 2, 3)], values(-1.0, -3.0, -1.0, -2.0, -3.0))
        assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.3 * 2, abs=1e-14)
        assert outcome.reward_S.tolist() == [-2.0, -3.0]

    @given(LOGPS, LOGPS, BETAS)
    @settings(deadline=None)
    def test_its_preference_term_is_dpo_without_a_reference(self, c: float, r: float, beta: float) -> None:
        found = cpo(values(c), values(r), values(7.0), beta=beta, alpha=0.0)
        assert found.item() == dpo(values(c), values(r), beta=beta).item()

    @given(LOGPS, LOGPS, st.floats(0, 3), st.integers(1, 50))
    @settings(deadline=None)
    def test_gradient_of_the_imitation_term_is_alpha_over_the_length(
        self, c: float, r: float, alpha: float, count: int
    ) -> None:
        chosen, rejected = values(c), values(r)
        cpo(chosen, rejected, values(count), beta=0.1, alpha=alpha).sum().backward()
        preference = -0.1 * sigmoid(-0.1 * (c - r))
        assert chosen.grad.item() == pytest.approx(preference - alpha / count, rel=1e-9)
        assert rejected.grad.item() == pytest.approx(-preference, rel=1e-9)

    def test_with_chosen_responses_of_one_length_alpha_is_a_mix_with_sft(self) -> None:
        """sft averages over tokens and alpha over responses: the same where all have as many tokens."""
        policy_N = values(-1.0, -3.0, -1.0, -2.5, -0.5, -2.0)
        own = judged({"name": "cpo", "alpha": 0.7}, pairs(2, 2, 1), policy_N).loss
        mixed = judged({"cpo": {"alpha": 0.0}, "sft": 0.7}, pairs(2, 2, 1), policy_N).loss
        assert own.item() == pytest.approx(mixed.item(), rel=1e-14)


class TestOrpo:
    def test_value(self) -> None:
        """p = 1/2 and 1/4 a token: odds 1 and 1/3, ratio 3. ln 2 - beta log sigmoid(ln 3) = ln 2 - beta ln(3/4)."""
        half, quarter = math.log(0.5), math.log(0.25)
        outcome = judged({"name": "orpo", "beta": 0.2}, [group(PAIR, 2, 3)], values(half, half, quarter, quarter, quarter))
        assert outcome.loss.item() == pytest.approx(math.log(2) - 0.2 * math.log(3 / 4), abs=1e-14)

    @given(LOGPS, BETAS)
    @settings(deadline=None)
    def test_of_equally_likely_responses_the_odds_term_is_ln_2(self, logp: float, beta: float) -> None:
        assert orpo(values(logp), values(logp), beta=beta).item() == pytest.approx(-logp + beta * math.log(2), rel=1e-12)

    @given(LOGPS, LOGPS, BETAS)
    @settings(deadline=None)
    def test_gradient(self, c: float, r: float, beta: float) -> None:
        """d log_odds / d logp = 1 / (1 - p); eq. 8 to 10 of the paper."""
        chosen, rejected = values(c), values(r)
        orpo(chosen, rejected, beta=beta).sum().backward()
        log_odds_ratio = (c - math.log(-math.expm1(c))) - (r - math.log(-math.expm1(r)))
        wanted = beta * sigmoid(-log_odds_ratio)
        assert chosen.grad.item() == pytest.approx(-1 - wanted / -math.expm1(c), rel=1e-9)
        assert rejected.grad.item() == pytest.approx(wanted / -math.expm1(r), rel=1e-9)

    def test_a_weight_of_nothing_leaves_imitation(self) -> None:
        assert orpo(values(-1.5), values(-0.2), beta=1e-12).item() == pytest.approx(1.5, abs=1e-10)

    def test_shifting_both_log_probs_is_not_without_effect(self) -> None:
        """Unlike a ratio of probabilities, a ratio of odds depends on where on the scale the two are."""
        odds = [(orpo(values(c), values(c - 1.0), beta=1.0) + c).item() for c in (-0.1, -5.0)]
        assert odds[0] < odds[1] and odds[1] == pytest.approx(softplus(-1.0), abs=1e-2)


@pytest.mark.parametrize("logp", [-1e-15, -1e-9, -1e-4, -0.3, -0.7, -1.0, -20.0, -750.0, -1e5])
def test_log_odds_keeps_its_digits(logp: float) -> None:
    """Against 60 digits: near certainty 1 - p = -expm1(logp) must not be taken from the rounded p."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(logp)
        wanted = exact - (1 - exact.exp()).ln()
        slope = 1 / (1 - exact.exp())
    at = values(logp)
    found = log_odds(at)
    found.backward()
    assert found.item() == pytest.approx(float(wanted), rel=1e-14, abs=1e-15)
    assert at.grad.item() == pytest.approx(float(slope), rel=1e-12)


def test_log_odds_of_certainty_are_large_and_have_no_slope() -> None:
    for dtype in (torch.float32, torch.float64):
        certain = torch.zeros(1, dtype=dtype, requires_grad=True)
        found = log_odds(certain)
        found.backward()
        assert found.item() == pytest.approx(-math.log(torch.finfo(dtype).eps), rel=1e-3)
        assert certain.grad.item() == 0.0
