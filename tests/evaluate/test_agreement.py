"""Agreement and kappa against hand values, their intervals by simulation, and what rows of labels may look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import DataError
from prefopt.evaluate.agreement import (
    CLASSES,
    Labelled,
    agreement,
    agreement_lines,
    agreement_section,
    decisions,
    majority,
    read_labelled,
)
from prefopt.evaluate.intervals import wilson
from prefopt.evaluate.win_rate import Judged, Match, judge_matches
from prefopt.rollout.judges.verdict import Verdict, Winner
from prefopt.rollout.prompts import Given


def labels_of(table: Sequence[Sequence[int]]) -> tuple[list[Winner], list[Winner]]:
    """Labels of two raters whose counts are `table`."""
    rows = [(CLASSES[a], CLASSES[b]) for a, counts in enumerate(table) for b, count in enumerate(counts) for _ in range(count)]
    return [a for a, _ in rows], [b for _, b in rows]


def test_kappa_by_hand() -> None:
    one, other = labels_of([[20, 5, 0], [10, 15, 0], [0, 0, 0]])
    found = agreement(one, other, range(50))
    assert found["accuracy"] == wilson(35, 50)
    assert found["kappa"]["value"] == pytest.approx((0.7 - 0.5) / (1 - 0.5))  # chance: 0.5 * 0.6 + 0.5 * 0.4
    assert found["table"]["second"] == {"first": 10, "second": 15, "tie": 0}
    one, other = labels_of([[10, 2, 3], [1, 12, 2], [4, 0, 6]])
    chance = (15 * 15 + 15 * 14 + 10 * 11) / 40**2
    assert agreement(one, other, range(40))["kappa"]["value"] == pytest.approx((28 / 40 - chance) / (1 - chance))


def test_a_rater_agrees_with_itself_and_one_label_is_no_agreement() -> None:
    one, _ = labels_of([[3, 0, 0], [0, 4, 0], [0, 0, 5]])
    assert agreement(one, one, range(12))["kappa"]["value"] == 1
    same: list[Winner | None] = ["tie"] * 5
    assert agreement(same, same, range(5))["kappa"] is None
    with pytest.raises(DataError, match="no row that both sides labelled"):
        agreement([None], ["tie"], [0])


@given(
    st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(CLASSES)), min_size=2, max_size=30), st.permutations(CLASSES)
)
def test_it_is_symmetric_and_knows_no_names(rows: list[tuple[Winner, Winner]], renamed: list[Winner]) -> None:
    one, other = [a for a, _ in rows], [b for _, b in rows]
    names = dict(zip(CLASSES, renamed, strict=True))
    found = agreement(one, other, range(len(rows)))
    for again in (
        agreement(other, one, range(len(rows))),
        agreement([names[a] for a in one], [names[b] for b in other], range(len(rows))),
    ):
        assert again["accuracy"] == found["accuracy"]
        assert (again["kappa"] is None) == (found["kappa"] is None)
        if found["kappa"]:
            assert again["kappa"]["value"] == pytest.approx(found["kappa"]["value"])


def test_labels_that_are_missing_are_counted_and_left_out() -> None:
    found = agreement(["first", None, "tie", "second"], ["first", "first", None, "tie"], range(4))
    assert (found["rows"], found["left_out"], found["accuracy"]["value"]) == (2, 2, 0.5)


def test_rows_of_one_prompt_count_as_one() -> None:
    one, other = labels_of([[20, 5, 0], [10, 15, 0], [0, 0, 0]])
    once = agreement(one, other, range(50))
    copies = [[label for label in labels for _ in range(8)] for labels in (one, other)]
    copied = agreement(*copies, [at // 8 for at in range(400)])
    assert copied["kappa"] == pytest.approx(once["kappa"])
    width = [found["accuracy"]["high"] - found["accuracy"]["low"] for found in (once, copied)]
    assert width[1] == pytest.approx(width[0], rel=0.15)


def test_the_interval_of_kappa_covers() -> None:
    random = np.random.default_rng(8)
    chances = np.array([[0.30, 0.06, 0.04], [0.08, 0.26, 0.02], [0.05, 0.05, 0.14]])
    expected = float(chances.sum(0) @ chances.sum(1))
    truth = (float(np.trace(chances)) - expected) / (1 - expected)
    covered = 0
    for seed in range(500):
        one, other = labels_of(random.multinomial(150, chances.ravel()).reshape(3, 3).tolist())
        kappa = agreement(one, other, range(150), seed=seed, resamples=500)["kappa"]
        covered += kappa["low"] <= truth <= kappa["high"]
    assert 0.93 <= covered / 500 <= 0.97


def test_the_majority_is_more_than_half() -> None:
    labels: dict[str, list[Winner]] = {
        "a": ["first", "tie", "first"],
        "b": ["first", "second", "tie"],
        "c": ["tie", "second", "second"],
    }
    assert majority(labels) == ["first", "second", None]


def test_a_judge_decides_over_both_orders() -> None:
    match = Match("p", "a", "b")

    def of(first: Winner | None, second: Winner | None) -> Judged:
        return Judged(match, Verdict(first), Verdict(second))

    assert decisions([of("first", "second"), of("first", "first"), of("tie", "first"), of(None, None)]) == [
        "first",
        "tie",
        "second",
        None,
    ]


class Oracle:
    """Knows what the labels say of each pair of responses."""

    name = "oracle"

    def __init__(self, labelled: Labelled, who: str) -> None:
        self.known = {(m.policy, m.opponent): label for m, label in zip(labelled.matches, labelled.labels[who], strict=True)}

    def compare(self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        other: dict[str, Winner] = {"first": "second", "second": "first", "tie": "tie"}
        return [
            Verdict(self.known[a, b] if (a, b) in self.known else other[self.known[b, a]])
            for a, b in zip(first, second, strict=True)
        ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def labelled_rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(9)
    return [
        {
            "instruction": f"Do {at // 2}",
            "input": "" if at % 2 else "this",
            "response1": f"one {at}",
            "response2": f"two {at}",
            **{f"annotator{who}": int(label) for who, label in zip((1, 2, 3), random.integers(0, 3, 3), strict=True)},
        }
        for at in range(60)
    ]


def test_a_judge_that_follows_one_person_agrees_with_it_alone(tmp_path: Path) -> None:
    labelled = read_labelled(write(tmp_path / "rows.jsonl", labelled_rows()))
    assert list(labelled.labels) == ["annotator1", "annotator2", "annotator3"]
    assert labelled.matches[0].prompt == "Do 0\nthis" and labelled.matches[1].prompt == "Do 0"
    section = agreement_section(labelled, judge_matches(Oracle(labelled, "annotator2"), labelled.matches))
    assert section["judge"]["annotator2"]["accuracy"]["value"] == section["judge"]["annotator2"]["kappa"]["value"] == 1
    assert abs(section["judge"]["annotator1"]["kappa"]["value"]) < 0.35
    assert [found["who"] for found in section["people"]] == [
        ["annotator1", "annotator2"], ["annotator1", "annotator3"], ["annotator2", "annotator3"]
    ]  # fmt: skip
    assert section["people"][0]["kappa"] == section["judge"]["annotator1"]["kappa"]
    assert section["inconsistent"] == section["unreadable"] == 0
    assert len(agreement_lines(section)) == 1 + 4 + 3
    assert json.loads(json.dumps(section, allow_nan=False)) == section


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    good = {"prompt": "p", "response1": "a", "response2": "b", "label": "tie"}
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="no column of labels; its columns: prompt, response1, response2, label"):
        read_labelled(write(path, [good]))
    assert read_labelled(write(path, [good]), columns=["label"]).labels == {"label": ["tie"]}
    for bad, said in (({"label": 3}, r"rows\.jsonl:2: label is 3"), ({"label": True}, "is True")):
        with pytest.raises(DataError, match=said):
            read_labelled(write(path, [good, good | bad]), columns=["label"])
    found = read_labelled(write(path, [good, good | {"response2": True}]), columns=["label"])
    assert (len(found.matches), found.labels, found.left_out) == (1, {"label": ["tie"]}, ("rows.jsonl:2",))
    with pytest.raises(DataError, match="none of its 1 rows"):
        read_labelled(write(path, [good | {"response1": None}]), columns=["label"])


def test_people_of_pandalm_agree_far_beyond_chance(shared: Path) -> None:
    labelled = read_labelled(str(shared / "data" / "pandalm" / "testset-v1.json"))
    people = list(labelled.labels.values())
    assert len(people) == 3 and len(labelled.matches) + len(labelled.left_out) == 999
    assert len(labelled.left_out) == 6, "a response that is the JSON value true"
    clusters = [hash(str(match.prompt)) for match in labelled.matches]
    assert len(set(clusters)) < 200, "rows share prompts"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert agreement(people[one], people[other], clusters)["kappa"]["low"] > 0.5
