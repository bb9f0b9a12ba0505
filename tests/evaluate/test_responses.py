"""Responses to compare from files: what is taken of each shape, and how sides are put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import DataError
from prefopt.evaluate.responses import (
    Responses,
    distinct_prompts,
    is_stored,
    matches_of,
    only,
    stored_responses,
)
from prefopt.evaluate.win_rate import Match
from prefopt.rollout.prompts import as_prompt


def write(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def answers(found: Responses) -> list[tuple[str, list[str]]]:
    return [(prompt.text, texts) for prompt, texts in zip(found.prompts, found.texts, strict=True)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "responses": ["a"], "finished": [True], "response_tokens": [1]}, {"prompt": "q", "responses": ["b"]}],
        [{"prompt": "p", "response": "a"}, {"prompt": "q", "response": "b"}],
        [{"prompt": "p", "chosen": "a", "rejected": "x"}, {"prompt": "q", "chosen": "b", "rejected": "x"}],
        [{"prompt": "p", "responses": ["x", "a"], "scores": [1, 2]}, {"prompt": "q", "responses": ["b", "x"], "scores": [3, 0]}],
        [{"prompt": "p", "responses": ["x", "a"], "ranking": [2, 1]}, {"prompt": "q", "responses": ["b", "x"], "ranking": [1, 2]}],
        [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": True},
         {"prompt": "q", "completion": "x", "label": False}],
        [{"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: x"},
         {"chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: x"}],
    ],
)  # fmt: skip
def test_every_shape_gives_its_good_response(tmp_path: Path, rows: list[Any]) -> None:
    found = answers(stored_responses(write(tmp_path / "rows.jsonl", *rows)))
    plain = [(prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:"), texts) for prompt, texts in found]
    assert [(prompt, [text.strip() for text in texts]) for prompt, texts in plain] == [("p", ["a"]), ("q", ["b"])]


def test_rows_of_one_prompt_are_put_together_and_ties_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "x"},
        {"prompt": "p", "chosen": "b", "rejected": "x", "tie": True},
        {"prompt": "p", "chosen": "c", "rejected": "x"},
    )
    assert answers(stored_responses(path)) == [("p", ["a", "c"])]
    tied = write(tmp_path / "tied.jsonl", {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]})
    with pytest.raises(DataError, match="none of its 1 rows"):
        stored_responses(tied)
    with pytest.raises(DataError, match=r"broken\.jsonl:2"):
        stored_responses(
            write(tmp_path / "broken.jsonl", {"prompt": "p", "responses": ["a"]}, {"prompt": "q", "responses": "b"})
        )


def test_responses_meet_in_turn() -> None:
    prompts = [as_prompt("p"), as_prompt("q")]
    policy = Responses("policy", prompts, [["a", "b", "c"], ["d"]])
    opponent = Responses("opponent", prompts, [["x", "y"], ["z", "w"]])
    assert matches_of(policy, opponent) == [
        Match("p", "a", "x"), Match("p", "b", "y"), Match("p", "c", "x"), Match("q", "d", "z")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="different prompts"):
        matches_of(policy, Responses("other", prompts[::-1], opponent.texts))


def test_prompts_of_the_file_can_be_chosen_and_must_be_there() -> None:
    found = Responses("rows.jsonl", [as_prompt("p"), as_prompt("q")], [["a"], ["b"]])
    assert answers(only(found, [as_prompt("q")])) == [("q", ["b"])]
    with pytest.raises(DataError, match=r"no response to 1 of 2 prompts; the first: 'r'"):
        only(found, [as_prompt("q"), as_prompt("r")])
    assert [prompt.text for prompt in distinct_prompts([as_prompt(text) for text in "abcab"])] == ["a", "b", "c"]


def test_files_and_models_are_told_apart() -> None:
    assert is_stored("samples.jsonl") and is_stored("rows.JSON.gz") and is_stored("rows.parquet")
    assert not any(map(is_stored, ("runs/dpo", "model.gguf", "smollm2-135m-instruct", "org/name")))
