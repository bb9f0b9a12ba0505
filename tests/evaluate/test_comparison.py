"""Comparisons are antisymmetric, paired by prompt, and know nothing where there is nothing to know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefopt.core.errors import DataError
from prefopt.evaluate.comparison import compare, prompt_clusters, win_rate
from prefopt.evaluate.intervals import wilson
from prefopt.rollout.rewards import load_reward
from prefopt.rollout.sample import SampleRow

LENGTH = load_reward("length")


def row(prompt: str, response: str, *, finished: bool = True) -> SampleRow:
    ids = np.arange(len(response.split()) + finished, dtype=np.int32)
    return SampleRow(prompt, np.zeros(1, np.int32), response, ids, finished)


POLICY = [row("p", "one two three"), row("q", "one", finished=False), row("r", "one two"), row("s", "a b c d")]
REFERENCE = [row("p", "one"), row("q", "one two"), row("r", "uno due"), row("s", "a", finished=False)]


def test_identical_samples_are_all_ties() -> None:
    sections = compare(POLICY, POLICY, LENGTH).sections
    assert sections["win_rate"] == {"wins": 0, "losses": 0, "ties": 4, "rate": wilson(2, 4)}
    assert sections["reward"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 4}


def test_numbers_by_hand() -> None:
    compared = compare(POLICY, REFERENCE, LENGTH, kl=[0.5, 0.25, 0.0, -1.0])
    found = compared.sections
    assert found["win_rate"] == {"wins": 2, "losses": 1, "ties": 1, "rate": wilson(2.5, 4)}
    assert found["reward"]["name"] == "length"
    assert found["reward"]["difference"]["value"] == (2 - 1 + 0 + 3) / 4
    assert found["finished"] == {"policy": 0.75, "reference": 0.75}
    assert found["length"]["policy"]["value"] == (4 + 1 + 3 + 5) / 4
    assert found["diversity"]["reference"] == {"distinct_1": 5 / 6, "distinct_2": 2 / 2}
    assert compared.rows[1] == {
        "prompt": "q",
        "policy": "one",
        "reference": "one two",
        "policy_reward": 1.0,
        "reference_reward": 2.0,
        "kl": 0.25,
    }


def test_swapping_the_models_mirrors_the_result() -> None:
    found, swapped = (compare(*models, LENGTH).sections for models in ((POLICY, REFERENCE), (REFERENCE, POLICY)))
    assert found["win_rate"]["wins"] == swapped["win_rate"]["losses"]
    assert math.isclose(found["win_rate"]["rate"]["value"], 1 - swapped["win_rate"]["rate"]["value"])
    assert math.isclose(found["reward"]["difference"]["value"], -swapped["reward"]["difference"]["value"])
    assert found["length"]["policy"] == swapped["length"]["reference"]


def test_a_tie_is_a_difference_within_the_tolerance() -> None:
    counts = [
        compare(POLICY, REFERENCE, LENGTH, tolerance=tolerance).sections["win_rate"]["ties"] for tolerance in (0, 1, 2, 3)
    ]
    assert counts == [1, 2, 3, 4]


def test_without_a_reward_there_is_no_reward_and_no_winner() -> None:
    compared = compare(POLICY, REFERENCE)
    assert set(compared.sections) == {"length", "finished", "diversity"}
    assert all(line["policy_reward"] is line["reference_reward"] is line["kl"] is None for line in compared.rows)


def test_copies_of_a_sample_add_no_certainty() -> None:
    once = compare(POLICY, REFERENCE, LENGTH).sections
    copies = [[one for one in rows for _ in range(5)] for rows in (POLICY, REFERENCE)]
    fivefold = compare(*copies, LENGTH).sections
    assert fivefold["reward"] == once["reward"]
    assert fivefold["length"] == once["length"]
    assert fivefold["win_rate"]["wins"] == 5 * once["win_rate"]["wins"]
    assert fivefold["win_rate"]["rate"]["n"] == 4
    assert fivefold["win_rate"]["rate"]["value"] == once["win_rate"]["rate"]["value"]


def test_winning_everything_is_not_certainty() -> None:
    for samples in (1, 3):
        clusters = [at // samples for at in range(20 * samples)]
        rate = win_rate(np.ones(20 * samples), clusters)["rate"]
        assert rate["value"] == 1.0
        assert rate["low"] < 0.9


def test_the_clustered_win_rate_covers() -> None:
    random = np.random.default_rng(4)
    prompts, samples, rounds = 80, 3, 300
    clusters = [at // samples for at in range(prompts * samples)]
    covered = 0
    for at in range(rounds):
        chance = random.beta(2.0, 1.0, prompts)  # mean 2/3: some prompts are easier to win
        difference = np.where(random.random((prompts, samples)) < chance[:, None], 1.0, -1.0).ravel()
        rate = win_rate(difference, clusters, seed=at)["rate"]
        covered += rate["low"] <= 2 / 3 <= rate["high"]
    assert 0.92 <= covered / rounds <= 0.98


def test_the_same_prompt_is_one_cluster() -> None:
    assert prompt_clusters([row("p", "x"), row("q", "x"), row("p", "y")]) == [0, 1, 0]


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(DataError, match="sample 0"):
        compare(POLICY, REFERENCE[::-1])
    with pytest.raises(DataError, match="4 samples of the policy and 3"):
        compare(POLICY, REFERENCE[:3])
    with pytest.raises(DataError):
        compare([], [])
