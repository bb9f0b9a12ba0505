"""Best-of-n: the choice, its expected reward against enumeration, and its KL against the exact distribution."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import ConfigError, DataError
from prefopt.rollout.best_of_n import best_of, expected_best_of, kl_bound, powers_of_two, weights_of_best

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)  # with ties


def by_enumeration(scores: list[float], k: int, values: list[float]) -> float:
    """Mean over all subsets of k of the value of the highest score, over the tied ones where several are."""
    means = []
    for subset in combinations(range(len(scores)), k):
        top = max(scores[at] for at in subset)
        means.append(np.mean([values[at] for at in subset if scores[at] == top]))
    return float(np.mean(means))


@given(SCORES, st.data())
def test_the_estimate_is_the_mean_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    """Of the samples tied for the first place in a subset, each is first in equally many orders."""
    k = data.draw(st.integers(1, len(scores)))
    values = [math.sin(3 * at) for at in range(len(scores))]
    assert expected_best_of(scores, k, values) == pytest.approx(by_enumeration(scores, k, values), abs=1e-12)
    assert expected_best_of(scores, k) == pytest.approx(by_enumeration(scores, k, scores), abs=1e-12)


@given(SCORES)
def test_weights_add_up_and_more_samples_never_lower_the_reward(scores: list[float]) -> None:
    curve = [expected_best_of(scores, k) for k in range(1, len(scores) + 1)]
    assert curve[0] == pytest.approx(np.mean(scores)) and curve[-1] == pytest.approx(max(scores))
    assert all(later >= earlier - 1e-12 for earlier, later in zip(curve, curve[1:], strict=False))
    for k in range(1, len(scores) + 1):
        assert weights_of_best(np.array(scores), k).sum() == pytest.approx(1)


def test_the_estimate_is_unbiased_for_the_expected_best_of_k() -> None:
    """Over all outcomes of four throws of a biased die, its mean is the expectation of the best of two throws."""
    faces, probability = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.3, 0.2])
    cumulative = np.cumsum(probability)
    best_of_two = float(faces @ np.diff(np.concatenate([[0.0], cumulative**2])))
    total = 0.0
    for outcome in np.ndindex(3, 3, 3, 3):
        total += probability[list(outcome)].prod() * expected_best_of(faces[list(outcome)], 2)
    assert total == pytest.approx(best_of_two, abs=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(1, 64))
def test_the_exact_kl_of_best_of_n_is_within_the_bound(parts: list[float], n: int) -> None:
    """Over responses with distinct rewards: P(best is i) = F(i)^n - F(i - 1)^n (arXiv 2401.01879)."""
    probability = np.array(parts) / sum(parts)
    above = np.minimum(np.cumsum(probability), 1.0) ** n
    best = np.diff(np.concatenate([[0.0], above]))
    kl = float(sum(q * math.log(q / p) for q, p in zip(best, probability, strict=True) if q > 0))
    assert -1e-9 <= kl <= kl_bound(n) + 1e-9


def test_the_bound_is_reached_where_every_response_is_improbable() -> None:
    probability = np.full(100_000, 1e-5)
    best = np.diff(np.concatenate([[0.0], np.cumsum(probability) ** 4]))
    assert float((best * np.log(best / probability)).sum()) == pytest.approx(kl_bound(4), abs=1e-4)
    assert kl_bound(1) == 0 and kl_bound(2) == pytest.approx(math.log(2) - 0.5)


def test_a_simulation_of_best_of_n_stays_within_the_bound() -> None:
    probability, rewards = np.array([0.6, 0.25, 0.1, 0.05]), np.array([0.0, 3.0, 1.0, 2.0])
    drawn = np.random.default_rng(0).choice(4, size=(40_000, 8), p=probability)
    best = drawn[np.arange(len(drawn)), rewards[drawn].argmax(axis=1)]
    share = np.bincount(best, minlength=4) / len(best)
    kl = float(sum(q * math.log(q / p) for q, p in zip(share, probability, strict=True) if q > 0))
    assert kl < kl_bound(8) - 0.1


ROW = {"prompt": "a", "responses": ["x", "y", "z"], "finished": [True, False, True], "response_tokens": [3, 4, 5]}


def test_the_best_response_is_kept_with_all_rewards() -> None:
    (best,) = best_of([ROW], [[0.5, 2.0, 2.0]], 3)
    assert best == {
        "prompt": "a",
        "responses": ["y"],
        "finished": [False],
        "response_tokens": [4],
        "best": 1,
        "rewards": [0.5, 2.0, 2.0],
    }
    assert best_of([ROW], [[0.5, 0.2, 9.0]], 2)[0]["responses"] == ["x"], "of the first two"


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ConfigError, match="best of 1"):
        best_of([ROW], [[1.0, 2.0, 3.0]], 1)
    with pytest.raises(DataError, match="row 0: 3 responses and 3 scores, for the best of 4"):
        best_of([ROW], [[1.0, 2.0, 3.0]], 4)
    with pytest.raises(DataError, match="1 rows and 0 lists"):
        best_of([ROW], [], 2)
    with pytest.raises(ConfigError, match="best of 4 from 3 samples"):
        expected_best_of([1.0, 2.0, 3.0], 4)
    with pytest.raises(ConfigError):
        kl_bound(0)


def test_powers_of_two_end_with_the_number_itself() -> None:
    assert powers_of_two(16) == [1, 2, 4, 8, 16] and powers_of_two(6) == [1, 2, 4, 6]
