"""The length-controlled win rate takes a planted length effect out, and leaves a planted difference in quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from prefopt.evaluate.length_control import LEAST, length_controlled


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(quality: float, taste: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of a judge with odds exp(quality + taste * characters), and the characters by which the policy is longer."""
    random = np.random.default_rng(seed)
    difference = random.normal(40, 60, count).round()
    return (random.random(count) < sigmoid(quality + taste * difference)).astype(float), difference


def test_a_planted_length_effect_is_removed() -> None:
    outcome, difference = drawn(0.0, 0.03, 500, seed=1)
    found, note = length_controlled(outcome, difference, range(500))
    assert found is not None and note == ""
    assert outcome.mean() > 0.6, "the judge likes length, and the policy is longer"
    rate = found["rate"]
    assert rate["low"] < 0.5 < rate["high"] < 0.6
    assert found["log_odds_per_sd"]["low"] > 1
    assert found["log_odds_per_sd"]["value"] == pytest.approx(0.03 * found["sd_characters"], rel=0.25)


def test_quality_behind_a_length_effect_is_found() -> None:
    outcome, difference = drawn(-0.8, 0.03, 800, seed=2)
    found, _ = length_controlled(outcome, difference, range(800))
    assert found is not None
    assert outcome.mean() > 0.5, "a worse policy that wins by length alone"
    assert found["rate"]["high"] < 0.5
    assert found["rate"]["low"] < sigmoid(np.array(-0.8)) < found["rate"]["high"]


def test_without_a_taste_for_length_it_is_the_win_rate() -> None:
    outcome, difference = drawn(0.5, 0.0, 2000, seed=3)
    found, _ = length_controlled(outcome, difference, range(2000))
    assert found is not None
    assert found["rate"]["value"] == pytest.approx(outcome.mean(), abs=0.03)
    assert found["log_odds_per_sd"]["low"] < 0 < found["log_odds_per_sd"]["high"]


def test_it_maximises_the_penalised_likelihood() -> None:
    outcome, difference = drawn(0.3, 0.02, 60, seed=4)
    outcome[:10] = 0.5
    x = difference / difference.std()

    def loss(given: np.ndarray) -> float:
        p = sigmoid(given[0] + given[1] * x)
        v = p * (1 - p)
        information = v.sum() * (v * x * x).sum() - (v * x).sum() ** 2
        return -float((outcome * np.log(p) + (1 - outcome) * np.log(1 - p)).sum() + math.log(information) / 2)

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    found, _ = length_controlled(outcome, difference, range(60))
    assert found is not None
    assert found["rate"]["value"] == pytest.approx(float(sigmoid(best[0])), abs=1e-6)
    assert found["log_odds_per_sd"]["value"] == pytest.approx(best[1], abs=1e-5)


def test_changing_sides_mirrors_it() -> None:
    outcome, difference = drawn(0.4, 0.01, 150, seed=5)
    ours, theirs = (length_controlled(*given, range(150)) for given in ((outcome, difference), (1 - outcome, -difference)))
    assert ours[0] is not None and theirs[0] is not None
    assert ours[0]["rate"]["value"] == pytest.approx(1 - theirs[0]["rate"]["value"])
    assert ours[0]["rate"]["low"] == pytest.approx(1 - theirs[0]["rate"]["high"], abs=1e-6)


def test_winning_everything_is_finite_and_no_certainty() -> None:
    difference = np.random.default_rng(6).normal(0, 30, 40)
    found, _ = length_controlled(np.ones(40), difference, range(40))
    assert found is not None
    assert 0.9 < found["rate"]["value"] < 1
    separated, _ = length_controlled((difference > 0).astype(float), difference, range(40))
    assert separated is not None and math.isfinite(separated["log_odds_per_sd"]["high"])


def test_comparisons_of_one_prompt_count_as_one() -> None:
    outcome, difference = drawn(0.4, 0.01, 50, seed=7)
    once, _ = length_controlled(outcome, difference, range(50))
    copied, _ = length_controlled(np.repeat(outcome, 4), np.repeat(difference, 4), np.repeat(range(50), 4).tolist())
    assert once is not None and copied is not None
    assert copied["rate"] == pytest.approx(once["rate"])


def test_what_cannot_be_told_apart_is_left_out_with_a_reason() -> None:
    assert length_controlled(np.ones(30), np.full(30, 7.0), range(30)) == (None, "left out: all pairs differ by 7 characters")
    few = length_controlled(np.ones(LEAST - 1), np.arange(LEAST - 1.0), range(LEAST - 1))
    assert few == (None, f"left out: {LEAST - 1} prompts, and {LEAST} are needed")
    found, note = length_controlled(*drawn(0.0, 0.01, 50, seed=8)[:1], np.arange(1.0, 51.0), range(50))
    assert found is not None and found["extrapolated"] and "extrapolation" in note


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [50, 150])
def test_its_interval_covers(prompts: int) -> None:
    covered = 0
    for seed in range(700):
        outcome, difference = drawn(0.3, 0.02, prompts, seed=1000 + seed)
        found, _ = length_controlled(outcome, difference, range(prompts), seed=seed, resamples=400)
        assert found is not None
        covered += found["rate"]["low"] <= 1 / (1 + math.exp(-0.3)) <= found["rate"]["high"]
    assert 0.93 <= covered / 700 <= 0.97
