"""Principles are read strictly; a response is criticised and revised by them, and the row says how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import ConfigError, DataError
from prefopt.data.load import load_groups
from prefopt.rollout.constitution import revise
from prefopt.rollout.judges.chat import TOO_LONG, Answer, Conversation, Usage
from prefopt.rollout.principles import Principle, read_constitution, suited

ROOT = Path(__file__).resolve().parents[2]
THREE = tuple(Principle(name, f"critique {name}", f"revision {name}") for name in ("one", "two", "three"))


class Writer:
    """Answers with the number of the turn and what it was asked last, so that a row shows its conversation."""

    name = "local:writer"

    def __init__(self, change: Any = None) -> None:
        self.usage = Usage()
        self.change = change or (lambda text: Answer(text))
        self.conversations: list[Conversation] = []

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        self.conversations += conversations
        return [self.change(f"{len(turns)}: {turns[-1]['content'].splitlines()[0]}") for turns in conversations]


def test_a_row_keeps_the_response_its_critiques_and_what_they_led_to() -> None:
    writer = Writer()
    result = revise(["p", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]], writer, THREE[:1])
    assert result.rows == [
        {
            "prompt": "p",
            "completion": "5: revision one",
            "first_response": "1: p",
            "critiques": ["3: critique one"],
            "principles": ["one"],
            "judge": "local:writer",
        },
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "6: revision one"}],
            "first_response": "2: q",
            "critiques": ["4: critique one"],
            "principles": ["one"],
            "judge": "local:writer",
        },
    ]
    assert (result.skipped, result.unchanged) == ({}, 0)
    roles = [[turn["role"] for turn in turns] for turns in writer.conversations[-2:]]
    assert roles[0] == ["user", "assistant", "user", "assistant", "user"]
    assert writer.conversations[-2][1]["content"] == "1: p"
    assert writer.conversations[-2][3]["content"] == "3: critique one"
    groups = load_groups(result.rows)
    assert groups.shape == "demonstration"
    assert [group.responses[0][0].content for group in groups.groups] == ["5: revision one", "6: revision one"]


def test_rounds_go_on_from_the_revision_by_another_principle() -> None:
    prompts = [str(number) for number in range(30)]
    rows = revise(prompts, Writer(), THREE, rounds=3, seed=1).rows
    assert all(sorted(row["principles"]) == ["one", "three", "two"] for row in rows)
    assert all(row["critiques"] == [f"3: critique {name}" for name in row["principles"]] for row in rows)
    assert all(row["completion"] == f"5: revision {row['principles'][-1]}" for row in rows)
    assert len({tuple(row["principles"]) for row in rows}) == 6
    assert rows == revise(prompts, Writer(), THREE, rounds=3, seed=1).rows != revise(prompts, Writer(), THREE, rounds=3).rows
    once = revise(prompts, Writer(), THREE, seed=1).rows
    assert [row["principles"] for row in once] == [row["principles"][:1] for row in rows]


def test_given_responses_are_revised_and_the_unchanged_are_counted() -> None:
    writer = Writer(lambda text: Answer(" as it was \n" if "revision" in text else text))
    result = revise(["p", "q"], writer, THREE[:1], first=["as it was", "other"])
    assert [row["first_response"] for row in result.rows] == ["as it was", "other"]
    assert [row["completion"] for row in result.rows] == ["as it was"] * 2
    assert result.unchanged == 1
    assert len(writer.conversations) == 4
    with pytest.raises(DataError, match="2 prompts and 1 first"):
        revise(["p", "q"], writer, THREE, first=["a"])


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("1: bad", "empty first response"),
        ("critique", "empty critique"),
        ("revision", "empty revision"),
        ("cut", "revision cut at the limit of tokens"),
        ("long", "no room for the revision in the context"),
    ],
)
def test_what_gives_no_row_is_counted_by_its_reason(marker: str, reason: str) -> None:
    bad: list[int] = []

    def change(text: str) -> Answer:
        wanted = "revision" if marker in ("cut", "long") else marker
        if wanted in text and not bad:
            bad.append(1)
            return {"cut": Answer("half", finished=False), "long": TOO_LONG}.get(marker, Answer(" \n"))
        return Answer(text)

    result = revise(["bad", "good", "fine"], Writer(change), THREE, rounds=2)
    assert result.skipped == {reason: 1}
    assert [row["prompt"] for row in result.rows] == ["good", "fine"]
    assert all(len(row["critiques"]) == 2 for row in result.rows)


def test_the_shipped_constitution_has_five_principles_for_both_uses() -> None:
    path = ROOT / "recipes" / "ai-feedback" / "constitution.yaml"
    principles = read_constitution(path)
    assert len(principles) == 5 == len(suited(principles, path))
    assert Counter(principle.name for principle in principles).most_common(1)[0][1] == 1
    assert all(principle.compare.endswith("?") for principle in principles)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("name: x", "found dict"),
        ("- just text", "principle 1: found 'just text'"),
        ("- {name: x, critique: c}", "principle 1: revision: missing"),
        ("- {name: x, critique: c, revision: ''}", "principle 1: revision: found ''"),
        ("- {name: 3, critique: c, revision: r}", "name: found 3"),
        ("- {name: x, critique: c, revison: r}", 'did you mean "revision"'),
        ("- {name: x, critique: c, revision: r, compare: []}", "compare: found []"),
        ("- {name: x, critique: c, revision: r}\n- {name: x, critique: c, revision: r}", '"x" comes twice'),
        ("- {name: x", "is not YAML"),
    ],
)
def test_a_wrong_constitution_names_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "constitution.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_constitution(path)
    assert said in str(caught.value)


def test_comparing_needs_a_question() -> None:
    with pytest.raises(ConfigError, match="no principle has compare"):
        suited(THREE, "mine.yaml")
    with pytest.raises(ConfigError, match="At least one"):
        revise(["p"], Writer(), THREE, rounds=0)
