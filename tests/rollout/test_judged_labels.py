"""A pair becomes a row where both orders name the same response; all else is counted."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import ConfigError, DataError
from prefopt.data.load import load_groups
from prefopt.rollout.judges.asked import PairwiseJudge
from prefopt.rollout.judges.chat import Answer, Conversation, Usage
from prefopt.rollout.judges.labelling import label_with_judge
from prefopt.rollout.judges.load import load_judge
from prefopt.rollout.judges.templates import load_template
from prefopt.rollout.judges.verdict import Verdict, winner_of
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given

ROWS = [{"prompt": "p", "responses": ["a", "bb", "ccc"]}, {"prompt": "q", "responses": ["xx", "y"]}]
PRINCIPLES = (Principle("short", "c", "r", "Which is shorter?"), Principle("long", "c", "r", "Which is longer?"))


class Scripted:
    """A judge that says what a function of both responses says, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, say: Any) -> None:
        self.say = say
        self.asked: list[tuple[Given, str, str]] = []

    def compare(self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        self.asked += list(zip(prompts, first, second, strict=True))
        return [self.say(one, other) for one, other in zip(first, second, strict=True)]


class ByPrinciple:
    """Answers questions by the principle in them."""

    name = "local:by-principle"

    def __init__(self) -> None:
        self.usage = Usage()
        self.questions: list[str] = []

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        self.questions += [turns[-1]["content"] for turns in conversations]
        return [Answer(f"Verdict: {self._letter(turns[-1]['content'])}") for turns in conversations]

    def _letter(self, question: str) -> str:
        lengths = [len(re.search(rf"<response_{of}>\n(.*)\n</", question)[1]) for of in "ab"]  # type: ignore[index]
        return "A" if (lengths[0] > lengths[1]) == ("longer" in question) else "B"


def longer(first: str, second: str) -> Verdict:
    return Verdict(winner_of(len(first) - len(second), 0))


def test_every_pair_is_asked_in_both_orders_and_the_agreed_one_is_chosen() -> None:
    judge = Scripted(longer)
    result = label_with_judge(ROWS, judge)
    assert sorted((row["chosen"], row["rejected"]) for row in result.rows) == [
        ("bb", "a"),
        ("ccc", "a"),
        ("ccc", "bb"),
        ("xx", "y"),
    ]
    assert all(row["judge"] == "scripted" for row in result.rows)
    assert len(judge.asked) == 8 == len(set(judge.asked))
    assert {(prompt, other, one) for prompt, one, other in judge.asked} == set(judge.asked)
    assert (result.pairs, result.skipped, result.first_won, result.decided) == (4, {}, 4, 8)


def test_a_taste_for_the_first_place_gives_no_row_and_is_shown() -> None:
    result = label_with_judge(ROWS, Scripted(lambda first, second: Verdict("first")))
    assert (result.rows, result.skipped) == ([], {"orders disagree": 4})
    assert (result.first_won, result.decided) == (8, 8)


answers = st.sampled_from(["first", "second", "tie", None])


@given(said=st.lists(st.tuples(answers, answers), min_size=1, max_size=12))
def test_every_pair_is_a_row_or_counted_by_what_both_orders_said(said: list[tuple[Any, Any]]) -> None:
    rows = [{"prompt": str(number), "responses": [f"{number} one", f"{number} other"]} for number in range(len(said))]

    def say(first: str, second: str) -> Verdict:
        number = int(first.split()[0])
        return Verdict(said[number][0 if first.endswith("one") else 1])

    result = label_with_judge(rows, Scripted(say))
    agreed = [number for number, pair in enumerate(said) if pair in (("first", "second"), ("second", "first"))]
    assert [int(row["prompt"]) for row in result.rows] == agreed
    for row in result.rows:
        winner = "one" if said[int(row["prompt"])][0] == "first" else "other"
        assert row["chosen"].endswith(winner)
    unreadable = sum(None in pair for pair in said)
    ties = sum(pair == ("tie", "tie") for pair in said)
    wanted = {"unreadable answer": unreadable, "tie": ties, "orders disagree": len(said) - len(agreed) - unreadable - ties}
    assert result.skipped == {reason: count for reason, count in wanted.items() if count}
    assert len(result.rows) + sum(result.skipped.values()) == result.pairs == len(said)


def test_what_is_not_judged_is_counted() -> None:
    judge = Scripted(longer)
    rows = [
        {"prompt": "1", "responses": ["a", "", "bb"]},
        {"prompt": "2", "responses": ["a", " "]},
        {"prompt": "3", "responses": ["same", "same ", "more than same"]},
    ]
    result = label_with_judge(rows, judge)
    assert result.skipped == {"empty response": 2, "fewer than two responses": 1, "identical responses": 1}
    assert result.pairs == len(result.rows) == 3
    with pytest.raises(DataError, match="finished"):
        label_with_judge([{**rows[0], "finished": [True]}], judge)
    with pytest.raises(ConfigError, match="pairs_per_prompt"):
        label_with_judge(rows, judge, pairs_per_prompt=0)


def test_pairs_are_drawn_by_the_seed_for_each_prompt() -> None:
    rows = [{"prompt": str(number), "responses": ["a" * (1 + at) for at in range(6)]} for number in range(20)]
    drawn = [label_with_judge(rows, Scripted(longer), pairs_per_prompt=3, seed=seed).rows for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Counter(row["prompt"] for row in drawn[0]) == {str(number): 3 for number in range(20)}
    alone = label_with_judge(rows[:1], Scripted(longer), pairs_per_prompt=3, seed=1).rows
    assert alone == drawn[0][:3]


def test_a_reward_judge_gives_margins_and_is_asked_once() -> None:
    result = label_with_judge(ROWS[:1] + [{"prompt": "q", "responses": ["one two", "one"]}], load_judge("reward:length"))
    assert [row["margin"] for row in result.rows] == [1.0]
    assert result.skipped == {"tie": 3}
    assert (result.first_won, result.decided) == (0, 0)


def test_log_probs_of_both_orders_give_a_probability() -> None:
    judge = Scripted(lambda first, second: Verdict(winner_of(margin := {"bb": 3.0, "a": -1.0}[first], 0), margin=margin))
    judge.has_probability = True  # type: ignore[attr-defined]
    row = label_with_judge([{"prompt": "p", "responses": ["a", "bb"]}], judge).rows[0]
    assert (row["chosen"], row["margin"]) == ("bb", 2.0)
    assert row["probability"] == pytest.approx(1 / (1 + math.exp(-2)))
    group = load_groups([row]).groups[0]
    assert (group.feedback.margin, group.feedback.probability) == (2.0, row["probability"])


@given(quality=st.lists(st.floats(-3, 3), min_size=2, max_size=5, unique=True), place=st.floats(-50, 50))
def test_the_mean_of_both_orders_cancels_a_taste_for_a_place(quality: list[float], place: float) -> None:
    """A judge whose margin is the difference in quality and a constant for the first place, however large."""
    said = {f"response {number}": value for number, value in enumerate(quality)}

    def say(first: str, second: str) -> Verdict:
        margin = said[first] - said[second] + place
        return Verdict(winner_of(margin, 0), margin=margin)

    judge = Scripted(say)
    judge.has_probability = True  # type: ignore[attr-defined]
    rows = [{"prompt": "p", "responses": list(said)}]
    result = label_with_judge(rows, judge, orders="mean")
    for row in result.rows:
        difference = said[row["chosen"]] - said[row["rejected"]]
        assert row["margin"] == pytest.approx(difference, abs=1e-9)
        assert row["margin"] > 0
    assert len(result.rows) + result.skipped.get("tie", 0) == math.comb(len(said), 2)
    agreed = label_with_judge(rows, judge).rows
    assert {(row["chosen"], row["rejected"]) for row in agreed} <= {(row["chosen"], row["rejected"]) for row in result.rows}


def test_the_mean_needs_log_probs() -> None:
    with pytest.raises(ConfigError, match='"mean" does not go with the judge scripted'):
        label_with_judge(ROWS, Scripted(longer), orders="mean")


def test_each_row_says_by_which_principle_and_both_orders_go_by_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "responses": ["aa", "b" * (3 + number)]} for number in range(40)]
    model = ByPrinciple()
    result = label_with_judge(rows, PairwiseJudge(model, load_template()), principles=PRINCIPLES, seed=5)
    assert len(result.rows) == 40
    assert result.skipped == {}
    for row in result.rows:
        assert (row["chosen"] == "aa") == (row["principle"] == "short")
        assert row["judge"] == "local:by-principle"
    assert result.by_principle == Counter(row["principle"] for row in result.rows)
    assert 8 < result.by_principle["short"] < 32
    assert len(model.questions) == 80
    again = label_with_judge(rows, PairwiseJudge(ByPrinciple(), load_template()), principles=PRINCIPLES, seed=5)
    assert again.rows == result.rows
    assert not load_groups(result.rows).bad


def test_a_judge_that_cannot_go_by_a_principle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot go by a principle"):
        label_with_judge(ROWS, load_judge("reward:length"), principles=PRINCIPLES)
    own = tmp_path / "own.jinja"
    own.write_text("{{ prompt }} {{ first }} {{ second }} Verdict: A", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"does not use \{\{ principle \}\}"):
        label_with_judge(ROWS, PairwiseJudge(ByPrinciple(), load_template(own)), principles=PRINCIPLES)


def test_a_cut_response_and_a_message_prompt_stay_what_they_are() -> None:
    prompt = [{"role": "user", "content": "p"}]
    row = label_with_judge([{"prompt": prompt, "responses": ["a", "bb"], "finished": [True, False]}], Scripted(longer)).rows[0]
    assert (row["chosen"], row["rejected"]) == (
        [{"role": "assistant", "content": "bb"}],
        [{"role": "assistant", "content": "a"}],
    )
    assert (row["chosen_finished"], row["rejected_finished"]) == (False, True)
    assert load_groups([row]).groups[0].finished == (False, True)
