"""The frontier's points and table: which points no other beats, and that points are what an evaluation says."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.evaluate.evaluation import SampleSettings, evaluate
from prefopt.evaluate.frontier import (
    Point,
    best_within,
    exactly,
    front_status,
    frontier_csv,
    frontier_json,
    frontier_lines,
    over_seeds,
    points_of,
)
from prefopt.evaluate.frontier_points import best_of_n_points, policy_point, reference_point
from prefopt.evaluate.intervals import Interval
from prefopt.rollout.prompts import as_prompt
from prefopt.rollout.rewards import Reward
from tiny_word_model import language_model


def interval(value: float, width: float = 0.0) -> Interval:
    return {"value": value, "low": value - width, "high": value + width, "n": 10}


def point(reward: float, kl: float, method: str = "dpo", *, width: float = 0.0, **facts: object) -> Point:
    return Point(method, interval(reward, width), interval(kl, width), **facts)  # type: ignore[arg-type]


SMALL = st.integers(0, 4).map(float)  # with ties in both
POINTS = st.lists(st.tuples(SMALL, SMALL), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(values: list[tuple[float, float]]) -> None:
    points = [point(reward, kl) for reward, kl in values]

    def is_beaten(at: int) -> bool:
        reward, kl = values[at]
        return any(r >= reward and k <= kl and (r, k) != (reward, kl) for r, k in values)

    expected = [not is_beaten(at) for at in range(len(values))]
    assert [status == "front" for status in front_status(points)] == expected


@given(st.lists(st.tuples(SMALL, SMALL, st.integers(0, 2).map(float)), max_size=10))
def test_a_point_is_beaten_where_another_is_ahead_of_both_its_intervals(values: list[tuple[float, float, float]]) -> None:
    points = [point(reward, kl, width=width) for reward, kl, width in values]
    for at, status in enumerate(front_status(points)):
        reward, kl, width = values[at]
        clearly = any(r - w > reward + width and k + w < kl - width for r, k, w in values)
        assert (status == "beaten") == clearly


@given(POINTS)
def test_the_front_is_the_same_for_kl_and_its_root(values: list[tuple[float, float]]) -> None:
    plain = front_status([point(reward, kl) for reward, kl in values])
    assert plain == front_status([point(math.exp(reward), math.sqrt(kl)) for reward, kl in values])


def test_an_estimate_below_no_kl_is_not_ahead_of_the_reference() -> None:
    below, reference = point(0.4, -0.3), point(0.5, 0.0, "reference")
    assert front_status([below, reference]) == ["unclear", "front"]


def test_the_best_of_each_method_within_a_budget() -> None:
    points = [point(0.5, 1), point(0.9, 4), point(0.7, 2, "ipo"), point(0.1, 0, "reference")]
    small, large = best_within(points, (1.0, 5.0))
    assert small == {"kl": 1.0, "best": {"dpo": 0, "reference": 3}}
    assert large == {"kl": 5.0, "best": {"dpo": 1, "ipo": 2, "reference": 3}}


def test_seeds_are_put_together_by_method_beta_and_step() -> None:
    seeds = [point(reward, kl, beta=0.1, seed=at, step=5) for at, (reward, kl) in enumerate([(1, 2), (3, 4)])]
    alone = [point(9, 9, beta=0.1, seed=0, step=9), point(0, 0, "reference")]
    (found,) = over_seeds([*seeds, *alone])
    assert (found["seeds"], found["beta"], found["step"]) == (2, 0.1, 5)
    assert found["reward"] == {"mean": 2.0, "standard_deviation": pytest.approx(math.sqrt(2))}


def test_the_table_is_read_back_from_json_and_says_the_same_as_csv() -> None:
    points = [
        point(0.2, 0.0, "reference"),
        point(0.9, 3.0, beta=0.1, seed=0, step=4, run="runs/a", more={"tokens": 7.0}),
        Point("best-of-n", interval(0.8), exactly(0.5), n=4, kl_is_bound=True),
        point(0.1, 9.0, "sft", seed=0, step=4),
    ]
    found = json.loads(json.dumps(frontier_json(points, reference="base")))
    assert points_of(found) == points
    assert [row["status"] for row in found["points"]] == ["front", "front", "front", "beaten"]
    rows = list(csv.DictReader(io.StringIO(frontier_csv(points))))
    assert [row["method"] for row in rows] == ["reference", "best-of-n", "dpo", "sft"], "in the order of KL"
    assert (rows[2]["reward"], rows[2]["kl"], rows[2]["beta"], rows[2]["tokens"]) == ("0.9", "3.0", "0.1", "7.0")
    assert rows[1]["kl_is_bound"] == "True" and rows[1]["beta"] == ""
    text = frontier_lines(points)
    assert text[2].startswith("* best-of-n") and "at most 0.500" in text[2] and text[4].startswith("- sft")
    assert any("2401.01879" in line for line in text)


PROMPTS = [as_prompt("a b"), as_prompt("c"), as_prompt("d e a")]
REWARD = Reward("a's", lambda prompts, responses: [float(text.count("a")) for text in responses])
SETTINGS = SampleSettings(samples_per_prompt=3, max_new_tokens=4)


def test_a_point_is_what_evaluate_says_of_the_same_samples() -> None:
    policy, reference = language_model(seed=1), language_model(seed=2)
    found = policy_point(policy, reference, PROMPTS, REWARD, SETTINGS, seed=5)
    base = reference_point(reference, PROMPTS, REWARD, SETTINGS, seed=5)
    whole, _ = evaluate(policy, reference, prompts=PROMPTS, reward=REWARD, samples_per_prompt=3, max_new_tokens=4, seed=5)
    assert found["reward"] == whole["reward"]["policy"] and base["reward"] == whole["reward"]["reference"]
    assert found["kl"]["value"] == pytest.approx(whole["kl"]["per_response"]["value"], abs=1e-12)
    assert found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"]
    assert found["more"] == {
        "tokens": pytest.approx(whole["length"]["policy"]["value"]),
        "finished": pytest.approx(whole["finished"]["policy"]),
    }
    assert base["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}


def test_best_of_n_starts_at_the_reference_and_rises_with_the_reward_that_chooses() -> None:
    reference = language_model(seed=2)
    points = best_of_n_points(reference, PROMPTS, REWARD, REWARD, SETTINGS, most=6)
    assert [one["n"] for one in points] == [1, 2, 4, 6]
    rewards = [one["reward"]["value"] for one in points]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0]
    same = SampleSettings(samples_per_prompt=6, max_new_tokens=4)
    assert points[0]["reward"] == pytest.approx(reference_point(reference, PROMPTS, REWARD, same)["reward"])
    assert points[0]["kl"]["value"] == 0 and points[1]["kl"]["value"] == pytest.approx(math.log(2) - 0.5)


def test_another_reward_may_choose_than_the_one_that_judges() -> None:
    """Chosen by the opposite, more samples lower the true reward by as much as its own best-of-n of the opposite would."""
    reference = language_model(seed=2)
    opposite = Reward("fewer", lambda prompts, responses: [-float(text.count("a")) for text in responses])
    judged = best_of_n_points(reference, PROMPTS, REWARD, opposite, SETTINGS, most=4)
    chosen = best_of_n_points(reference, PROMPTS, opposite, opposite, SETTINGS, most=4)
    for one, other in zip(judged, chosen, strict=True):
        assert one["reward"]["value"] == pytest.approx(-other["reward"]["value"])
    assert np.all(np.diff([one["reward"]["value"] for one in judged]) <= 0)
