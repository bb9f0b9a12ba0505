"""What a step's values say: sides, margins and accuracies for every kind of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefopt.train.record import StepValues, area_under_curve, concordance


def values(responses: list[int], target: list[float], reward: list[float], **more: Any) -> StepValues:
    given: dict[str, Any] = {
        "sources": tuple(f"row {number}" for number in range(len(responses))),
        "kinds": ("pair",) * len(responses),
        "responses": np.array(responses),
        "target": np.array(target, dtype=float),
        "total": 0.5,
        "parts": {"dpo": 0.5},
        "loss": np.full(len(responses), 0.5),
        "ratio": np.array(reward, dtype=float) / 0.1,
        "reward": np.array(reward, dtype=float),
        "logp": -np.arange(1.0, len(reward) + 1),
        "tokens": np.full(len(reward), 4.0),
    }
    return StepValues(**{**given, **more})


def test_pairs_have_trls_metrics() -> None:
    """Margins 0.3, -0.1 and 0: the accuracy is (1 + 0 + 1/2) / 3."""
    metrics = values([2, 2, 2], [1, 0] * 3, [0.2, -0.1, 0.0, 0.1, 0.3, 0.3]).metrics()
    assert metrics["rewards/chosen"] == pytest.approx((0.2 + 0.0 + 0.3) / 3)
    assert metrics["rewards/rejected"] == pytest.approx((-0.1 + 0.1 + 0.3) / 3)
    assert metrics["rewards/margins"] == pytest.approx(0.2 / 3)
    assert metrics["rewards/accuracies"] == pytest.approx(0.5)
    assert metrics["logps/chosen"] == pytest.approx(-(1 + 3 + 5) / 3)
    assert metrics["lengths/rejected"] == 4.0
    assert metrics["logps/accuracies"] == 1.0
    assert "loss/dpo" not in metrics


def test_rankings_compare_the_best_with_the_mean_of_the_rest() -> None:
    """K = 3 with targets 0, 2, 1 and rewards 0.1, 0.2, 0.4: two of three ordered pairs are right."""
    of = values([3], [0, 2, 1], [0.1, 0.2, 0.4])
    assert of.accuracy() == (pytest.approx(2 / 3), 1)
    assert of.margins == pytest.approx([0.2 - (0.1 + 0.4) / 2])


def test_labelled_rows_have_an_area_under_the_curve() -> None:
    """Good 0.3 and 0.1 against bad 0.2 and 0.1: right, right; wrong, tied: (1 + 1 + 0 + 1/2) / 4."""
    of = values([1] * 4, [1, 1, 0, 0], [0.3, 0.1, 0.2, 0.1])
    assert of.accuracy() == (pytest.approx(2.5 / 4), 4)
    metrics = of.metrics()
    assert metrics["rewards/chosen"] == pytest.approx(0.2)
    assert metrics["rewards/rejected"] == pytest.approx(0.15)


def test_a_step_with_one_class_has_no_accuracy() -> None:
    metrics = values([1, 1], [1, 1], [0.3, 0.1]).metrics()
    assert "rewards/accuracies" not in metrics and "rewards/rejected" not in metrics
    assert metrics["rewards/chosen"] == pytest.approx(0.2)


def test_labelled_rows_have_no_margins_however_many_of_each_there_are() -> None:
    for targets in ([1, 1, 0], [1, 0, 0], [1, 0], [1, 1]):
        assert list(values([1] * len(targets), targets, [0.1] * len(targets)).margins) == []


def test_demonstrations_have_log_probs_and_no_rewards() -> None:
    nan = float("nan")
    metrics = values([1, 1], [nan, nan], [nan, nan]).metrics()
    assert metrics["logps/chosen"] == pytest.approx(-1.5)
    assert not any(name.startswith("rewards") for name in metrics)


def test_ties_are_left_out_of_margins() -> None:
    of = values([2, 2], [0.5, 0.5, 1, 0], [0.0, 0.9, 0.2, 0.1])
    assert of.margins == pytest.approx([0.1])
    assert of.accuracy() == (1.0, 1)


def test_parts_of_a_mix_are_named() -> None:
    metrics = values([2], [1, 0], [0.1, 0.0], parts={"dpo": 0.6, "sft": 2.0}).metrics()
    assert (metrics["loss/dpo"], metrics["loss/sft"]) == (0.6, 2.0)


def test_drift_is_the_mean_log_ratio_of_each_side() -> None:
    of = values([2, 2], [1, 0, 1, 0], [0.1, -0.2, 0.3, -0.4])
    assert of.drift() == {"drift/chosen": pytest.approx(2.0), "drift/rejected": pytest.approx(-3.0)}


def test_the_area_equals_counting_every_pair() -> None:
    random = np.random.default_rng(3)
    rewards, targets = random.integers(0, 6, 60).astype(float), random.integers(0, 2, 60).astype(float)
    good, bad = rewards[targets > 0.5], rewards[targets <= 0.5]
    counted = np.mean([(one > other) + 0.5 * (one == other) for one in good for other in bad])
    assert area_under_curve(rewards, targets) == (pytest.approx(counted), 60)


def test_concordance_ignores_equal_targets() -> None:
    assert concordance(np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 0.0])) == 1.0
    assert concordance(np.array([1.0, 2.0]), np.array([0.5, 0.5])) is None
