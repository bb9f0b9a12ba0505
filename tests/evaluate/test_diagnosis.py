"""Laws of the diagnosis: planted causes are found, with the size that they were planted with."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.data.groups import Feedback
from prefopt.data.tokens import TokenGroup
from prefopt.evaluate.diagnosis import diagnosis, kl_per_reward

RANDOM = np.random.default_rng(0)


def pair(chosen: list[int], rejected: list[int], source: str = "") -> TokenGroup:
    responses = tuple(np.array(ids, dtype=np.int32) for ids in (chosen, rejected))
    return TokenGroup(np.array([1]), responses, tuple(np.ones(len(ids), bool) for ids in responses), Feedback("pair"), source)


def diagnosed(pairs: list[TokenGroup], changes: list[list[np.ndarray]], beta: float = 1.0) -> dict:
    reference = [[RANDOM.normal(-2, 0.5, len(part)) for part in change] for change in changes]
    policy = [[base + part for base, part in zip(*both, strict=True)] for both in zip(reference, changes, strict=True)]
    return diagnosis(pairs, policy, reference, beta=beta, decode=lambda token: f"<{token}>")


def test_the_token_that_was_pushed_down_is_named_with_how_far() -> None:
    pairs = [pair([2, 3, 4], [5, 6]) for _ in range(10)]
    found = diagnosed(pairs, [[np.array([0.0, -1.5, 0.25]), np.array([-1.0, -1.0])] for _ in pairs])["displacement"]
    assert found["tokens_that_fell"] == [{"token": "<3>", "change": pytest.approx(-1.5), "count": 10}]
    assert found["tokens_that_rose"] == [{"token": "<4>", "change": pytest.approx(0.25), "count": 10}]
    assert found["chosen"]["value"] == pytest.approx(-1.25) and found["rejected"]["value"] == pytest.approx(-2.0)
    assert found["chosen_fell"]["value"] == 1.0


def test_a_margin_that_is_length_alone_is_explained_by_length() -> None:
    lengths = [(int(a), int(b)) for a, b in RANDOM.integers(1, 30, size=(60, 2))]
    pairs = [pair(list(range(a)), list(range(b))) for a, b in lengths]
    found = diagnosed(pairs, [[np.full(a, 0.1), np.full(b, 0.1)] for a, b in lengths])["length"]
    assert found["explained"] == pytest.approx(1.0) and found["nats_per_token"] == pytest.approx(0.1)
    assert found["margin_at_equal_length"] == pytest.approx(0.0, abs=1e-9)


def test_a_margin_that_has_nothing_to_do_with_length_is_not() -> None:
    lengths = [(int(a), int(b)) for a, b in RANDOM.integers(5, 30, size=(200, 2))]
    pairs = [pair(list(range(a)), list(range(b))) for a, b in lengths]
    changes = [[np.full(a, (2 + RANDOM.normal()) / a), np.zeros(b)] for a, b in lengths]
    found = diagnosed(pairs, changes)["length"]
    assert found["explained"] < 0.05 and found["margin_at_equal_length"] == pytest.approx(2, abs=0.3)


def test_equal_lengths_explain_nothing() -> None:
    pairs = [pair([1, 2], [3, 4]) for _ in range(5)]
    assert diagnosed(pairs, [[np.ones(2), np.zeros(2)] for _ in pairs])["length"]["explained"] is None


def test_pairs_that_the_policy_denies_most_come_first() -> None:
    pairs = [pair([1], [2], source=f"rows:{number}") for number in range(6)]
    margins = [0.5, -3.0, 0.1, -0.2, -7.0, 2.0]
    found = diagnosed(pairs, [[np.array([margin]), np.array([0.0])] for margin in margins], beta=0.5)
    assert [row["source"] for row in found["contradicted"]] == ["rows:4", "rows:1", "rows:3"]
    assert found["contradicted"][0]["probability_of_label"] == pytest.approx(1 / (1 + np.exp(3.5)))
    assert found["satisfied"]["by_policy"]["value"] == pytest.approx(0.5)


def test_gradient_weights_are_a_half_where_nothing_moved() -> None:
    pairs = [pair([1, 2], [3]) for _ in range(7)]
    found = diagnosed(pairs, [[np.zeros(2), np.zeros(1)] for _ in pairs])["satisfied"]["gradient_weight"]
    assert found["mean"] == 0.5 and set(found["quantiles"].values()) == {0.5} and sum(found["histogram"]["counts"]) == 7


def test_nats_for_each_unit_of_reward() -> None:
    assert kl_per_reward(6.0, 0.3) == pytest.approx(20) and kl_per_reward(6.0, 0.0) is None
