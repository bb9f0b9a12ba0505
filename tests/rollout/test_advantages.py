"""Laws of advantages: sums written out, baselines that cancel, and the controller of the KL price."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.rollout.advantages import adapted, gae, group_normalised, leave_one_out, normalised, scaled, token_rewards

NUMBERS = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


@given(rewards=NUMBERS, discount=st.floats(0.5, 1), gae_lambda=st.floats(0, 1), seed=st.integers(0, 99))
def test_gae_is_the_discounted_sum_of_temporal_differences(
    rewards: list[float], discount: float, gae_lambda: float, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=len(rewards))
    found, returns = gae(np.array(rewards), values, discount=discount, gae_lambda=gae_lambda)
    following = np.append(values[1:], 0.0)
    deltas = np.array(rewards) + discount * following - values
    for place in range(len(rewards)):
        wanted = sum((discount * gae_lambda) ** ahead * delta for ahead, delta in enumerate(deltas[place:]))
        assert found[place] == pytest.approx(wanted, abs=1e-9)
    assert returns == pytest.approx(found + values)


@given(rewards=NUMBERS, seed=st.integers(0, 99))
def test_with_lambda_and_discount_1_returns_are_the_rewards_to_come(rewards: list[float], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=len(rewards))
    _, returns = gae(np.array(rewards), values, discount=1.0, gae_lambda=1.0)
    assert returns == pytest.approx(np.cumsum(rewards[::-1])[::-1], abs=1e-9)


@given(log_ratio=NUMBERS, score=st.floats(-5, 5), price=st.floats(0, 1))
def test_token_rewards_add_up_to_the_score_less_the_price_of_the_kl(log_ratio: list[float], score: float, price: float) -> None:
    found = token_rewards(score, np.array(log_ratio), price)
    assert found.sum() == pytest.approx(score - price * sum(log_ratio), abs=1e-9)
    assert found[:-1] == pytest.approx(-price * np.array(log_ratio[:-1]))


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(-9, 9))
def test_baselines_of_a_group_cancel_and_forget_what_all_share(table: list[list[float]], shared: float) -> None:
    rewards = np.array(table)
    for advantages in (leave_one_out, group_normalised):
        found = advantages(rewards.ravel(), 4).reshape(rewards.shape)
        assert found.sum(axis=1) == pytest.approx(np.zeros(len(table)), abs=1e-6)
        if (np.ptp(rewards, axis=1) > 1e-2).all():
            assert advantages((rewards + shared).ravel(), 4) == pytest.approx(found.ravel(), abs=1e-6)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    assert group_normalised(np.full(4, 0.1), 4).tolist() == [0, 0, 0, 0]
    assert leave_one_out(np.array([1.0, 2.0, 3.0, 6.0]), 4) == pytest.approx([-8 / 3, -4 / 3, 0, 4])
    assert group_normalised(np.array([0.0, 1.0]), 2) == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_normalising_is_over_all_tokens_together() -> None:
    parts = [np.array([1.0, 2.0]), np.array([6.0])]
    found = np.concatenate(normalised(parts))
    assert (found.mean(), found.std()) == pytest.approx((0, 1))
    assert np.concatenate(scaled(parts)) == pytest.approx(np.array([1.0, 2.0, 6.0]) / np.std([1.0, 2.0, 6.0]))
    assert np.concatenate(normalised([np.ones(3)])).tolist() == [0, 0, 0]


@given(kl=st.floats(0, 50), target=st.floats(0.1, 20), responses=st.integers(1, 5000))
def test_the_price_of_kl_grows_above_the_target_and_shrinks_below(kl: float, target: float, responses: int) -> None:
    found = adapted(0.1, kl=kl, target=target, responses=responses, horizon=1000)
    assert np.sign(found - 0.1) == np.sign(kl - target) or found == pytest.approx(0.1)
    assert 0.08 - 1e-12 <= found <= 0.12 + 1e-12
