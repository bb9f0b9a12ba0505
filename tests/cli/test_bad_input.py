"""Bad input to the command line: the documented exit code, one short paragraph that says what and what to do, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import prefopt
from cli.refusals import DATA, USAGE, assert_refused, files_below, train
from prefopt.data.refusals import Reason
from train.tiny_runs import preference_rows, write_model, write_rows


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bad-input") / "model")


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def refused_rows() -> dict[str, tuple[str, Any]]:
    """For each reason: the shape that is set, and a row (or a raw line) that is refused for it."""
    good = {"prompt": "What?", "chosen": "This.", "rejected": "That."}
    user = {"role": "user", "content": "What?"}
    answers = [{"role": "assistant", "content": "This."}]
    return {
        Reason.MISSING_FIELD: ("pair", {"prompt": "What?", "chosen": "This."}),
        Reason.WRONG_TYPE: ("pair", {**good, "chosen": 5}),
        Reason.EMPTY_PROMPT: ("pair", {**good, "prompt": "  "}),
        Reason.EMPTY_RESPONSE: ("pair", {**good, "rejected": " \n"}),
        Reason.IDENTICAL_RESPONSES: ("pair", {**good, "rejected": "This."}),
        Reason.PROMPTS_DIFFER: (
            "transcripts",
            {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"},
        ),
        Reason.UNKNOWN_ROLE: ("pair", {**good, "prompt": [{"role": "wizard", "content": "What?"}]}),
        Reason.NOT_UTF8: ("pair", b'{"prompt": "What?", "chosen": "\xff", "rejected": "That."}'),
        Reason.NOT_JSON: ("pair", b'{"prompt": "What?", "chosen": '),
        Reason.NOT_AN_OBJECT: ("pair", b'["What?", "This.", "That."]'),
        Reason.NO_ASSISTANT_TURN: ("pair", {"prompt": [user], "chosen": [*answers, user], "rejected": answers}),
        Reason.BAD_SCORES: ("pair", {**good, "weight": -1}),
    }


@pytest.mark.parametrize("reason", sorted(refused_rows()))
def test_a_row_that_cannot_be_used_is_named_where_bad_rows_are_an_error(folder: Path, model: Path, reason: str) -> None:
    shape, row = refused_rows()[reason]
    lines = [json.dumps(good).encode() for good in preference_rows(3)]
    if shape == "transcripts":
        lines = [b'{"chosen": "\\n\\nHuman: A\\n\\nAssistant: x", "rejected": "\\n\\nHuman: A\\n\\nAssistant: y"}'] * 3
    bad = row if isinstance(row, bytes) else json.dumps(row).encode()
    (folder / "rows.jsonl").write_bytes(b"\n".join([*lines[:2], bad, *lines[2:]]) + b"\n")
    done = train(model, "data.on_bad_row=error", f"data.shape={shape}")
    assert_refused(done, DATA, "1 rows cannot be used", f"rows.jsonl:3: {reason}", "data.on_bad_row=drop")
    assert files_below(folder) == {"rows.jsonl"}


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        (Reason.BAD_LABEL, {"prompt": "What?", "completion": "This.", "label": "maybe"}),
        (Reason.TIED_SCORES, {"prompt": "What?", "responses": ["a", "b"], "ranking": [1, 1]}),
        (Reason.BAD_SCORES, {"prompt": "What?", "responses": ["a", "b"], "scores": [1]}),
    ],
)
def test_rows_of_other_shapes_that_cannot_be_used_are_named(
    folder: Path, model: Path, reason: str, row: dict[str, Any]
) -> None:
    write_rows(folder / "rows.jsonl", [row])
    assert_refused(train(model), DATA, "none of 1 rows can be used", f"rows.jsonl:1: {reason}")
    assert files_below(folder) == {"rows.jsonl"}


CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "wrong key": (["train.learning_rat=1"], ["train.learning_rat", "Known here", "lr"]),
    "nearest key": (["train.max_step=1"], ["train.max_step", 'did you mean "max_steps"?']),
    "wrong section": (["trian.lr=1"], ["trian", 'did you mean "train"?']),
    "wrong type": (["train.lr=fast"], ["train.lr", "'fast'"]),
    "out of range": (["train.lr=-1"], ["train.lr", "-1"]),
    "not a choice": (["train.schedule=staircase"], ["train.schedule", "linear"]),
    "smoothing too large": (["loss.label_smoothing=0.7"], ["loss.label_smoothing", "0.7", "[0.0, 0.5]"]),
    "smoothing of ipo": (["loss.name=ipo", "loss.label_smoothing=0.1"], ["loss.label_smoothing", "ipo", "It belongs to: dpo"]),
    "beta of zero": (["loss.beta=0"], ["loss.beta", "(0.0"]),
    "unknown loss": (["loss.name=dpoo"], ["dpoo", 'did you mean "dpo"?', "prefopt losses"]),
    "two held-out sources": (["data.eval=rows.jsonl", "data.eval_rows=4"], ["data.eval", "data.eval_rows"]),
    "best of nothing": (["train.keep_best=true"], ["train.keep_best", "data.eval_rows=200"]),
    "over the context": (
        ["data.max_prompt_tokens=100", "data.max_response_tokens=100"],
        ["data.max_prompt_tokens=100", "context of 128"],
    ),
    "no rows named": (["data.train=null"], ["data.train", "data.train=FILE"]),
    "no such word": (["--", "faster"], ["faster", "recipe"]),
    "value for a section": (["data=rows.jsonl"], ["data"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_wrong_option_is_refused_before_anything_is_written(folder: Path, model: Path, name: str) -> None:
    words, parts = CONFIG[name]
    done = prefopt("train", *words[1:]) if words[0] == "--" else train(model, *words)
    assert_refused(done, USAGE, *parts)
    assert files_below(folder) == {"rows.jsonl"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["recipe.yaml", "no such recipe"]),
        ("train:\n  lr: [1\n", ["recipe.yaml", "is not YAML"]),
        ("- train\n", ["recipe.yaml", "a recipe is a mapping, found list"]),
        ("train:\n  lrr: 1\n", ["train.lrr", "recipe.yaml", 'did you mean "lr"?']),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(folder: Path, text: str | None, parts: list[str]) -> None:
    if text is not None:
        (folder / "recipe.yaml").write_text(text)
    assert_refused(prefopt("train", "recipe.yaml"), USAGE, *parts)


def test_a_command_without_words_shows_an_example(folder: Path) -> None:
    assert_refused(prefopt("train"), USAGE, "there is no recipe", "prefopt train data.train=rows.jsonl")


def rows_file(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return make


def some_folder(folder: Path) -> str:
    (folder / "rows").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "rows" / "inside.jsonl")
    return "rows"


FILES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "missing": (lambda folder: "rosw.jsonl", ["rosw.jsonl", "there is no such file", 'did you mean "rows.jsonl"?']),
    "missing folder": (lambda folder: "no/where/rows.jsonl", ["there is no folder no/where"]),
    "folder": (some_folder, ["is a folder", "inside.jsonl"]),
    "empty": (rows_file("none.jsonl", b""), ["none.jsonl", "is empty"]),
    "no usable lines": (rows_file("bad.jsonl", b"{\n[\n"), ["bad.jsonl", "none of its 2 rows can be read", "bad.jsonl:1"]),
    "broken list": (rows_file("bad.json", b'[\n {"prompt": "a"},\n {"prompt" "b"}\n]'), ["bad.json", "line 3"]),
    "unknown suffix": (rows_file("rows.docx", b"rows"), [".docx", ".jsonl"]),
    "cut gzip": (rows_file("rows.jsonl.gz", bytes.fromhex("1f8b0800000000000003")), ["rows.jsonl.gz", "gzip"]),
    "no parquet": (rows_file("rows.parquet", b"PAR?" * 9), ["rows.parquet", "Parquet"]),
    "unknown shape": (
        rows_file("odd.jsonl", b'{"question_text": "a", "answer": "b"}\n'),
        ["odd.jsonl", "answer, question_text"],
    ),
    "binary": (rows_file("bin.jsonl", bytes(range(256)) * 4), ["bin.jsonl"]),
}


@pytest.mark.parametrize("verb", ["train", "check"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(folder: Path, model: Path, name: str, verb: str) -> None:
    make, parts = FILES[name]
    given = make(folder)
    before = files_below(folder)
    done = train(model, f"data.train={given}") if verb == "train" else prefopt("check", given, "--model", model)
    assert_refused(done, DATA, *parts)
    assert files_below(folder) == before


def test_a_broken_line_is_dropped_counted_and_named_by_check(folder: Path, model: Path) -> None:
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"prompt": "x", "chosen": \n')
    done = prefopt("check", "rows.jsonl", "--model", model)
    assert done.code == 0
    assert "not JSON" in done.out and "rows.jsonl:41" in done.out


def test_rows_of_another_kind_than_the_loss_learns_from_are_refused(folder: Path, model: Path) -> None:
    write_rows(folder / "rows.jsonl", [{"prompt": "What?", "completion": "This.", "label": True}] * 4)
    assert_refused(
        train(model),
        DATA,
        'rows.jsonl:1: the loss "dpo" learns from pair rows, and this is a label row',
        "Losses for label rows: ",
        "kto",
    )
    assert files_below(folder) == {"rows.jsonl"}


def test_holding_out_every_row_is_refused(folder: Path, model: Path) -> None:
    assert_refused(train(model, "data.eval_rows=40"), DATA, "data.eval_rows=40", "40 usable rows")


def test_rows_that_are_all_over_the_budget_are_refused(folder: Path, model: Path) -> None:
    done = train(model, "data.max_prompt_tokens=4")
    assert_refused(done, DATA, "none of 40 rows can be used", "prompt over the token budget")
    done = train(model, "data.max_response_tokens=2", "data.on_overlong=error")
    assert_refused(done, DATA, "response over the token budget", "data.max_response_tokens")
