"""Held-out numbers, implicit rewards and diversity against their closed forms."""

import math

import numpy as np
import pytest

from prefopt.evaluate.diversity import distinct_n
from prefopt.evaluate.heldout import heldout, response_sums
from prefopt.evaluate.implicit import implicit_reward, implicit_rewards

RANDOM = np.random.default_rng(5)
POLICY, REFERENCE = RANDOM.normal(-40, 5, (2, 30, 2))


def test_a_policy_that_is_its_reference_knows_nothing() -> None:
    found = heldout(REFERENCE, REFERENCE)
    assert found["accuracy"]["value"] == 0.5
    assert found["margin"]["value"] == 0.0
    assert math.isclose(found["loss"], math.log(2))


def test_margin_accuracy_and_loss_are_their_formulas() -> None:
    found = heldout(POLICY, REFERENCE, beta=0.3)
    m = (POLICY - REFERENCE)[:, 0] - (POLICY - REFERENCE)[:, 1]
    assert math.isclose(found["margin"]["value"], m.mean())
    assert found["accuracy"]["value"] == (m > 0).mean()
    assert math.isclose(found["loss"], np.log(1 + np.exp(-0.3 * m)).mean())
    assert found["reference_accuracy"]["value"] == (REFERENCE[:, 0] > REFERENCE[:, 1]).mean()
    assert found["pairs"] == 30


def test_swapping_chosen_and_rejected_mirrors_everything() -> None:
    found, swapped = heldout(POLICY, REFERENCE), heldout(POLICY[:, ::-1], REFERENCE[:, ::-1])
    assert math.isclose(found["accuracy"]["value"], 1 - swapped["accuracy"]["value"])
    assert math.isclose(found["margin"]["value"], -swapped["margin"]["value"])
    # softplus(-x) - softplus(x) = -x
    assert math.isclose(found["loss"] - swapped["loss"], -0.1 * found["margin"]["value"])


def test_what_the_prompt_adds_to_both_responses_cancels() -> None:
    shift = RANDOM.normal(size=(30, 1))
    assert math.isclose(heldout(POLICY + shift, REFERENCE)["loss"], heldout(POLICY, REFERENCE)["loss"])


def test_the_loss_of_a_huge_margin_is_finite() -> None:
    far = np.array([[-1e6, 0.0]])
    assert math.isclose(heldout(far, np.zeros((1, 2)))["loss"], 1e5)


def test_shapes_are_checked() -> None:
    for policy, reference in ((POLICY, REFERENCE[:5]), (POLICY[:, :1], REFERENCE[:, :1]), (POLICY[:0], REFERENCE[:0])):
        with pytest.raises(ValueError):
            heldout(policy, reference)


def test_token_rewards_sum_to_the_total_and_scale_with_beta() -> None:
    policy, reference = RANDOM.normal(size=(2, 12)).astype(np.float32)
    found = implicit_reward(policy, reference, 0.2)
    assert math.isclose(found.total, found.tokens.sum())
    assert math.isclose(found.total, 0.2 * (policy.astype(float).sum() - reference.astype(float).sum()))
    assert math.isclose(implicit_reward(policy, reference, 0.4).total, 2 * found.total)
    assert math.isclose(implicit_reward(reference, policy, 0.2).total, -found.total)
    assert implicit_reward(policy, policy).total == 0


def test_implicit_reward_differences_are_beta_times_the_margin() -> None:
    scores = [[tuple(RANDOM.normal(size=size) for size in (4, 7)) for _ in range(3)] for _ in range(2)]
    rewards = implicit_rewards(scores[0], scores[1], 0.1)
    differences = [chosen.total - rejected.total for chosen, rejected in rewards]
    margin = heldout(response_sums(scores[0]), response_sums(scores[1]))["margin"]["value"]
    assert math.isclose(np.mean(differences), 0.1 * margin)
    with pytest.raises(ValueError):
        implicit_reward(np.zeros(3), np.zeros(4))


def test_distinct_n_counts_by_hand() -> None:
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["A b", "a B"], 2) == 1 / 2  # no case, and none across texts
    assert distinct_n(["a"], 2) == distinct_n([], 1) == 0.0


def test_repeating_texts_divides_distinct_n_and_leaves_its_order() -> None:
    texts = ["the cat sat on the mat.", "a dog ran off"]
    assert math.isclose(distinct_n(texts * 3, 2), distinct_n(texts, 2) / 3)
    assert distinct_n(texts[::-1], 2) == distinct_n(texts, 2)
