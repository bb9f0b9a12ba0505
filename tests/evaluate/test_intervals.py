"""Intervals cover the truth 95 times in 100, and know their closed forms."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from prefopt.evaluate.intervals import bootstrap_mean, cluster_means, paired_difference, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 10), (50, 100), (999, 1000)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    found, theirs = wilson(successes, n), binomtest(successes, n).proportion_ci(method="wilson")
    assert math.isclose(found["low"], theirs.low, abs_tol=1e-12)
    assert math.isclose(found["high"], theirs.high, abs_tol=1e-12)
    assert found["low"] <= found["value"] <= found["high"]


def test_wilson_of_halves_lies_between_its_neighbours_and_mirrors() -> None:
    low, half, high = wilson(3, 10), wilson(3.5, 10), wilson(4, 10)
    assert low["low"] < half["low"] < high["low"]
    assert low["high"] < half["high"] < high["high"]
    mirrored = wilson(6.5, 10)
    assert math.isclose(half["low"], 1 - mirrored["high"])
    assert math.isclose(half["high"], 1 - mirrored["low"])


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_wilson_covers(share: float) -> None:
    n = 100
    chance = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]  # exact, no simulation needed
    covered = sum(p for k, p in enumerate(chance) if wilson(k, n)["low"] <= share <= wilson(k, n)["high"])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_covers(skewed: bool) -> None:
    random = np.random.default_rng(7)
    samples = random.gamma(4.0, 1.0, (800, 100)) if skewed else random.normal(4.0, 2.0, (800, 100))
    found = [bootstrap_mean(values, seed=at, resamples=600) for at, values in enumerate(samples)]
    covered = np.mean([interval["low"] <= 4.0 <= interval["high"] for interval in found])
    assert 0.93 <= covered <= 0.97


def test_bootstrap_moves_and_scales_with_its_values() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    plain, moved = bootstrap_mean(values), bootstrap_mean(3 * values + 5)
    for key in ("value", "low", "high"):
        assert math.isclose(moved[key], 3 * plain[key] + 5, rel_tol=1e-9)  # type: ignore[literal-required]
    assert plain["n"] == 60
    assert plain["low"] < plain["value"] < plain["high"]


def test_bootstrap_leans_to_the_long_tail() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    found = bootstrap_mean(values)
    assert found["high"] - found["value"] > found["value"] - found["low"]


def test_bootstrap_follows_its_seed_whatever_the_size() -> None:
    values = np.random.default_rng(2).normal(size=1500)  # more than one block of draws
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_equal_values_and_a_single_one_have_no_width() -> None:
    assert bootstrap_mean([2.0] * 5) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 5}
    assert bootstrap_mean([2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 1}


def test_pairing_removes_what_both_share() -> None:
    random = np.random.default_rng(3)
    shared, own = random.normal(0, 10, 200), random.normal(1, 0.1, 200)
    found = paired_difference(shared + own, shared)
    assert found["high"] - found["low"] < 0.05
    assert found["low"] < 1 < found["high"]
    backward = paired_difference(shared, shared + own)
    assert math.isclose(backward["value"], -found["value"])


def test_cluster_means() -> None:
    assert cluster_means([1.0, 5.0, 3.0], [0, 1, 0]).tolist() == [2.0, 5.0]


def test_nonsense_is_refused() -> None:
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(successes, n)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError):
            bootstrap_mean(values)
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])
