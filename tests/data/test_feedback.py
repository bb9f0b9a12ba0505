"""Ties, cut responses and equal scores are read as they are written; wrong values are refused by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.groups import Group
from prefopt.data.load import load_groups
from prefopt.data.refusals import Reason
from prefopt.data.shapes import USED_COLUMNS

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
TALKS = {
    name: [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": PAIR[name]}] for name in ("chosen", "rejected")
}
SCORED = {"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
RANKED = {"prompt": "Why?", "completions": ["a", "b", "c"], "ranking": [1, 2, 3]}
LABELLED = {"messages": TALKS["chosen"], "label": True}
SHOWN = {"instruction": "Why?", "output": "Because."}


def one_group(row: dict[str, Any]) -> Group:
    groups = load_groups([row])
    assert groups.bad == () and len(groups.notes) == 1, (groups.bad, groups.notes)
    return groups.groups[0]


@pytest.mark.parametrize(
    ("value", "tie"),
    [(True, True), (1, True), ("true", True), ("True", True), ("1", True), (1.0, True)]
    + [(False, False), (0, False), ("false", False), ("0", False), (None, False)],
)
@pytest.mark.parametrize("row", [PAIR, TALKS])
def test_a_tie_is_read_however_it_is_written(row: dict[str, Any], value: Any, tie: bool) -> None:
    feedback = one_group({**row, "tie": value}).feedback
    assert (feedback.kind, feedback.tie) == ("pair", tie)
    assert one_group(row).feedback.tie is False


def test_a_tie_of_identical_responses_is_still_refused() -> None:
    (bad,) = load_groups([{**PAIR, "rejected": "Because.", "tie": True}]).bad
    assert bad.reason == Reason.IDENTICAL_RESPONSES


@pytest.mark.parametrize(
    ("row", "finished"),
    [
        (PAIR, ()),
        ({**PAIR, "chosen_finished": True, "rejected_finished": True}, ()),
        ({**PAIR, "rejected_finished": False}, (True, False)),
        ({**PAIR, "chosen_finished": 0, "rejected_finished": "1"}, (False, True)),
        ({**TALKS, "chosen_finished": "false"}, (False, True)),
        ({**SCORED, "finished": [True, False, True]}, (True, False, True)),
        ({**SCORED, "finished": "[1, 1, 0]"}, (True, True, False)),
        ({**SCORED, "finished": [True, True, None]}, ()),
        ({**RANKED, "finished": [False, False, False]}, (False, False, False)),
        ({**LABELLED, "finished": False}, (False,)),
        ({**SHOWN, "finished": "False"}, (False,)),
        ({**SHOWN, "finished": True}, ()),
        ({"prompt": "Why?", "completion": "Because.", "label": 0, "finished": 0}, (False,)),
    ],
)
def test_which_responses_were_cut(row: dict[str, Any], finished: tuple[bool, ...]) -> None:
    """No value says that a response is finished, and a row of finished ones says nothing of it."""
    assert one_group(row).finished == finished


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({**PAIR, "tie": "maybe"}, Reason.BAD_LABEL, "tie"),
        ({**PAIR, "tie": 2}, Reason.BAD_LABEL, "tie"),
        ({**TALKS, "tie": [True]}, Reason.BAD_LABEL, "tie"),
        ({**PAIR, "chosen_finished": "length"}, Reason.WRONG_TYPE, "chosen_finished"),
        ({**PAIR, "rejected_finished": -1}, Reason.WRONG_TYPE, "rejected_finished"),
        ({**SCORED, "finished": [True, False]}, Reason.WRONG_TYPE, "finished"),
        ({**SCORED, "finished": False}, Reason.WRONG_TYPE, "finished"),
        ({**RANKED, "finished": [True, "no", True]}, Reason.WRONG_TYPE, "finished[1]"),
        ({**SHOWN, "finished": [False]}, Reason.WRONG_TYPE, "finished"),
        ({**LABELLED, "finished": 0.5}, Reason.WRONG_TYPE, "finished"),
    ],
)
def test_wrong_values_are_refused_by_name(row: dict[str, Any], reason: Reason, field: str) -> None:
    groups = load_groups([row])
    assert groups.groups == ()
    assert [(bad.source, bad.reason, bad.field) for bad in groups.bad] == [("list:1", reason, field)]


def test_a_table_of_text_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = [{**PAIR, "tie": "", "rejected_finished": "False"}, {**PAIR, "tie": "True", "rejected_finished": ""}]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    groups = load_groups(path).groups
    assert [(group.feedback.tie, group.finished) for group in groups] == [(False, (True, False)), (True, ())]


def test_equal_scores_are_kept_and_equal_ranks_are_not(tmp_path: Path) -> None:
    """UltraFeedback's rows: an instruction, four completions with whole-number scores, many of them equal."""
    path = tmp_path / "scores.jsonl"
    answers = ["a", "b", "c", "d"]
    scores = [[7, 7, 5, 8.5], [6, 6, 6, 6], [1, 2, 3, 4]]
    rows = [{"instruction": "Why?", "completions": answers, "scores": values} for values in scores]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    groups = load_groups(path)
    assert groups.shape == "scores" and groups.bad == ()
    assert [list(group.feedback.scores) for group in groups.groups] == scores
    (bad,) = load_groups([{"prompt": "Why?", "responses": answers, "ranking": [1, 1, 2, 3]}]).bad
    assert bad.reason == Reason.TIED_SCORES


def test_the_columns_are_known() -> None:
    assert {"tie", "finished", "chosen_finished", "rejected_finished"} <= USED_COLUMNS
