"""A win rate is asked for in both orders, mirrors when the sides change, and its interval covers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import DataError
from prefopt.core.statistics import wilson
from prefopt.evaluate import intervals
from prefopt.evaluate.win_rate import (
    Judged,
    Match,
    comparison_rows,
    judge_matches,
    rate_interval,
    win_rate_lines,
    win_rate_section,
)
from prefopt.rollout.judges.verdict import Verdict, Winner
from prefopt.rollout.prompts import Given

WINNERS = st.sampled_from(["first", "second", "tie", None])


class FakeJudge:
    """Says of every comparison what `says(first, second)` gives; remembers how often it was asked."""

    def __init__(self, says: Callable[[str, str], Winner | None], *, sees_order: bool = True) -> None:
        self.name = "fake"
        self.says = says
        self.sees_order = sees_order
        self.asked = 0

    def compare(self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        self.asked += len(prompts)
        return [Verdict(self.says(one, other), said="because") for one, other in zip(first, second, strict=True)]


def longer(first: str, second: str) -> Winner:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def matches(count: int, *, prompts: int | None = None) -> list[Match]:
    random = np.random.default_rng(count)
    return [
        Match(f"prompt {at % (prompts or count)}", "a" * int(random.integers(1, 9)), "b" * int(random.integers(1, 9)))
        for at in range(count)
    ]


def judged(first: Winner | None, second: Winner | None, prompt: str = "p") -> Judged:
    return Judged(Match(prompt, "mine", "other"), Verdict(first), Verdict(second))


@pytest.mark.parametrize(
    ("policy_first", "opponent_first", "outcome", "first_shown"),
    [
        ("first", "second", 1, 0.5),
        ("second", "first", 0, 0.5),
        ("tie", "tie", 0.5, 0.5),
        ("first", "first", 0.5, 1),
        ("second", "second", 0.5, 0),
        ("first", "tie", 0.75, 0.75),
        ("first", None, 1, None),
        (None, "first", 0, None),
        (None, None, None, None),
    ],
)
def test_the_outcome_is_the_mean_of_both_orders(
    policy_first: Winner | None, opponent_first: Winner | None, outcome: float | None, first_shown: float | None
) -> None:
    one = judged(policy_first, opponent_first)
    assert (one.outcome, one.first_shown) == (outcome, first_shown)


def test_numbers_by_hand() -> None:
    said: list[tuple[Winner | None, Winner | None]] = [
        ("first", "second"), ("first", "second"), ("second", "first"), ("tie", "tie"), ("first", "first"), ("first", None), (None, None)
    ]  # fmt: skip
    section = win_rate_section([judged(*both, prompt=str(at)) for at, both in enumerate(said)])
    assert (section["comparisons"], section["wins"], section["losses"], section["ties"]) == (6, 3, 1, 2)
    assert section["unreadable"] == {"one_order": 1, "both_orders": 1}
    assert section["rate"]["value"] == (3 + 2 / 2) / 6
    position = section["position"]
    assert (position["both_orders"], position["inconsistent"], position["first_won_twice"]) == (5, 1, 1)
    assert position["first_shown"]["value"] == (4 * 0.5 + 1) / 5
    assert section["characters"]["policy"]["value"] == 4
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    assert any("3 won, 2 tied, 1 lost" in line for line in win_rate_lines(section))


def test_a_judge_of_places_decides_nothing_and_is_exposed() -> None:
    for place in ("first", "second"):
        judge = FakeJudge(lambda first, second, place=place: place)  # type: ignore[misc]
        section = win_rate_section(judge_matches(judge, matches(100)))
        assert (section["ties"], section["rate"]["value"]) == (100, 0.5)
        assert section["position"]["inconsistent"] == section["position"][f"{place}_won_twice"] == 100
        assert section["position"]["first_shown"]["value"] == (place == "first")
        low, high = (section["position"]["first_shown"][end] for end in ("low", "high"))
        assert high < 0.05 or low > 0.95


def test_a_taste_for_the_first_place_is_measured_and_does_not_move_the_rate() -> None:
    """A judge that knows the better one in 60 of 100 cases, and else takes the first: 20 more wins for it in either order."""
    random = np.random.default_rng(0)
    knows = {f"{at}": bool(random.random() < 0.6) for at in range(400)}
    better = {f"{at}": bool(random.random() < 0.7) for at in range(400)}
    rows = [Match(f"{at}", f"{at} mine", f"{at} other") for at in range(400)]

    def says(first: str, second: str) -> Winner:
        at = first.split()[0]
        if not knows[at]:
            return "first"
        return "first" if first.endswith("mine") == better[at] else "second"

    section = win_rate_section(judge_matches(FakeJudge(says), rows))
    truth = np.mean([better[at] if knows[at] else 0.5 for at in knows])
    assert section["rate"]["value"] == pytest.approx(truth)
    shown = section["position"]["first_shown"]
    assert shown["value"] == pytest.approx(0.5 + 0.5 * np.mean([not known for known in knows.values()]))
    assert shown["low"] > 0.5
    only_one_order = np.mean([better[at] if knows[at] else 1.0 for at in knows])
    assert only_one_order > section["rate"]["high"], "one order alone would have been wrong by more than the interval"


def test_a_judge_that_sees_no_order_is_asked_once() -> None:
    rows = matches(30)
    blind, seeing = FakeJudge(longer, sees_order=False), FakeJudge(longer)
    assert judge_matches(blind, rows) == judge_matches(seeing, rows)
    assert (blind.asked, seeing.asked) == (30, 60)
    section = win_rate_section(judge_matches(blind, rows), order_seen=False)
    assert section["position"] is None and any("sees no order" in line for line in win_rate_lines(section))
    assert win_rate_section(judge_matches(seeing, rows))["position"]["first_shown"]["value"] == 0.5


def test_identical_models_win_half_within_the_interval() -> None:
    """Responses of both sides come from one distribution, and the judge is noisy: each interval holds 1/2, 93 to 97 in 100."""
    random = np.random.default_rng(3)
    covered = 0
    for at in range(400):
        quality = random.normal(size=(100, 2)).round(1)
        rows = [Match(f"{prompt}", f"{mine}", f"{other}") for prompt, (mine, other) in enumerate(quality)]

        def says(first: str, second: str) -> Winner:
            margin = float(first) - float(second) + random.normal(0, 1)
            return "tie" if abs(margin) < 0.2 else "first" if margin > 0 else "second"

        rate = rate_interval(np.array([one.outcome for one in judge_matches(FakeJudge(says), rows)]), range(100), seed=at)
        covered += rate["low"] <= 0.5 <= rate["high"]
    assert 0.93 <= covered / 400 <= 0.97


@pytest.mark.parametrize(("prompts", "ties", "wins"), [(20, 0.3, 0.6), (50, 0.0, 0.7), (100, 0.3, 0.6), (100, 0.8, 0.5)])
def test_the_interval_covers_with_and_without_ties(prompts: int, ties: float, wins: float) -> None:
    random = np.random.default_rng(prompts)
    truth = ties / 2 + (1 - ties) * wins
    drawn = np.where(random.random((3000, prompts)) < ties, 0.5, random.random((3000, prompts)) < wins)
    found = [rate_interval(values, range(prompts)) for values in drawn]
    assert 0.93 <= np.mean([rate["low"] <= truth <= rate["high"] for rate in found]) <= 0.97


def test_the_clustered_interval_covers() -> None:
    random = np.random.default_rng(5)
    prompts, samples, rounds = 80, 3, 1000
    clusters = np.repeat(range(prompts), samples)
    covered = 0
    for at in range(rounds):
        chance = random.beta(2.0, 1.0, prompts)
        outcome = np.where(random.random((prompts, samples)) < 0.2, 0.5, random.random((prompts, samples)) < chance[:, None])
        rate = rate_interval(outcome.ravel(), clusters.tolist(), seed=at)
        covered += rate["low"] <= 0.2 * 0.5 + 0.8 * 2 / 3 <= rate["high"]
    assert 0.93 <= covered / rounds <= 0.97


def test_ties_narrow_wilson_and_nothing_else_does() -> None:
    for values in ([1.0, 0.0, 1.0], [0.0] * 4, [0.5] * 4):
        low, high = wilson(float(np.mean(values)), len(values))
        assert intervals.tied_wilson(values) == {"value": np.mean(values), "low": low, "high": high, "n": len(values)}
    tied = intervals.tied_wilson([1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    plain_low, plain_high = wilson(0.5, 6)
    assert plain_low < tied["low"] < 0.5 < tied["high"] < plain_high


@given(st.lists(st.tuples(WINNERS, WINNERS, st.integers(0, 5)), min_size=1, max_size=30))
def test_changing_sides_mirrors_everything(said: list[tuple[Winner | None, Winner | None, int]]) -> None:
    ours = [judged(first, second, prompt=str(prompt)) for first, second, prompt in said]
    swapped = [
        Judged(Match(one.match.prompt, one.match.opponent, one.match.policy), one.opponent_first, one.policy_first)
        for one in ours
    ]
    if all(first is None and second is None for first, second, _ in said):
        with pytest.raises(DataError, match=f"none of {len(said)} comparisons"):
            win_rate_section(ours)
        return
    mine, theirs = win_rate_section(ours), win_rate_section(swapped)
    assert (mine["wins"], mine["losses"], mine["ties"]) == (theirs["losses"], theirs["wins"], theirs["ties"])
    assert mine["rate"]["value"] == pytest.approx(1 - theirs["rate"]["value"])
    assert mine["position"] == theirs["position"]
    assert mine["unreadable"] == theirs["unreadable"]
    assert mine["wins"] + mine["losses"] + mine["ties"] + mine["unreadable"]["both_orders"] == len(said)


def test_copies_of_a_comparison_add_no_certainty() -> None:
    rows = judge_matches(FakeJudge(longer), matches(40))
    once, fivefold = win_rate_section(rows), win_rate_section([one for one in rows for _ in range(5)])
    assert fivefold["rate"]["n"] == once["rate"]["n"] == 40
    width = [section["rate"]["high"] - section["rate"]["low"] for section in (once, fivefold)]
    assert width[1] == pytest.approx(width[0], rel=0.2)
    assert fivefold["length_controlled"]["rate"] == pytest.approx(once["length_controlled"]["rate"])


def test_every_comparison_has_a_row_even_where_nothing_could_be_read() -> None:
    rows = comparison_rows([judged("first", None), judged(None, None)], "fake")
    assert [row["outcome"] for row in rows] == [1.0, None]
    assert rows[0] == {
        "prompt": "p",
        "policy": "mine",
        "opponent": "other",
        "outcome": 1.0,
        "policy_first": {"winner": "first", "said": "", "margin": None},
        "opponent_first": {"winner": None, "said": "", "margin": None},
        "judge": "fake",
    }


def test_a_judge_that_loses_comparisons_is_refused() -> None:
    judge = FakeJudge(longer)
    whole = judge.compare
    judge.compare = lambda *given: whole(*given)[:-1]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="gave 5 verdicts on 6 comparisons"):
        judge_matches(judge, matches(3))
