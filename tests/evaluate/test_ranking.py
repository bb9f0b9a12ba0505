"""Ranking accuracy is the share of preferred pairs that scores order rightly, and counts no group twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.evaluate.intervals import wilson
from prefopt.evaluate.ranking import preferred_pairs, ranking_accuracy

NUMBERS = st.lists(st.integers(-3, 3), min_size=2, max_size=5)


def group(feedback: Feedback, responses: int) -> TokenGroup:
    ids = np.ones(2, np.int32)
    return TokenGroup(ids, (ids,) * responses, (np.ones(2, bool),) * responses, feedback, source="rows.jsonl:1")


def pairs(*scores: tuple[float, float]) -> tuple[list[np.ndarray], list[TokenGroup]]:
    return [np.array(pair) for pair in scores], [group(Feedback("pair"), 2)] * len(scores)


def test_for_pairs_it_is_plain_accuracy_with_ties_half() -> None:
    found = ranking_accuracy(*pairs((2, 1), (1, 2), (0.5, 0.5), (3, -3)))
    assert found == wilson(2.5, 4)
    assert found is not None and found["value"] == 0.625


def test_a_ranking_counts_once_with_its_share_of_pairs() -> None:
    ranked = group(Feedback("ranking", ranking=(2, 3, 1)), 3)
    assert preferred_pairs(ranked.feedback) == [(0, 1), (2, 0), (2, 1)]
    scores = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0, 6.0])]
    assert ranking_accuracy(scores, [ranked, ranked]) == wilson(2 / 3 + 1, 2)


def test_equal_scores_of_feedback_prefer_nothing() -> None:
    scored = group(Feedback("scores", scores=(1.0, 1.0, 2.0)), 3)
    assert preferred_pairs(scored.feedback) == [(2, 0), (2, 1)]
    assert ranking_accuracy([np.array([0.0, 9.0, 1.0])], [scored]) == wilson(0.5, 1)
    silent = [
        group(Feedback("pair", tie=True), 2),
        group(Feedback("label", label=True), 1),
        group(Feedback("demonstration"), 1),
    ]
    assert ranking_accuracy([np.zeros(2), np.zeros(1), np.zeros(1)], silent) is None
    assert ranking_accuracy([], []) is None


@given(NUMBERS, st.data())
def test_it_is_one_for_the_feedback_itself_and_turns_round_with_the_scores(values: list[int], data: st.DataObject) -> None:
    responses = len(values)
    feedback = group(Feedback("scores", scores=tuple(map(float, values))), responses)
    own = ranking_accuracy([np.array(values)], [feedback])
    if own is None:
        assert len(set(values)) == 1
        return
    assert own["value"] == 1
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=responses, max_size=responses)))
    forwards, backwards = (ranking_accuracy([each], [feedback]) for each in (scores, -scores))
    assert forwards is not None and backwards is not None
    assert forwards["value"] + backwards["value"] == pytest.approx(1)


def test_scores_that_do_not_fit_their_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: 3 scores for 2 responses"):
        ranking_accuracy([np.zeros(3)], [group(Feedback("pair"), 2)])
    with pytest.raises(ValueError):
        ranking_accuracy([np.zeros(2)], [])
