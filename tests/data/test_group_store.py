"""Laws of groups on disk: nothing of a row is lost on the way, views are in order, few rows stay in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.core.config import DataConfig
from prefopt.data import group_store
from prefopt.data.audit import audit
from prefopt.data.group_store import StoredGroups, group_feedbacks, kept, pick_groups
from prefopt.data.groups import Feedback, Group, Turn
from prefopt.data.load import load_groups
from prefopt.data.splits import load_splits
from prefopt.data.tokens import TokenSet

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
TURN = st.builds(Turn, st.sampled_from(["user", "assistant", "tool"]), TEXT, TEXT)
TURNS = st.lists(TURN, min_size=1, max_size=3).map(tuple)
FEEDBACK = st.one_of(
    st.builds(Feedback, st.just("pair"), margin=st.none() | st.floats(-5, 5), weight=st.floats(0, 2), tie=st.booleans()),
    st.builds(Feedback, st.just("label"), label=st.booleans()),
    st.builds(Feedback, st.just("scores"), scores=st.lists(st.floats(-5, 5), min_size=2, max_size=3).map(tuple)),
)
GROUP = st.builds(
    Group,
    TURNS,
    st.lists(TURNS, min_size=1, max_size=3).map(tuple),
    FEEDBACK,
    st.sampled_from(["text", "hh", "messages"]),
    st.sampled_from(["rows.jsonl:1", "caf\u00e9\udcff.jsonl:2"]),
    st.sampled_from(["", '[{"name": "add"}]']),
    st.sampled_from([(), (True,), (False, True)]),
)


@pytest.fixture(autouse=True)
def few_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(group_store, "IN_MEMORY_GROUPS", 2)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(GROUP, max_size=8), random=st.randoms(use_true_random=False))
def test_stored_groups_are_the_groups(groups: list[Group], random: object) -> None:
    stored = kept(iter(groups))
    assert isinstance(stored, StoredGroups) == (len(groups) > 2)
    assert list(stored) == groups
    assert list(group_feedbacks(stored)) == [group.feedback for group in groups]
    places = np.random.default_rng(len(groups)).permutation(len(groups))[: len(groups) // 2].tolist()
    picked = pick_groups(stored, places)
    assert list(picked) == [groups[place] for place in places]
    assert list(group_feedbacks(picked)) == [groups[place].feedback for place in places]
    again = pick_groups(picked, range(len(places)))
    assert [again[place] for place in range(len(again))] == list(picked)
    assert list(stored[1:3]) == groups[1:3]
    if groups:
        assert stored[-1] == groups[-1]


def test_a_view_outlives_what_it_was_taken_from_and_leaves_no_file(tmp_path: Path) -> None:
    groups = [Group((Turn("user", str(n)),), ((Turn("assistant", "a"),),), Feedback("demonstration")) for n in range(5)]
    view = pick_groups(kept(groups), [4, 0])
    assert [group.prompt[0].content for group in view] == ["4", "0"]
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name


def test_rows_are_split_and_audited_alike_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        for number in range(9):
            yield {"prompt": f"p{number % 4}", "chosen": f"a{number % 3}", "rejected": f"b{number % 2}"}
        yield {"prompt": "p0", "chosen": "b0", "rejected": "a0"}

    data = DataConfig(eval_rows=3)
    stored, stored_held = load_splits(data, train_rows=list(rows()))
    monkeypatch.setattr(group_store, "IN_MEMORY_GROUPS", 100)
    plain, plain_held = load_splits(data, train_rows=list(rows()))
    assert isinstance(stored.groups, StoredGroups) and isinstance(plain.groups, tuple)
    assert stored_held is not None and plain_held is not None
    assert replace(stored, groups=tuple(stored.groups)) == plain
    assert replace(stored_held, groups=tuple(stored_held.groups)) == plain_held
    one, other = (
        audit(groups, TokenSet(()), budget=(9, 9), on_overlong="drop", against=held)
        for groups, held in ((stored, stored_held), (plain, plain_held))
    )
    assert one == other and one["leakage"]["prompts"] > 0


def test_reading_many_rows_notes_what_reading_few_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "p" * (n % 2), "chosen": f"a{n}", "rejected": "b", "other": 1} for n in range(7)] + [{"prompt": "p"}]
    stored = load_groups(rows)
    monkeypatch.setattr(group_store, "IN_MEMORY_GROUPS", 100)
    assert replace(stored, groups=tuple(stored.groups)) == load_groups(rows)
    assert stored.notes[1] == "fields that are not used: other" and "4 rows have the prompt" in stored.notes[2]
