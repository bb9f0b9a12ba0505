"""Reliability of sigmoid(margin): what is calibrated is found so, what is too sure is not, whatever the coins say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefopt.core.errors import DataError
from prefopt.evaluate.calibration import calibration_lines, calibration_section, ece, reliability

pytestmark = pytest.mark.slow


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def margins(count: int, sureness: float, seed: int) -> np.ndarray:
    """`sureness` times the true log-odds that chosen is better, of pairs whose labels follow these odds."""
    random = np.random.default_rng(seed)
    odds = random.normal(0, 1.5, count)
    kept = random.random(count) < sigmoid(odds)  # else the labels are the other way round
    return sureness * np.where(kept, odds, -odds)


def test_true_probabilities_are_calibrated_and_doubled_odds_are_too_sure() -> None:
    true, sure = (calibration_section(margins(4000, sureness, 0)) for sureness in (1.0, 3.0))
    assert true["ece"]["value"] < true["ece_by_chance"]["high"]
    assert sure["ece"]["low"] > sure["ece_by_chance"]["high"]
    assert sure["table"][-1]["predicted"] > sure["table"][-1]["observed"]["high"]
    assert sure["table"][0]["predicted"] < sure["table"][0]["observed"]["low"]
    assert true["brier"]["high"] < sure["brier"]["low"]


def test_the_brier_score_is_its_formula_and_needs_no_coins() -> None:
    given = margins(200, 1.0, 1)
    found = [calibration_section(given, seed=seed)["brier"]["value"] for seed in range(3)]
    assert found == pytest.approx([((sigmoid(given) - 1) ** 2).mean()] * 3)
    assert calibration_section(np.zeros(40))["brier"]["value"] == 0.25


def test_turning_pairs_round_makes_both_labels_and_keeps_what_is_known() -> None:
    found = calibration_section(np.full(400, 1.0), bins=2, seed=1)
    assert [row["predicted"] for row in found["table"]] == pytest.approx(
        [float(1 - sigmoid(np.array(1.0))), float(sigmoid(np.array(1.0)))], abs=0.05
    )
    observed = [row["observed"]["value"] for row in found["table"]]
    assert observed[0] < 0.1 and observed[1] > 0.9, "chosen always wins: where it is in the first place the label is 1"


def test_ece_and_bins_by_hand() -> None:
    p = np.array([0.9, 0.1, 0.6, 0.4])
    label = np.array([1.0, 1.0, 0.0, 0.0])
    assert ece(p, label, bins=1) == pytest.approx(abs(0.5 - 0.5))
    assert ece(p, label, bins=2) == pytest.approx((abs(0.25 - 0.5) + abs(0.75 - 0.5)) / 2)
    rows = reliability(p, label, bins=2)
    assert [(row["low"], row["high"], row["observed"]["n"]) for row in rows] == [(0.1, 0.4, 2), (0.6, 0.9, 2)]
    assert [row["observed"]["n"] for row in reliability(np.linspace(0, 1, 25), np.ones(25), bins=10)] == [3] * 5 + [2] * 5


def test_the_interval_of_ece_covers() -> None:
    """Truth: the ECE of very many pairs in the same number of bins. The interval joins two, and so may be a little wide."""
    many = margins(2_000_000, 3.0, 99)
    first = np.random.default_rng(0).random(len(many)) < 0.5
    truth = ece(sigmoid(np.where(first, many, -many)), first.astype(float), bins=5)
    covered = 0
    for seed in range(300):
        found = calibration_section(margins(300, 3.0, seed), bins=5, seed=10_000 + seed)["ece"]
        covered += found["low"] <= truth <= found["high"]
    assert 0.93 <= covered / 300 <= 0.98


def test_the_section_is_json_and_follows_its_seed() -> None:
    given = margins(60, 1.0, 2)
    found = calibration_section(given, seed=4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found == calibration_section(given, seed=4)
    assert len(calibration_lines(found)) == 3 + 10


def test_too_few_pairs_and_infinite_margins_are_refused() -> None:
    for given in (np.ones(19), np.array([np.inf] * 30)):
        with pytest.raises(DataError, match="20 finite margins"):
            calibration_section(given)
