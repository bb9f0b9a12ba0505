"""Laws of shapes: every spelling of the same preference is the same group, and each reason for refusal is triggered."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.config import ROW_SHAPES
from prefopt.core.errors import DataError
from prefopt.data.groups import Feedback, Group, Turn
from prefopt.data.load import detect_shape, load_groups
from prefopt.data.refusals import EXPLANATIONS, Reason
from prefopt.data.transcripts import join_hh

SHARED = Path(os.environ.get("PREFOPT_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"

USER, GOOD, POOR = Turn("user", "Why?"), Turn("assistant", "Because."), Turn("assistant", "No idea.")


def message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def one_group(row: dict[str, Any], shape: str = "auto") -> Group:
    groups = load_groups([row], shape=shape)
    assert groups.bad == ()
    return groups.groups[0]


PROMPT, CHOSEN, REJECTED = [message(USER)], [message(GOOD)], [message(POOR)]


@pytest.mark.parametrize(
    ("row", "shape", "form"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}, "pair", "text"),
        ({"question": "Why?", "chosen": "Because.", "rejected": "No idea."}, "pair", "text"),
        ({"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No idea."}, "pair", "text"),
        ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, "pair", "messages"),
        ({"prompt": PROMPT, "chosen": CHOSEN[0], "rejected": "No idea."}, "pair", "messages"),
        ({"prompt": "Why?", "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}, "pair", "messages"),
        ({"prompt": PROMPT, "chosen": PROMPT + CHOSEN, "rejected": REJECTED}, "pair", "messages"),
        ({"messages": json.dumps(PROMPT), "chosen": "Because.", "rejected": "No idea."}, "pair", "messages"),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": "No idea.\n"}, "pair", "hh"),
        ({"prompt": "\n\nHuman: Why?", "chosen": join_hh([USER, GOOD]), "rejected": join_hh([USER, POOR])}, "pair", "hh"),
        ({"chosen": join_hh([USER, GOOD]), "rejected": join_hh([USER, POOR])}, "transcripts", "hh"),
        ({"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}, "transcripts", "messages"),
        (
            {
                "conversations": [{"from": "human", "value": "Why?"}],
                "chosen": {"from": "gpt", "value": "Because."},
                "rejected": {"from": "gpt", "value": "No idea."},
            },
            "pair",
            "messages",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}],
                "chosen": CHOSEN,
                "rejected": REJECTED,
            },
            "pair",
            "messages",
        ),
    ],
)
def test_every_spelling_of_a_pair_is_the_same_group(row: dict[str, Any], shape: str, form: str) -> None:
    assert detect_shape([row]) == shape
    assert one_group(row) == Group((USER,), ((GOOD,), (POOR,)), Feedback("pair"), form, "list:1")  # type: ignore[arg-type]


def test_a_plain_text_pair_without_prompt_is_parted_where_the_texts_part() -> None:
    group = one_group({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert group.prompt == (Turn("user", "The sky is"),)
    assert group.responses == ((Turn("assistant", " blue."),), (Turn("assistant", " black."),))


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()) and not text.startswith("\n\n"))


@given(TEXT, TEXT, TEXT, st.integers(1, 3))
def test_content_is_kept_to_the_character(prompt: str, chosen: str, rejected: str, turns: int) -> None:
    if chosen == rejected:
        rejected += "!"
    group = one_group({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert [group.prompt[0].content, *(response[0].content for response in group.responses)] == [prompt, chosen, rejected]
    before = [Turn("user", prompt), Turn("assistant", chosen)] * (turns - 1) + [Turn("user", prompt)]
    whole = {"chosen": [*map(message, before), message(Turn("assistant", chosen))]}
    whole["rejected"] = [*whole["chosen"][:-1], message(Turn("assistant", rejected))]
    implicit = one_group(whole)
    assert implicit.prompt == tuple(before)
    assert implicit.responses == ((Turn("assistant", chosen),), (Turn("assistant", rejected),))


def test_responses_of_several_turns_are_kept_as_turns() -> None:
    longer = [message(POOR), message(Turn("user", "Sure?")), message(GOOD)]
    for row in (
        {"prompt": PROMPT, "chosen": longer, "rejected": CHOSEN},
        {"chosen": PROMPT + longer, "rejected": PROMPT + CHOSEN},
    ):
        assert one_group(row).responses == ((POOR, Turn("user", "Sure?"), GOOD), (GOOD,))


def test_labels_and_demonstrations_part_at_the_assistant() -> None:
    talk = [USER, POOR, Turn("user", "Sure?"), GOOD]
    messages = [message(turn) for turn in talk]
    labelled = one_group({"messages": messages, "label": "false"})
    assert (labelled.prompt, labelled.responses) == (tuple(talk[:3]), ((GOOD,),))
    assert labelled.feedback == Feedback("label", label=False)
    assert one_group({"prompt": "Why?", "completion": "Because.", "label": 1}).feedback.label is True
    shown = one_group({"messages": messages})
    assert (shown.prompt, shown.responses) == ((USER,), (tuple(talk[1:]),))
    greeted = one_group({"conversations": [{"from": "gpt", "value": "Hello"}, *messages]})
    assert greeted.prompt == (Turn("assistant", "Hello"), USER)
    for row in ({"prompt": "Why?", "completion": "Because."}, {"instruction": "Why?", "input": None, "output": "Because."}):
        assert one_group(row) == Group((USER,), ((GOOD,),), Feedback("demonstration"), "text", "list:1")
    alpaca = one_group(
        {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Be brief"}
    )
    assert [turn.content for turn in alpaca.prompt] == ["Be brief", "Hi", "Hello", "Add\n1, 2"]
    assert alpaca.form == "messages"


def test_scores_and_rankings_keep_every_response() -> None:
    scored = one_group({"prompt": "Why?", "responses": ["Because.", REJECTED], "scores": [1, "0.5"]}, shape="scores").feedback
    assert scored == Feedback("scores", scores=(1.0, 0.5))
    ranked = one_group({"prompt": "Why?", "completions": ["a", "b", "c"], "ranking": "[2, 3, 1]"})
    assert ranked.feedback == Feedback("ranking", ranking=(2, 3, 1))
    assert [response[0].content for response in ranked.responses] == ["a", "b", "c"]


def test_optional_columns_are_read() -> None:
    calls = [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    row = {
        "prompt": [*PROMPT, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "noon"}],
        "chosen": "Noon.",
        "rejected": {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
        "margin": "1.5",
        "probability": 0.75,
        "weight": 2,
        "tools": [{"type": "function"}],
        "system": "Be brief",
    }
    group = one_group(row)
    assert group.feedback == Feedback("pair", margin=1.5, probability=0.75, weight=2.0)
    assert [turn.role for turn in group.prompt] == ["system", "user", "assistant", "tool"]
    assert json.loads(group.prompt[2].tool_calls) == calls
    assert json.loads(group.responses[1][0].tool_calls) == [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    assert json.loads(group.tools) == row["tools"]


def test_messages_of_both_conversations_are_read_once_and_the_others_named() -> None:
    turns = [{"role": "user", "content": "Why é?"}, {"from": "gpt", "value": "What?"}, {"role": "user", "content": "That."}]
    group = one_group({"chosen": [*turns, *CHOSEN], "rejected": [*turns, *REJECTED]})
    assert [turn.content for turn in group.prompt] == ["Why é?", "What?", "That."]
    assert group.responses == ((GOOD,), (POOR,))
    groups = load_groups([{"chosen": [*turns, *CHOSEN], "rejected": [*turns[:2], {"role": "nobody", "content": "That."}]}])
    assert [bad.field for bad in groups.bad] == ["rejected[2].role"]
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"arguments": value}]} for value in (1, 1.0)]
    with_calls = [[turns[0], call, *answer] for call, answer in zip(calls, (CHOSEN, REJECTED), strict=True)]
    group = one_group({"chosen": with_calls[0], "rejected": with_calls[1]})
    assert len(group.prompt) == 1, "1 and 1.0 are equal and not the same JSON"


def test_a_system_turn_in_front_of_a_repeated_prompt_is_kept() -> None:
    system = {"role": "system", "content": "Be brief"}
    group = one_group({"prompt": "Why?", "chosen": [system, *PROMPT, *CHOSEN], "rejected": [system, *PROMPT, *REJECTED]})
    assert group.prompt == (Turn("system", "Be brief"), USER)


PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
CALL = {"role": "user", "content": "x", "tool_calls": [{"function": {}}]}
REFUSED: list[tuple[dict[str, Any], Reason, str]] = [
    ({**PAIR, "rejected": None}, Reason.MISSING_FIELD, "rejected"),
    ({**PAIR, "prompt": None}, Reason.MISSING_FIELD, "prompt"),
    ({**PAIR, "prompt": [{"content": "x"}]}, Reason.MISSING_FIELD, "prompt[0].role"),
    ({**PAIR, "chosen": [{"role": "assistant"}]}, Reason.MISSING_FIELD, "chosen[0].content"),
    ({**PAIR, "chosen": 3}, Reason.WRONG_TYPE, "chosen"),
    ({**PAIR, "prompt": ["x"]}, Reason.WRONG_TYPE, "prompt[0]"),
    ({**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, Reason.WRONG_TYPE, "prompt[0].content[0]"),
    ({**PAIR, "prompt": [CALL]}, Reason.WRONG_TYPE, "prompt[0].tool_calls"),
    ({**PAIR, "chosen": {"from": "function_call", "value": "now()"}}, Reason.WRONG_TYPE, "chosen.value"),
    ({**PAIR, "tools": "not json"}, Reason.WRONG_TYPE, "tools"),
    ({**PAIR, "system": "a", "prompt": [{"role": "system", "content": "b"}, *PROMPT]}, Reason.WRONG_TYPE, "system"),
    ({**PAIR, "prompt": " \n"}, Reason.EMPTY_PROMPT, "prompt"),
    ({**PAIR, "prompt": "\n\nHuman:\n\nAssistant:"}, Reason.EMPTY_PROMPT, "prompt"),
    ({**PAIR, "rejected": " \n"}, Reason.EMPTY_RESPONSE, "rejected"),
    ({**PAIR, "rejected": "Because."}, Reason.IDENTICAL_RESPONSES, "chosen, rejected"),
    ({**PAIR, "chosen": [{"role": "user", "content": "Who?"}, *CHOSEN]}, Reason.PROMPTS_DIFFER, "chosen"),
    ({**PAIR, "chosen": join_hh([USER, GOOD])}, Reason.PROMPTS_DIFFER, "chosen"),
    ({**PAIR, "chosen": [{"role": "narrator", "content": "x"}]}, Reason.UNKNOWN_ROLE, "chosen[0].role"),
    ({**PAIR, "chosen": "half \ud83d"}, Reason.NOT_UTF8, "chosen"),
    ({**PAIR, "chosen": [*PROMPT]}, Reason.NO_ASSISTANT_TURN, "chosen"),
    ({**PAIR, "chosen": [*CHOSEN, *PROMPT]}, Reason.NO_ASSISTANT_TURN, "chosen"),
    ({**PAIR, "margin": "much"}, Reason.BAD_SCORES, "margin"),
    ({**PAIR, "probability": 1.5}, Reason.BAD_SCORES, "probability"),
    ({**PAIR, "weight": -1}, Reason.BAD_SCORES, "weight"),
]


@pytest.mark.parametrize(("row", "reason", "field"), REFUSED)
def test_a_refused_pair_names_its_place_reason_and_field(
    tmp_path: Path, row: dict[str, Any], reason: Reason, field: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    groups = load_groups(path)
    assert (groups.rows, len(groups.groups), groups.groups[0].source) == (2, 1, "pairs.jsonl:1")
    (bad,) = groups.bad
    assert (bad.source, bad.reason, bad.field) == ("pairs.jsonl:3", reason, field)
    assert 0 < len(bad.found) <= 80
    assert bad.expected


SCORED = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 2]}
RANKED = {"prompt": "Why?", "responses": ["a", "b"], "ranking": [1, 2]}
OTHER_REFUSED: list[tuple[str, dict[str, Any], Reason, str]] = [
    ("transcripts", {"chosen": join_hh([USER]), "rejected": join_hh([USER, GOOD])}, Reason.NO_ASSISTANT_TURN, "chosen"),
    ("transcripts", {"chosen": join_hh([USER, GOOD]), "rejected": "Why? No."}, Reason.PROMPTS_DIFFER, "rejected"),
    (
        "transcripts",
        {"chosen": join_hh([USER, GOOD]), "rejected": join_hh([POOR, GOOD])},
        Reason.PROMPTS_DIFFER,
        "chosen, rejected",
    ),
    ("transcripts", {"chosen": "yes", "rejected": "no"}, Reason.PROMPTS_DIFFER, "chosen, rejected"),
    ("transcripts", {"chosen": "same text", "rejected": "same text"}, Reason.IDENTICAL_RESPONSES, "chosen, rejected"),
    ("transcripts", {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + CHOSEN}, Reason.IDENTICAL_RESPONSES, "chosen, rejected"),
    ("transcripts", {"chosen": PROMPT + CHOSEN, "rejected": CHOSEN}, Reason.PROMPTS_DIFFER, "chosen, rejected"),
    ("label", {"messages": PROMPT + CHOSEN, "label": "good"}, Reason.BAD_LABEL, "label"),
    ("label", {"messages": PROMPT + CHOSEN, "label": -1}, Reason.BAD_LABEL, "label"),
    ("label", {"messages": PROMPT, "label": True}, Reason.NO_ASSISTANT_TURN, "messages"),
    ("label", {"messages": PROMPT + CHOSEN}, Reason.MISSING_FIELD, "label"),
    ("demonstration", {"messages": []}, Reason.NO_ASSISTANT_TURN, "messages"),
    ("demonstration", {"messages": CHOSEN}, Reason.EMPTY_PROMPT, "prompt"),
    ("demonstration", {"messages": CHOSEN + PROMPT}, Reason.NO_ASSISTANT_TURN, "messages"),
    ("demonstration", {"prompt": "Why?"}, Reason.MISSING_FIELD, "messages"),
    ("scores", {**SCORED, "scores": [1]}, Reason.BAD_SCORES, "scores"),
    ("scores", {**SCORED, "scores": "high"}, Reason.BAD_SCORES, "scores"),
    ("scores", {**SCORED, "scores": [1, float("nan")]}, Reason.BAD_SCORES, "scores[1]"),
    ("scores", {**SCORED, "scores": [1, True]}, Reason.BAD_SCORES, "scores[1]"),
    ("scores", {**SCORED, "responses": ["a"]}, Reason.WRONG_TYPE, "responses"),
    ("scores", {**SCORED, "responses": ["a", ""]}, Reason.EMPTY_RESPONSE, "responses[1]"),
    ("scores", {"prompt": "Why?", "scores": [1, 2]}, Reason.MISSING_FIELD, "responses"),
    ("ranking", {**RANKED, "ranking": [1, 1]}, Reason.TIED_SCORES, "ranking"),
    ("ranking", {**RANKED, "ranking": [0, 1]}, Reason.BAD_SCORES, "ranking"),
    ("ranking", {**RANKED, "ranking": [1.5, 2]}, Reason.BAD_SCORES, "ranking"),
]


@pytest.mark.parametrize(("shape", "row", "reason", "field"), OTHER_REFUSED)
def test_rows_of_other_shapes_are_refused_by_name(shape: str, row: dict[str, Any], reason: Reason, field: str) -> None:
    groups = load_groups([row], shape=shape)
    assert groups.groups == ()
    assert [(bad.source, bad.reason, bad.field) for bad in groups.bad] == [("list:1", reason, field)]


def test_every_reason_is_explained_and_has_a_row_that_triggers_it() -> None:
    assert set(EXPLANATIONS) == set(Reason)
    triggered = {reason for _, reason, _ in REFUSED} | {reason for _, _, reason, _ in OTHER_REFUSED}
    elsewhere = {Reason.NOT_JSON, Reason.NOT_AN_OBJECT, Reason.NO_END_OF_TURN}  # reading and encoding
    assert set(Reason) - triggered == elsewhere


def test_unknown_columns_and_shapes_are_errors() -> None:
    with pytest.raises(DataError, match="their fields: text"):
        load_groups([{"text": "a"}])
    with pytest.raises(DataError, match='no shape "pairs"') as caught:
        load_groups([PAIR], shape="pairs")
    assert 'did you mean "pair"?' in caught.value.todo
    with pytest.raises(DataError, match="none of its 2 rows can be read"):
        load_groups(["a", "b"])
    assert {detect_shape([row]) for row in (PAIR, SCORED, RANKED)} < set(ROW_SHAPES)


def test_the_note_says_what_was_read_and_what_was_not_used() -> None:
    row = {"prompt": [{**PROMPT[0], "id": 3}], "chosen": "a", "rejected": "b", "source": "x", "empty": None}
    notes = load_groups([row]).notes
    assert notes[0] == "1 rows, read as pair (message lists); set data.shape to override"
    assert notes[1] == "fields that are not used: source, id (of messages)"
    assert load_groups([PAIR], shape="pair").notes == ("1 rows, read as pair (strings); as data.shape says",)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared data {name} is not here; set PREFOPT_SHARED")
    return path


def test_defects_of_hh_are_found_and_nothing_else_is_refused() -> None:
    """The 15 rows were looked at one by one: two assistant turns in a row on one side only, empty or equal replies."""
    groups = load_groups(shared("hh-rlhf/helpful-base-test.jsonl.gz"))
    assert groups.notes == ('2354 rows, read as transcripts (HH-style "\\n\\nHuman:" text); set data.shape to override',)
    lines: dict[str, list[int]] = {}
    for bad in groups.bad:
        lines.setdefault(bad.reason, []).append(int(bad.source.rsplit(":", 1)[1]))
    assert lines == {
        "prompts differ": [169, 355, 568, 744, 961, 1012, 1167, 1308, 1451],
        "empty response": [121, 741, 1215, 2064],
        "identical responses": [722, 2169],
    }
    assert len(groups.groups) == 2354 - 15
    assert {group.form for group in groups.groups} == {"hh"}
    assert all(group.prompt[-1].role == "user" for group in groups.groups)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "refused"),
    [
        ("ultrafeedback/train_clean.jsonl", "pair", 1000, {"identical responses": 4, "empty response": 2}),
        ("ultrafeedback/eval_clean.jsonl", "pair", 200, {"identical responses": 1}),
        ("llamafactory-demo/dpo_en_demo.json", "pair", 300, {}),
        ("llamafactory-demo/kto_en_demo.json", "label", 300, {}),
        ("llamafactory-demo/alpaca_en_demo.json", "demonstration", 999, {}),
    ],
)
def test_real_files_are_read_to_the_last_row(name: str, shape: str, rows: int, refused: dict[str, int]) -> None:
    groups = load_groups(shared(name))
    assert (groups.shape, groups.rows, len(groups.groups)) == (shape, rows, rows - sum(refused.values()))
    assert Counter(bad.reason for bad in groups.bad) == refused


def test_a_sharegpt_row_keeps_its_turns() -> None:
    path = shared("llamafactory-demo/dpo_en_demo.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row, group in zip(rows, load_groups(path).groups, strict=True):
        assert [turn.content for turn in group.prompt] == [turn["value"] for turn in row["conversations"]]
        assert [response[0].content for response in group.responses] == [row["chosen"]["value"], row["rejected"]["value"]]


def test_rows_are_not_held_while_they_are_read(tmp_path: Path) -> None:
    """2,000 rows with 10 kB each in a field that nothing uses: at most the first 200 of them lie in memory together."""
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(2000):
            file.write(json.dumps({"prompt": f"{number}", "chosen": "a", "rejected": "b", "other": "x" * 10_000}) + "\n")
    tracemalloc.start()
    groups = load_groups(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(groups.groups) == groups.rows == 2000 and "other" in groups.notes[1]
    assert peak < 6_000_000
