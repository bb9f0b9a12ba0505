"""DPO and IPO: gradients, invariances, minima, the optimal policy; how the objective reads log-ratios from tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import PAIR, group, judged, randoms, said
from prefopt.objective.apply import Objective, Outcome, dpo_loss
from prefopt.objective.pairs import dpo, ipo, robust

RATIOS = st.floats(-50, 50).map(lambda value: round(value, 6))
BETAS = st.floats(0.01, 5).map(lambda value: round(value, 6))
SHARES = st.floats(0, 0.5).map(lambda value: round(value, 6))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


@given(RATIOS, BETAS, SHARES)
@settings(deadline=None)
def test_dpo_of_equal_ratios_is_ln_2(ratio: float, beta: float, share: float) -> None:
    loss = dpo(tensor(ratio), tensor(ratio), beta=beta, label_smoothing=share)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


@given(RATIOS, RATIOS, BETAS)
@settings(deadline=None)
def test_gradient_of_dpo_is_minus_beta_times_the_probability_of_the_other_order(c: float, r: float, beta: float) -> None:
    """d/dm [-log sigmoid(beta m)] = -beta sigmoid(-beta m); plus on the chosen side, minus on the rejected."""
    chosen, rejected = tensor(c), tensor(r)
    dpo(chosen, rejected, beta=beta).sum().backward()
    wanted = -beta * sigmoid(-beta * (c - r))
    assert chosen.grad.item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)
    assert rejected.grad.item() == pytest.approx(-wanted, rel=1e-9, abs=1e-14)


@given(RATIOS, RATIOS, BETAS, SHARES)
@settings(deadline=None)
def test_formulas_in_plain_python(c: float, r: float, beta: float, share: float) -> None:
    """The text of the facts table, written out in floats."""
    m = c - r
    wanted = -(1 - share) * log_sigmoid(beta * m) - share * log_sigmoid(-beta * m)
    assert dpo(tensor(c), tensor(r), beta=beta, label_smoothing=share).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert ipo(tensor(c), tensor(r), beta=beta).item() == pytest.approx((m - 1 / (2 * beta)) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_cdpo_is_smallest_where_the_probability_is_the_share_of_right_labels(share: float, beta: float) -> None:
    """d/dm = 0 at sigmoid(beta m) = 1 - e, so at m = log((1 - e) / e) / beta; its value there is the entropy of e."""
    best = math.log((1 - share) / share) / beta
    margins = tensor(best - 0.5, best, best + 0.5)
    losses = dpo(margins, torch.zeros_like(margins), beta=beta, label_smoothing=share)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    assert gradient[1].item() == pytest.approx(0, abs=1e-12)
    assert gradient[0] < 0 < gradient[2]
    assert losses[1].item() == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share), abs=1e-12)


@given(RATIOS, RATIOS, BETAS)
@settings(deadline=None)
def test_ipo_pulls_the_margin_to_half_over_beta(c: float, r: float, beta: float) -> None:
    chosen, rejected = tensor(c), tensor(r)
    ipo(chosen, rejected, beta=beta).sum().backward()
    wanted = 2 * (c - r - 1 / (2 * beta))
    assert chosen.grad.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert rejected.grad.item() == pytest.approx(-wanted, rel=1e-9, abs=1e-9)
    assert ipo(tensor(c), tensor(c - 1 / (2 * beta)), beta=beta).item() == pytest.approx(0, abs=1e-9)


@given(RATIOS, RATIOS, st.floats(-20, 20), BETAS)
@settings(deadline=None)
def test_only_the_difference_of_the_ratios_matters(c: float, r: float, shift: float, beta: float) -> None:
    """The partition function of the prompt cancels: a constant on both log-ratios changes nothing."""
    for loss in (dpo, ipo):
        moved = loss(tensor(c + shift), tensor(r + shift), beta=beta)
        assert moved.item() == pytest.approx(loss(tensor(c), tensor(r), beta=beta).item(), rel=1e-6, abs=1e-9)


@given(RATIOS, RATIOS, BETAS)
@settings(deadline=None)
def test_beta_is_a_unit_of_the_ratios(c: float, r: float, beta: float) -> None:
    assert dpo(tensor(c), tensor(r), beta=beta).item() == pytest.approx(
        dpo(tensor(beta * c), tensor(beta * r), beta=1.0).item(), rel=1e-9, abs=1e-12
    )
    assert ipo(tensor(c), tensor(r), beta=beta).item() == pytest.approx(
        ipo(tensor(beta * c), tensor(beta * r), beta=1.0).item() / beta**2, rel=1e-6, abs=1e-9
    )


def test_half_of_the_labels_flipped_tells_nothing_apart() -> None:
    chosen, rejected = tensor(3.0, -1.0), tensor(1.0, 4.0)
    straight = dpo(chosen, rejected, label_smoothing=0.5)
    assert torch.allclose(straight, dpo(rejected, chosen, label_smoothing=0.5))


def test_extreme_margins_stay_finite_in_fp32() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo(chosen, torch.zeros(2), beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert chosen.grad.tolist() == [0.0, -1.0]


class TestPublicFunction:
    def test_it_is_the_loss_of_the_differences_and_the_rewards_are_beta_times_them(self) -> None:
        policy = (tensor(-10.0, -20.0), tensor(-12.0, -15.0))
        reference = (tensor(-11.0, -18.0), tensor(-11.0, -19.0))
        loss, chosen, rejected = dpo_loss(policy, reference, beta=0.5, label_smoothing=0.1, reduction="none")
        assert torch.allclose(loss, dpo(tensor(1.0, -2.0), tensor(-1.0, 4.0), beta=0.5, label_smoothing=0.1))
        assert chosen.tolist() == [0.5, -1.0] and rejected.tolist() == [-0.5, 2.0]
        assert not chosen.requires_grad and not rejected.requires_grad
        mean, _, _ = dpo_loss(policy, reference, beta=0.5, label_smoothing=0.1)
        assert mean.item() == pytest.approx(loss.mean().item())
        mean.backward()
        assert policy[0].grad.ne(0).all()

    def test_scalars_are_fine(self) -> None:
        loss, chosen, rejected = dpo_loss((torch.tensor(-3.0), torch.tensor(-4.0)), (torch.tensor(-3.0), torch.tensor(-4.0)))
        assert loss.item() == pytest.approx(math.log(2)) and chosen.item() == rejected.item() == 0.0

    @pytest.mark.parametrize(
        "options", [{"beta": 0.0}, {"beta": -1.0}, {"beta": float("nan")}, {"reduction": "sum"}, {"label_smoothing": 0.6}]
    )
    def test_a_wrong_option_is_a_value_error(self, options: dict[str, float]) -> None:
        pair = (torch.zeros(1), torch.zeros(1))
        with pytest.raises(ValueError, match=next(iter(options))):
            dpo_loss(pair, pair, **options)


class TestObjective:
    """Two pairs: log-ratios 2 and -2 of 2 and 4 tokens, then -3 and 4 of 3 and 8."""

    GROUPS = (group(PAIR, 2, 4), group(PAIR, 3, 8))
    RATIOS = (2.0, -2.0, -3.0, 4.0)

    def judged(self, options: dict[str, Any]) -> Outcome:
        counts = [2, 4, 3, 8]
        reference_N = randoms(sum(counts)).detach()
        ratio_N = torch.cat([torch.full((count,), ratio / count) for ratio, count in zip(self.RATIOS, counts, strict=True)])
        return judged(options, self.GROUPS, (reference_N + ratio_N.double()).requires_grad_(), reference_N)

    def test_dpo_sums_over_tokens_and_averages_over_pairs(self) -> None:
        outcome = self.judged({"name": "dpo", "beta": 0.3})
        wanted = dpo(tensor(2.0, -3.0), tensor(-2.0, 4.0), beta=0.3)
        assert torch.allclose(outcome.loss_G, wanted) and outcome.loss.item() == pytest.approx(wanted.mean().item())
        assert outcome.reward_S.tolist() == pytest.approx([0.6, -0.6, -0.9, 1.2])
        assert outcome.ratio_S.tolist() == pytest.approx(self.RATIOS)
        assert outcome.tokens_S.tolist() == [2, 4, 3, 8]

    def test_ipo_averages_unless_told_to_sum_and_rewards_are_sums_in_both(self) -> None:
        mean, total = self.judged({"name": "ipo"}), self.judged({"name": "ipo", "reduce": "sum"})
        assert torch.allclose(mean.loss_G, ipo(tensor(1.0, -1.0), tensor(-0.5, 0.5)))
        assert torch.allclose(total.loss_G, ipo(tensor(2.0, -3.0), tensor(-2.0, 4.0)))
        assert torch.equal(mean.reward_S, total.reward_S)

    def test_sigmoid_norm_averages(self) -> None:
        outcome = self.judged({"name": "sigmoid_norm"})
        assert torch.allclose(outcome.loss_G, dpo(tensor(1.0, -1.0), tensor(-0.5, 0.5), beta=5.0))

    def test_ld_alpha_weighs_the_tokens_beyond_the_length_of_the_shorter_response(self) -> None:
        """The rejected responses are longer: 2 of 4 tokens count in full, then 3 of 8; each holds the same share."""
        outcome = self.judged({"name": "dpo", "ld_alpha": 0.4})
        rejected = tensor(-2.0 * (2 + 0.4 * 2) / 4, 4.0 * (3 + 0.4 * 5) / 8)
        assert torch.allclose(outcome.loss_G, dpo(tensor(2.0, -3.0), rejected))
        assert outcome.reward_S.tolist() == pytest.approx([0.2, -0.2, -0.3, 0.4]), "a reward is of the whole response"

    def test_a_divergence_reads_the_ratio_of_the_whole_response(self) -> None:
        """js: log(2 t / (1 + t)) = log 2 + log sigmoid(log t), also where the loss averages over tokens afterwards."""
        sums = [math.log(2) + log_sigmoid(ratio) for ratio in self.RATIOS]
        chosen, rejected = tensor(*sums[::2]), tensor(*sums[1::2])
        outcome = self.judged({"name": "robust", "divergence": "js"})
        assert torch.allclose(outcome.loss_G, robust(chosen, rejected))
        outcome = self.judged({"name": "ipo", "divergence": "js"})
        assert torch.allclose(outcome.loss_G, ipo(chosen / tensor(2.0, 3.0), rejected / tensor(4.0, 8.0)))

    def test_wpo_multiplies_by_the_mean_token_probabilities_of_both_responses(self) -> None:
        """exp(mean(log p - log sum p^2)) is 1/2 for the one and 1/4 for the other response: weight 1/8, no gradient of it."""
        policy_N = tensor(math.log(0.5), math.log(0.5), math.log(0.25))
        heard = said([group(PAIR, 2, 1)], policy_N, torch.zeros(3).double(), log_square_N=torch.zeros(3).double())
        plain, weighted = (Objective({"name": "dpo", "wpo": wpo})(heard, totals=(1.0,)) for wpo in (False, True))
        assert weighted.loss.item() == pytest.approx(plain.loss.item() / 8)
        both = [torch.autograd.grad(outcome.loss, policy_N)[0] for outcome in (plain, weighted)]
        assert torch.allclose(both[1], both[0] / 8)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_on_bradley_terry_preferences_ends_at_the_optimal_policy(beta: float) -> None:
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z: what reinforcement learning with a KL price would find.

    The expectation over all ordered pairs is exact, so the minimum is pi* itself and no sampling noise is left.
    """
    random = torch.Generator().manual_seed(1)
    reward = torch.randn(8, generator=random, dtype=torch.float64)
    reference = torch.randn(8, generator=random, dtype=torch.float64).log_softmax(0)
    first, second = (torch.tensor(side) for side in zip(*itertools.permutations(range(8), 2), strict=True))
    probability = torch.sigmoid(reward[first] - reward[second])
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def expected_loss() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference
        loss = (probability * dpo(ratio[first], ratio[second], beta=beta)).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    optimal = (reference + reward / beta).softmax(0)
    distance = 0.5 * (logits.softmax(0) - optimal).abs().sum().item()
    assert 0.5 * (reference.exp() - optimal).abs().sum() > 0.1
    assert distance < 1e-4
