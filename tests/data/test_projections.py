"""The best response of a group, for every kind of feedback."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import BadRow, Feedback
from prefopt.data.projections import best_first, demonstrations, has_tied_scores


@pytest.mark.parametrize(
    ("feedback", "responses", "order"),
    [
        (Feedback("pair"), 2, (0, 1)),
        (Feedback("pair", tie=True), 2, (0, 1)),
        (Feedback("ranking", ranking=(3, 1, 4, 2)), 4, (1, 3, 0, 2)),
        (Feedback("scores", scores=(0.5, -1.0, 2.0)), 3, (2, 0, 1)),
        (Feedback("scores", scores=(1.0, 2.0, 1.0, 2.0)), 4, (1, 3, 0, 2)),
        (Feedback("scores", scores=(0.0, 0.0)), 2, (0, 1)),
        (Feedback("label", label=False), 1, (0,)),
        (Feedback("demonstration"), 1, (0,)),
    ],
)
def test_responses_from_best_to_worst(feedback: Feedback, responses: int, order: tuple[int, ...]) -> None:
    assert best_first(feedback, responses) == order


def test_scores_are_tied_where_two_are_equal() -> None:
    assert has_tied_scores(Feedback("scores", scores=(1.0, 2.0, 1.0)))
    assert not has_tied_scores(Feedback("scores", scores=(1.0, 2.0, 1.5)))
    assert not any(has_tied_scores(Feedback(kind)) for kind in ("pair", "label", "demonstration"))
    assert not has_tied_scores(Feedback("ranking", ranking=(2, 1)))


def group(feedback: Feedback, responses: int, source: str = "rows:1") -> TokenGroup:
    """Response k has k + 1 tokens k, of which the last is scored; the odd ones are finished."""
    ids = tuple(np.full(place + 1, place, dtype=np.int32) for place in range(responses))
    scored = tuple(np.arange(len(each)) == len(each) - 1 for each in ids)
    finished = tuple(place % 2 == 1 for place in range(responses))
    return TokenGroup(np.arange(3, dtype=np.int32), ids, scored, feedback, source, finished)


@pytest.mark.parametrize(
    ("feedback", "responses", "best"),
    [
        (Feedback("pair", margin=2.0, weight=0.5), 2, 0),
        (Feedback("ranking", ranking=(2, 3, 1), weight=3.0), 3, 2),
        (Feedback("scores", scores=(1.0, 5.0, 5.0)), 3, 1),
        (Feedback("label", label=True, weight=0.0), 1, 0),
        (Feedback("demonstration", weight=2.0), 1, 0),
    ],
)
def test_the_best_response_is_demonstrated_with_the_weight_of_its_row(feedback: Feedback, responses: int, best: int) -> None:
    before = group(feedback, responses)
    (made,) = demonstrations(TokenSet((before,))).groups
    assert made.feedback == Feedback("demonstration", weight=feedback.weight)
    assert made.prompt_ids is before.prompt_ids and made.source == before.source
    assert made.response_ids == (before.response_ids[best],) and made.scored == (before.scored[best],)
    assert made.finished == (best % 2 == 1,)


def test_what_names_no_good_response_is_refused_by_name_and_the_rest_is_kept() -> None:
    before = TokenSet(
        (
            group(Feedback("label", label=False), 1, "rows:1"),
            group(Feedback("label", label=True), 1, "rows:2"),
            group(Feedback("pair", tie=True), 2, "rows:3"),
        ),
        bad=(BadRow("rows:0", "empty prompt", "prompt", "", "text"),),
        special_text=("rows:2",),
        truncated=("rows:2",),
    )
    made = demonstrations(before)
    assert [each.source for each in made.groups] == ["rows:2"]
    assert [(row.source, row.reason, row.field) for row in made.bad] == [
        ("rows:0", "empty prompt", "prompt"),
        ("rows:1", "undesirable row has nothing to imitate", "label"),
        ("rows:3", "tied pair has no better response to imitate", "tie"),
    ]
    assert (made.special_text, made.truncated) == (("rows:2",), ("rows:2",))


def test_demonstrations_of_demonstrations_are_the_same() -> None:
    once = demonstrations(TokenSet((group(Feedback("pair", weight=2.0), 2),)))
    twice = demonstrations(once)
    assert twice.groups[0].feedback == once.groups[0].feedback
    assert twice.groups[0].response_ids == once.groups[0].response_ids
