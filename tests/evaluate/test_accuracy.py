"""Accuracy by category against hand values, and the macro mean's interval by simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from prefopt.core.errors import DataError
from prefopt.data.groups import Feedback, Group, Turn
from prefopt.data.load import load_groups
from prefopt.evaluate.accuracy import accuracy_lines, accuracy_section, categories_of, macro_mean
from prefopt.evaluate.intervals import wilson
from prefopt.evaluate.pair_scores import text_scores
from prefopt.rollout.rewards import load_reward


def pair(source: str, feedback: Feedback | None = None) -> Group:
    turn = (Turn("assistant", "x"),)
    return Group((Turn("user", "p"),), (turn, turn), feedback or Feedback("pair"), source=source)


SCORES = [np.array(values) for values in ((2.0, 1.0), (1.0, 2.0), (3.0, 3.0), (5.0, 4.0))]
GROUPS = [pair(f"rows.jsonl:{at}") for at in range(1, 5)]


def test_by_hand_with_a_tie_that_counts_half_and_is_named() -> None:
    found = accuracy_section(SCORES, GROUPS, ["chat", "chat", "math", "math"])
    assert found["accuracy"] == wilson(2.5, 4)
    assert found["categories"] == {"chat": wilson(1, 2), "math": wilson(1.5, 2)}
    assert found["macro"]["value"] == (0.5 + 0.75) / 2
    assert found["ties"] == ["rows.jsonl:3"]
    assert accuracy_lines(found)[-1].endswith("count half: rows.jsonl:3")
    assert "categories" not in accuracy_section(SCORES, GROUPS)


def test_the_macro_mean_does_not_mind_how_many_rows_a_category_has() -> None:
    scores = [np.array([1.0, 0.0])] * 99 + [np.array([0.0, 1.0])]
    found = accuracy_section(scores, [pair("r")] * 100, ["easy"] * 99 + ["hard"])
    assert found["accuracy"]["value"] == 0.99
    assert found["macro"]["value"] == 0.5


def test_of_one_category_it_is_that_one_and_certainty_keeps_a_width() -> None:
    one = wilson(7, 10)
    assert macro_mean([one])["low"] == pytest.approx(one["low"])
    assert macro_mean([one])["high"] == pytest.approx(one["high"])
    sure = macro_mean([wilson(20, 20)] * 4)
    assert sure["value"] == sure["high"] == 1
    assert sure["low"] == pytest.approx(1 - (1 - wilson(20, 20)["low"]) / math.sqrt(4))


def test_the_interval_of_the_macro_mean_covers() -> None:
    random = np.random.default_rng(3)
    chances, rows = np.array([0.95, 0.7, 0.55]), (80, 40, 25)
    covered = 0
    for _ in range(2000):
        found = macro_mean([wilson(int(random.binomial(n, p)), n) for n, p in zip(rows, chances, strict=True)])
        covered += found["low"] <= chances.mean() <= found["high"]
    assert 0.93 <= covered / 2000 <= 0.97


def test_rows_that_prefer_nothing_are_counted() -> None:
    tied = pair("rows.jsonl:9", Feedback("pair", tie=True))
    found = accuracy_section([*SCORES, np.zeros(2)], [*GROUPS, tied])
    assert (found["rows"], found["without_preference"], found["ties"]) == (4, 1, ["rows.jsonl:3"])
    with pytest.raises(DataError, match="none of 1 rows prefers"):
        accuracy_section([np.zeros(2)], [tied])


def test_categories_come_from_a_column_and_scores_from_texts(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "one two three", "rejected": "one", "subset": "chat"},
        {"prompt": "q", "chosen": "one", "rejected": "one two", "subset": "math"},
        {
            "prompt": "q",
            "chosen": [{"role": "assistant", "content": "a b"}],
            "rejected": [{"role": "assistant", "content": "a"}],
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = categories_of(str(path), "subset")
    assert list(found.values()) == ["chat", "math"]
    scores, kept = text_scores(load_reward("length"), load_groups(str(path)))
    assert [values.tolist() for values in scores] == [[3, 1], [1, 2], [2, 1]]
    assert [found.get(group.source) for group in kept] == ["chat", "math", None]
    with pytest.raises(DataError, match='no row has a column "kind"') as error:
        categories_of(str(path), "kind")
    assert "subset" in error.value.todo
