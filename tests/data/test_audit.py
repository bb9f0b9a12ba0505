"""Laws of the audit: counts by hand on small sets, closed forms of the length bias, one screen of text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.audit import audit, audit_lines, length_bias, wilson
from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import BadRow, GroupSet
from prefopt.data.load import load_groups

SHARED = Path(os.environ.get("PREFOPT_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


def word_tokens(groups: GroupSet) -> TokenSet:
    """One token a word: enough of an encoding to count lengths."""
    encoded = []
    for group in groups.groups:
        texts = [" ".join(turn.content for turn in turns) for turns in (group.prompt, *group.responses)]
        prompt, *responses = (np.arange(len(text.split()), dtype=np.int32) for text in texts)
        scored = tuple(np.ones(len(ids), dtype=np.bool_) for ids in responses)
        finished = group.finished or (True,) * len(responses)
        encoded.append(TokenGroup(prompt, tuple(responses), scored, group.feedback, group.source, finished))
    return TokenSet(tuple(encoded))


def audit_rows(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    groups = load_groups(rows)
    return audit(groups, word_tokens(groups), **{"budget": (100, 100), "on_overlong": "drop", **more})


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_repeats_and_contradictions_are_counted_apart() -> None:
    rows = [pair("p", "a", "b"), pair("p", "b", "a"), pair("p", "a", "b"), pair("q", "a", "b"), pair("p", "a", "c")]
    found = audit_rows(rows)
    assert found["duplicates"] == {"count": 1, "examples": ["list:3 repeats list:1"]}
    assert found["contradictions"] == {"count": 1, "examples": ["list:2 contradicts list:1"]}


def test_labels_and_rankings_can_contradict_too() -> None:
    labels = [{"prompt": "p", "completion": "a", "label": label} for label in (True, True, False)]
    found = audit_rows(labels)
    assert (found["duplicates"]["count"], found["contradictions"]["count"]) == (1, 1)
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 2, 3]}
    same = {"prompt": "p", "responses": ["c", "b", "a"], "ranking": [3, 2, 1]}
    swapped = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 3]}
    found = audit_rows([row, same, swapped])
    assert (found["duplicates"]["count"], found["contradictions"]["count"]) == (1, 1)
    ties = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}
    assert audit_rows([ties, {**ties, "scores": [1, 2]}])["contradictions"]["count"] == 0


def test_ties_are_no_contradiction_and_tell_nothing_about_length() -> None:
    tie = {**pair("p", "a a a", "b"), "tie": True}
    swapped = {**pair("p", "b", "a a a"), "tie": True}
    found = audit_rows([pair("p", "b", "a a a"), tie, swapped, pair("q", "a a", "b")])
    assert found["contradictions"]["count"] == 0
    assert found["duplicates"] == {"count": 1, "examples": ["list:3 repeats list:2"]}
    assert (found["length_bias"]["pairs"], found["length_bias"]["chosen_longer"]) == (2, 0.5)
    assert found["tokens"]["chosen"]["max"] == 3 and sum(found["tokens"]["chosen"]["histogram"]["counts"]) == 4
    assert found["feedback"]["ties"] == {"pairs": 4, "tied": 2, "share": 0.5}
    assert "      2  pairs are ties (50.0 %)" in audit_lines(found)
    assert audit_rows([tie])["length_bias"] is None


SCORED = {"prompt": "p", "responses": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("rows", "feedback", "lines"),
    [
        (
            [pair("p", "a", "b"), pair("p x", "a", "b")],
            {"kinds": {"pair": 2}, "prompts": 2, "ties": {"pairs": 2, "tied": 0, "share": 0.0}},
            ["      2  different prompts, with 2 responses each"],
        ),
        (
            [{"prompt": p, "completion": c, "label": label} for p, c, label in (("p", "a", 1), ("p", "b", 0), ("p x", "c", 1))],
            {
                "kinds": {"label": 3},
                "prompts": 2,
                "responses_per_group": {"min": 1, "mean": 1.0, "max": 1},
                "responses_per_prompt": {"min": 1, "mean": 1.5, "max": 2},
                "labels": {"desirable": 2, "undesirable": 1, "share": 2 / 3},
            },
            [
                "      2  different prompts, with 1 to 2 responses each, 1.50 on average",
                "      2  rows are desirable (66.7 %), 1 are not",
            ],
        ),
        (
            [{**SCORED, "scores": scores} for scores in ([1, 2, 3], [1, 1, 2], [4, 4, 4])],
            {"kinds": {"scores": 3}, "tied_scores": {"rows": 3, "tied": 2, "all_equal": 1, "share": 2 / 3}},
            [
                "      1  different prompts, with 9 responses each",
                "      2  rows have equal scores (66.7 %); in 1 all are equal",
            ],
        ),
        (
            [{**SCORED, "ranking": [2, 1, 3], "finished": [True, False, False]}],
            {"kinds": {"ranking": 1}, "unfinished": 2},
            ["      1  different prompts, with 3 responses each", "      2  responses were cut and get no end-of-turn token"],
        ),
        (
            [{"instruction": "p", "output": "a"}],
            {"kinds": {"demonstration": 1}},
            ["      1  different prompts, with 1 response each"],
        ),
    ],
)
def test_what_is_known_of_the_responses_is_counted_for_every_kind(
    rows: list[dict[str, Any]], feedback: dict[str, Any], lines: list[str]
) -> None:
    found = audit_rows(rows)
    absent: dict[str, Any] = {"ties": None, "labels": None, "tied_scores": None, "unfinished": 0}
    assert {key: found["feedback"][key] for key in absent | feedback} == absent | feedback
    assert json.loads(json.dumps(found)) == found
    written = audit_lines(found)
    at = written.index(lines[0])
    assert written[at : at + len(lines) + 1] == [*lines, written[at + len(lines)]]
    assert written[at + len(lines)].startswith("tokens ")


@pytest.mark.parametrize(
    ("row", "about"),
    [
        (pair("p", "a", "b"), "two responses preferred both ways"),
        ({"prompt": "p", "completion": "a", "label": 1}, "responses labelled both ways"),
        ({"prompt": "p", "completion": "a"}, None),
    ],
)
def test_contradictions_are_named_for_what_they_are(row: dict[str, Any], about: str | None) -> None:
    written = [line for line in audit_lines(audit_rows([row])) if "both ways" in line]
    assert written == ([] if about is None else [f"      0  {about}"])


def test_leakage_counts_prompts_and_whole_groups() -> None:
    against = load_groups([pair("p", "b", "a"), pair("q", "x", "y")])
    found = audit_rows([pair("p", "a", "b"), pair("p", "a", "c"), pair("Q", "x", "y")], against=against)["leakage"]
    assert found == {
        "against": "list",
        "prompts": 2,
        "groups": 1,
        "examples": ["list:1 has the prompt of list:1", "list:2 has the prompt of list:1"],
    }
    assert audit_rows([pair("p", "a", "b")])["leakage"] is None


def test_refusals_of_reading_and_of_encoding_are_counted_once() -> None:
    groups = load_groups([pair("p", "a", "b"), pair("p", "a", "a"), pair("p", "c", "c"), pair(" ", "a", "b")])
    late = BadRow("list:9", "no end-of-turn", "chosen", "x", "y")
    tokens = TokenSet((), bad=(*groups.bad, late), special_text=("list:1",))
    found = audit(groups, tokens, budget=(9, 9), on_overlong="drop")
    assert {reason: entry["count"] for reason, entry in found["refused"].items()} == {
        "identical responses": 2,
        "empty prompt": 1,
        "no end-of-turn": 1,
    }
    assert found["refused"]["no end-of-turn"]["examples"] == [str(late)]
    assert found["special_text"] == {"rows": 1, "examples": ["list:1"]}
    assert (found["rows"], found["groups"], found["tokens"], found["length_bias"]) == (4, 0, {}, None)
    assert len(audit_lines(found)) <= 40


def test_the_budget_counts_prompts_responses_and_groups() -> None:
    rows = [pair("p " * 5, "a " * 5, "b " * 6), pair("p", "a", "b " * 6), pair("p", "a", "b"), pair("p " * 6, "a", "b")]
    found = audit_rows(rows, budget=(4, 4), on_overlong="truncate")["truncation"]
    assert found == {
        "max_prompt_tokens": 4,
        "max_response_tokens": 4,
        "on_overlong": "truncate",
        "prompts_over": 2,
        "responses_over": 3,
        "groups_over": 3,
        "partly_over": 1,
    }


@given(LENGTHS)
def test_statistics_hold_every_response_once(lengths: list[tuple[int, int]]) -> None:
    found = audit_rows([pair("p", "a " * a, "b " * b) for a, b in lengths])["tokens"]
    assert set(found) == {"prompt", "chosen", "rejected"}
    assert found["chosen"]["histogram"]["edges"] == found["rejected"]["histogram"]["edges"]
    for column, name in enumerate(("chosen", "rejected")):
        values = [length[column] for length in lengths]
        histogram = found[name]["histogram"]
        assert sum(histogram["counts"]) == len(values)
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert (found[name]["min"], found[name]["max"]) == (min(values), max(values))
        assert found[name]["mean"] == pytest.approx(sum(values) / len(values))


@given(LENGTHS)
def test_length_bias_is_the_count_over_all_comparisons(lengths: list[tuple[int, int]]) -> None:
    chosen, rejected = np.array(lengths, dtype=np.int64).T
    bias = length_bias(chosen, rejected)
    assert bias is not None
    wins = [(a > b) + 0.5 * (a == b) for a, b in lengths]
    assert bias["chosen_longer"] == pytest.approx(sum(wins) / len(wins))
    differences = [a - b for a, b in lengths]
    brute = sum((d > -e) + 0.5 * (d == -e) for d in differences for e in differences) / len(lengths) ** 2
    assert bias["auc"] == pytest.approx(brute)
    mirrored = length_bias(rejected, chosen)
    assert mirrored is not None
    assert mirrored["auc"] == pytest.approx(1 - bias["auc"])
    assert mirrored["low"] == pytest.approx(1 - bias["high"])


def test_length_bias_at_its_ends() -> None:
    long, short = np.array([5, 6, 7]), np.array([1, 2, 3])
    for chosen, rejected, auc in ((long, short, 1.0), (short, long, 0.0), (long, long, 0.5)):
        bias = length_bias(chosen, rejected)
        assert bias is not None
        assert bias["auc"] == bias["chosen_longer"] == auc
    assert length_bias(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) is None


def test_wilson_is_the_root_of_its_equation() -> None:
    """The ends solve (p - p0)^2 = z^2 p0 (1 - p0) / n; 8 of 10 is the textbook's 0.4902 to 0.9433."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 5)[0] == pytest.approx(0.0, abs=1e-12)
    for end in wilson(0.3, 37):
        assert (0.3 - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 37)


def test_the_text_is_one_screen_and_says_what_was_found() -> None:
    rows = [pair(f"p {n}", "a " * (n + 2), "b " * 5) for n in range(9)] + [pair("p", "a", "a"), pair(" ", "a", "b")]
    found = audit_rows(rows, against=load_groups([pair("p 1", "x", "y")]), budget=(4, 9))
    assert json.loads(json.dumps(found)) == found
    lines = audit_lines(found)
    assert len(lines) <= 40
    text = "\n".join(lines)
    assert "list: 11 rows of shape pair, 9 usable groups" in text
    assert "chosen is longer in 61.1 % of pairs (30.9 to 84.7): length alone predicts the label with AUC 0.70" in text
    assert "1  identical responses: list:10 (chosen, rejected: found 'a', expected responses that differ)" in text
    columns = [line for line in lines if line.startswith(("prompt ", "chosen ", "rejected "))]
    assert len({line.index("|") for line in columns if "|" in line}) == 1


def test_hh_prefers_longer_replies() -> None:
    path = SHARED / "hh-rlhf/helpful-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data hh-rlhf is not here; set PREFOPT_SHARED")
    groups = load_groups(path)
    found = audit(groups, word_tokens(groups), budget=(512, 512), on_overlong="drop")
    assert found["groups"] == found["length_bias"]["pairs"] == 2339
    assert found["length_bias"]["low"] > 0.55
    assert found["length_bias"]["auc"] > 0.6
    assert (found["duplicates"]["count"], found["contradictions"]["count"]) == (0, 0)
