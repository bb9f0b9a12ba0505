"""Labels follow the scores; what gives no label is counted."""

import math
from collections import Counter

import pytest

from prefopt.core.errors import ConfigError, DataError
from prefopt.data.load import load_groups
from prefopt.rollout.label import label, score_samples
from prefopt.rollout.rewards import load_reward

ROWS = [{"prompt": "p", "responses": ["a", "b", "c", "d"]}, {"prompt": "q", "responses": ["x", "y"]}]
SCORES = [[1.0, 4.0, 2.0, 3.0], [0.0, -1.0]]


def test_best_worst_takes_the_ends() -> None:
    result = label(ROWS, SCORES)
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in result.rows] == [("b", "a", 3.0), ("x", "y", 1.0)]
    assert result.skipped == {}
    assert result.flipped == 0


def test_all_pairs_are_each_pair_once_in_the_order_of_scores() -> None:
    rows = label(ROWS, SCORES, how="all-pairs").rows
    assert len(rows) == 6 + 1
    assert len({frozenset((row["chosen"], row["rejected"])) for row in rows}) == 7
    assert all(row["margin"] == row["chosen_score"] - row["rejected_score"] > 0 for row in rows)


def test_bradley_terry_draws_the_sigmoid_of_the_scaled_difference() -> None:
    pairs, difference, scale = 4000, 0.7, 2.0
    rows = [{"prompt": str(at), "responses": ["low", "high"]} for at in range(pairs)]
    result = label(rows, [[0.0, difference]] * pairs, how="bradley-terry", scale=scale, seed=3)
    expected = 1 / (1 + math.exp(-scale * difference))
    share = sum(row["chosen"] == "high" for row in result.rows) / pairs
    assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / pairs)
    assert result.flipped == sum(row["chosen"] == "low" for row in result.rows) == round((1 - share) * pairs)
    assert not any("margin" in row for row in result.rows)


def test_bradley_terry_follows_its_seed_and_sharpens_to_all_pairs() -> None:
    first, again, other = (label(ROWS * 20, SCORES * 20, how="bradley-terry", seed=seed).rows for seed in (1, 1, 2))
    assert first == again != other
    sharp = label(ROWS, SCORES, how="bradley-terry", scale=1e6)
    plain = label(ROWS, SCORES, how="all-pairs").rows
    assert [row | {"margin": row["chosen_score"] - row["rejected_score"]} for row in sharp.rows] == plain


def test_what_gives_no_pair_is_counted_by_reason() -> None:
    rows = [
        {"prompt": "1", "responses": ["a", "", "b"]},
        {"prompt": "2", "responses": ["a", " "]},
        {"prompt": "3", "responses": ["same", "same "]},
        {"prompt": "4", "responses": ["a", "b"]},
        {"prompt": "5", "responses": ["a", "b"]},
    ]
    result = label(rows, [[2, 9, 0], [1, 0], [1, 0], [1, 1], [1, 0.5]], how="all-pairs", min_margin=1.0)
    assert [row["prompt"] for row in result.rows] == ["1"]
    assert result.skipped == Counter(
        {
            "empty response": 2,
            "fewer than two responses": 1,
            "identical responses": 1,
            "tie": 1,
            "margin below min_margin": 1,
        }
    )


def test_the_rows_are_read_back_as_pairs() -> None:
    messages = [{"role": "user", "content": "p"}]
    rows = label([ROWS[0], {"prompt": messages, "responses": ["short", "much longer"]}], [SCORES[0], [0, 1]]).rows
    groups = load_groups(rows)
    assert not groups.bad
    texts = [[turns[0].content for turns in group.responses] for group in groups.groups]
    assert texts == [["b", "a"], ["much longer", "short"]]
    assert [group.feedback.margin for group in groups.groups] == [3.0, 1.0]


def test_scores_keep_to_their_rows() -> None:
    responses = [["one", "one two", ""], [], ["a b c"]]
    rows = [{"prompt": "p", "responses": texts} for texts in responses]
    assert score_samples(rows, load_reward("length")) == [[1.0, 2.0, 0.0], [], [3.0]]


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="best-worst"):
        label(ROWS, SCORES, how="best-wurst")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scale"):
        label(ROWS, SCORES, scale=0)
    with pytest.raises(DataError, match="row 1"):
        label(ROWS, [SCORES[0], [1.0]])
    with pytest.raises(DataError, match="2 rows"):
        label(ROWS, SCORES[:1])


def test_a_response_that_was_cut_stays_cut() -> None:
    """Only the rows with a cut response say so, and they are read back as they were sampled."""
    rows = [{**ROWS[0], "finished": [True, False, True, True]}, {**ROWS[1], "finished": [True, True]}]
    result = label(rows, SCORES, how="all-pairs").rows
    cut = [row for row in result if "b" in (row["chosen"], row["rejected"])]
    assert [(row["chosen_finished"], row["rejected_finished"]) for row in cut] == [(False, True)] * 3
    assert all("chosen_finished" not in row and "rejected_finished" not in row for row in result if row not in cut)
    read = load_groups(result).groups
    assert [group.finished for group in read] == [(False, True) if row in cut else () for row in result]
    flipped = label(rows[:1], [[9.0, 4.0, 2.0, 3.0]]).rows[0]
    assert "chosen_finished" not in flipped
    assert label(rows[:1], [[9.0, 0.0, 2.0, 3.0]]).rows[0]["rejected_finished"] is False
    for wrong in ([True], "yes", [1, 1, 1, 1]):
        with pytest.raises(DataError, match="row 0: 4 responses, and finished is"):
            label([{**ROWS[0], "finished": wrong}], SCORES[:1])


def test_scores_keep_every_different_response_of_a_prompt_in_one_row() -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b", "a", " ", "c"], "finished": [True, True, True, True, False]},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["x", "y"]},
        {"prompt": "r", "responses": ["x", "y"]},
    ]
    result = label(rows, [[1.0, 3.0, 1.0, 9.0, 2.0], [0.5, 0.25], [1.0, 1.0]], how="scores")
    assert result.rows == [
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1.0, 3.0, 2.0], "finished": [True, True, False]},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "responses": [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]],
            "scores": [0.5, 0.25],
        },
    ]
    assert result.skipped == {"identical responses": 1, "empty response": 1, "tie": 1}
    groups = load_groups(result.rows)
    assert [group.feedback.scores for group in groups.groups] == [(1.0, 3.0, 2.0), (0.5, 0.25)]
    assert groups.groups[0].finished == (True, True, False)
