"""Prompts keep the order and the words of their file."""

import json
from pathlib import Path

import pytest

from prefopt.core.errors import DataError
from prefopt.data.groups import Turn
from prefopt.rollout.prompts import Prompt, as_prompt, prompt_text, read_prompts

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "positive"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_spelling_of_a_prompt_gives_its_turns(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "Say hello, ok?"},
        {"prompt": MESSAGES},
        {"turns": ["first", "second"]},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Hello"}]},
    )
    hi = (Turn("system", "Be brief."), Turn("user", "Hi"))
    assert [prompt.turns for prompt in read_prompts(path)] == [
        (Turn("user", "Say hello, ok?"),),
        hi,
        (Turn("user", "first"),),
        hi,
    ]
    assert [prompt.form for prompt in read_prompts(path)] == ["text", "messages", "text", "messages"]


def test_text_csv_and_json_lines_give_the_same_prompts(tmp_path: Path) -> None:
    words = ["One, two?", 'Say "x"', "Three"]
    (tmp_path / "p.txt").write_text("\n".join(words) + "\n\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text('prompt\n"One, two?"\n"Say ""x"""\nThree\n', encoding="utf-8")
    lines(tmp_path / "p.jsonl", *({"prompt": word} for word in words))
    for name in ("p.txt", "p.csv", "p.jsonl"):
        assert [prompt.given for prompt in read_prompts(tmp_path / name)] == words


@pytest.mark.parametrize("given", ["Hello there", MESSAGES, "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"])
def test_given_is_what_was_given(given: object) -> None:
    prompt = as_prompt(given)
    assert prompt.given == given
    assert as_prompt(prompt.given) == prompt
    assert as_prompt(prompt) is prompt


def test_a_transcript_becomes_turns_without_the_open_end() -> None:
    prompt = as_prompt("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:")
    assert prompt == Prompt((Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Why?")), "hh")


def test_text_for_people() -> None:
    assert prompt_text("plain") == "plain"
    assert prompt_text([{"role": "user", "content": "alone"}]) == "alone"
    assert prompt_text(MESSAGES) == "system: Be brief.\n\nuser: Hi"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "prompt, turns or messages"),
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": 3}, "wrong type"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "unknown role"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "last turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turn of the user"),
        ({"turns": []}, "at least one turn"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path: Path, row: object, said: str) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError, match=r"p\.jsonl:2") as caught:
        read_prompts(path)
    assert said in str(caught.value)


def test_a_broken_line_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        read_prompts(path)
    (tmp_path / "p.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_prompts(tmp_path / "missing.txt")


def test_the_example_prompts_are_distinct_short_and_disjoint() -> None:
    train, held_out = ([str(p.given) for p in read_prompts(EXAMPLES / f"prompts_{name}.jsonl")] for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (160, 64)
    assert len({text.lower() for text in train + held_out}) == 224
    assert all(6 <= len(text.split()) <= 16 for text in train + held_out)
