"""A loss, rows, a model and options that do not go together: refused before any weight is read, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from cli.command_line import Done, prefopt
from cli.refusals import DATA, MODEL, USAGE, assert_refused, files_below, train
from prefopt.core import progress
from prefopt.core.run_folder import RunFolder
from train.rows_of_kinds import Row, demonstrations, labels, pairs, rankings, scores
from train.tiny_reward_runs import write_reward_model
from train.tiny_runs import preference_rows, write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bad-combinations") / "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model's weights fails the test."""

    def loaded(*given: Any, **options: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("prefopt.pipeline.load_model", loaded)
    monkeypatch.setattr("prefopt.pipeline.load_reward_model", loaded)


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "smoothing of simpo": (
        ["loss.name=simpo", "loss.label_smoothing=0.1"],
        ["loss.label_smoothing", "simpo", "It belongs to: dpo", "Options of simpo: beta, gamma."],
    ),
    "knob that is nearly one": (["loss.name=odpo", "loss.scalling=log"], ["loss.scalling", 'did you mean "scaling"?']),
    "order of another divergence": (["loss.divergence_alpha=0.3"], ["loss.divergence_alpha", "Set loss.divergence=alpha"]),
    "shape of another kind": (["data.shape=label"], ["data.shape=label", "Losses for label rows: ", "kto"]),
    "moving and kept": (["reference.kind=tr-dpo", "reference.cache_dir=c"], ["reference.cache_dir", "would be ignored"]),
    "kept and moving": (["reference.kind=cached", "reference.ema_decay=0.9"], ["reference.ema_decay", "reference.kind=ema"]),
    "no reference": (["reference.kind=none"], ["reference.kind=none", "simpo, cpo, orpo"]),
    "a reference too many": (["loss.name=simpo", "reference.kind=live"], ["reference.kind=live", "Remove reference.kind"]),
    "a model too many": (["loss.name=simpo", "reference.model=x"], ["reference.model=x", "Remove reference.model"]),
    "whole distributions": (["loss.name=tdpo", "reference.kind=cached"], ["reference.kind=cached", "reference.kind=live"]),
    "no adapter to switch off": (["reference.kind=adapter-off"], ["reference.kind=adapter-off", "Set model.lora"]),
    "two references": (
        ["model.lora={}", "reference.kind=adapter-off", "reference.model=x"],
        ["reference.model", "adapter-off", "Remove one of them"],
    ),
    "moving with an adapter": (["model.lora={}", "reference.kind=ema"], ["reference.kind=ema", "model.lora=null"]),
    "never moving": (["reference.kind=tr-dpo"], ["every 512 steps", "the run has 2", "reference.sync_every_steps below 2"]),
    "reward with an adapter": (["loss.name=reward", "model.lora={}"], ["model.lora", '"reward"', "Remove model.lora"]),
    "reward of last turns": (["loss.name=reward", "data.train_on=last"], ["data.train_on=last", "Remove data.train_on"]),
    "reward and policy": (["loss.reward=1", "loss.dpo=1"], ['"reward + dpo"', "a run of its own"]),
    "name and mix": (["loss.name=dpo", "loss.sft=0.1"], ["loss.name", '"sft"', "loss: {dpo: 1.0, sft: 0.2}"]),
    "weight of zero": (["loss.dpo=1", "loss.sft=0"], ["loss.sft: 0 is outside (0.0, inf)"]),
    "negative weight": (["loss.dpo=1", "loss.sft=-1"], ["loss.sft: -1 is outside (0.0, inf)"]),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_contradict_each_other(folder: Path, model: Path, name: str) -> None:
    words, parts = OPTIONS[name]
    assert_refused(train(model, *words), USAGE, *parts)
    assert files_below(folder) == {"rows.jsonl"} and not (folder / "run").exists()


def without(rows: list[Row], *columns: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in columns} for row in rows]


def with_one(rows: list[Row], **change: Any) -> list[Row]:
    """The rows, the third of them changed."""
    return [*rows[:2], {**rows[2], **change}, *rows[3:]]


PAIRS = without(pairs(6), "tie")
ONE_PROMPT = [{**row, "prompt": "What?"} for row in labels(6)]
ROWS: dict[str, tuple[list[Row], list[str], list[str]]] = {
    "kto on rankings": (
        rankings(6),
        ["loss.name=kto"],
        [
            'rows.jsonl:1: the loss "kto" learns from label or pair rows, and this is a ranking row',
            "plackett_luce",
            "prefopt label",
        ],
    ),
    "kto on demonstrations": (
        demonstrations(6),
        ["loss.name=kto"],
        ["this is a demonstration row", "Losses for demonstration rows: sft."],
    ),
    "dpo on labels": (labels(6), [], ["this is a label row", "Losses for label rows: ", "kto, bco"]),
    "a mix on what one part takes": (labels(6), ["loss.kto=1", "loss.dpo=1"], ['the loss "kto + dpo" learns from pair rows']),
    "odpo without margins": (
        without(PAIRS, "margin"),
        ["loss.name=odpo"],
        ['rows.jsonl:1: has no margin, and the loss "odpo" needs one in every row (6 of 6 have none)', 'Add a column "margin"'],
    ),
    "odpo with one margin missing": (
        with_one(PAIRS, margin=None),
        ["loss.name=odpo"],
        ["rows.jsonl:3: has no margin", "(1 of 6 have none)"],
    ),
    "odpo with a negative margin": (
        with_one(PAIRS, margin=-0.5),
        ["loss.name=odpo"],
        ["rows.jsonl:3: its margin is -0.5", "must be above 0 (1 of 6 are not)", "loss.scaling=identity"],
    ),
    "soft_dpo without probabilities": (
        without(PAIRS, "probability"),
        ["loss.name=soft_dpo"],
        ["has no probability", '"soft_dpo"', 'Add a column "probability"'],
    ),
    "aot with weights": (
        with_one(PAIRS, weight=2),
        ["loss.name=aot"],
        ["rows.jsonl: its rows have weights from 1 to 2", "Remove the column weight"],
    ),
    "aot_unpaired with weights": (with_one(labels(6), weight=0.5), ["loss.name=aot_unpaired"], ["weights from 0.5 to 1"]),
    "aot_unpaired on one class": (
        labels(6, desirable=1, of=1),
        ["loss.name=aot_unpaired"],
        ["rows.jsonl: all 6 rows are desirable", "kto or bco"],
    ),
    "kto on one prompt": (
        ONE_PROMPT,
        ["loss.name=kto"],
        ["rows.jsonl: all 6 rows have the same prompt", "loss.name=apo_zero_unpaired"],
    ),
    "dpo with a tie": (
        with_one(PAIRS, tie=True),
        ["data.on_bad_row=error"],
        [
            "1 rows cannot be used",
            "rows.jsonl:3: a tie, which dpo cannot learn from",
            "rao_kupper or davidson",
            "data.on_bad_row=drop",
        ],
    ),
    "dpo with nothing but ties": (
        [{**row, "tie": True} for row in PAIRS],
        [],
        ["none of 6 rows can be used", "a tie, which dpo cannot learn from"],
    ),
    "plackett_luce with tied scores": (
        scores(6, tied=True),
        ["loss.name=plackett_luce", "data.on_bad_row=error"],
        ["rows cannot be used", "tied scores", "all_pairs"],
    ),
    "all_pairs with equal scores": (
        with_one(scores(6), responses=["a", "b", "c"], scores=[1, 1, 1]),
        ["loss.name=all_pairs", "data.on_bad_row=error"],
        ["1 rows cannot be used", "rows.jsonl:3: all scores equal"],
    ),
    "sft on what is not desirable": (
        labels(6, desirable=0),
        ["loss.name=sft"],
        ["none of 6 rows can be used", "undesirable row has nothing to imitate"],
    ),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_a_loss_cannot_learn_from(folder: Path, model: Path, name: str) -> None:
    rows, words, parts = ROWS[name]
    write_rows(folder / "rows.jsonl", rows)
    assert_refused(train(model, *words), DATA, *parts)
    assert files_below(folder) == {"rows.jsonl"} and not (folder / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_reference_that_would_never_move_in_a_run_of_epochs(folder: Path, model: Path) -> None:
    """40 rows of 4 a step are 10 steps an epoch."""
    words = ["reference.kind=tr-dpo", "reference.sync_every_steps=20", "train.max_steps=null", "train.epochs=2"]
    assert_refused(train(model, *words), USAGE, "moves the reference every 20 steps", "the run has 20")
    assert files_below(folder) == {"rows.jsonl"} and not (folder / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_held_out_rows_are_named_as_such(folder: Path, model: Path) -> None:
    write_rows(folder / "rows.jsonl", labels(8))
    done = train(model, "loss.name=kto", "data.eval_rows=1")
    assert_refused(done, DATA, "rows.jsonl (held out): all 1 rows have the same prompt")


def test_a_reward_model_is_no_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_model = write_reward_model(folder / "reward")
    before = files_below(folder)

    def loaded(*given: Any, **options: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    done = train(reward_model)
    assert_refused(done, MODEL, f'model.name: "{reward_model}" is a reward model', "a causal language model is needed")
    assert files_below(folder) == before and not (folder / "run").exists()


def trained(done: Done, folder: Path) -> tuple[dict[str, int], int]:
    """(refused rows by reason, groups trained on) of a run that went well."""
    assert done.code == 0, done.err
    run = RunFolder(folder / "run")
    refused = {reason: entry["count"] for reason, entry in (run.read("audit.json") or {})["refused"].items()}
    return refused, next(event["groups"] for event in run.events() if event["kind"] == "start")


@pytest.mark.parametrize(
    ("rows", "words", "refused", "groups"),
    [
        (pairs(9, ties=True), [], {"a tie, which dpo cannot learn from": 3}, 6),
        (pairs(9, ties=True), ["loss.name=rao_kupper"], {}, 9),
        (pairs(9, ties=True), ["loss.davidson=1", "loss.sft=0.1"], {}, 9),
        (pairs(9, ties=True), ["loss.davidson=1", "loss.dpo=1"], {"a tie, which dpo cannot learn from": 3}, 6),
        (pairs(9, ties=True), ["loss.name=sft"], {"tied pair has no better response to imitate": 3}, 6),
        (scores(9, tied=True), ["loss.name=plackett_luce"], {"tied scores": 6}, 3),
        (scores(9, tied=True), ["loss.name=all_pairs"], {}, 9),
        (with_one(PAIRS, tie=True, margin=None), ["loss.name=odpo"], {"a tie, which odpo cannot learn from": 1}, 5),
        (with_one(PAIRS, margin=-0.5), ["loss.name=odpo", "loss.scaling=identity"], {}, 6),
        ([{**row, "weight": 2} for row in PAIRS], ["loss.name=aot"], {}, 6),
        (labels(8), ["loss.kto=1", "loss.sft=0.1"], {}, 8),
    ],
)
def test_rows_that_a_loss_has_no_place_for_are_counted_by_reason(
    folder: Path, model: Path, rows: list[Row], words: list[str], refused: dict[str, int], groups: int
) -> None:
    write_rows(folder / "rows.jsonl", rows)
    assert trained(train(model, "train.max_steps=1", *words), folder) == (refused, groups)


def test_the_reasons_are_said(folder: Path, model: Path) -> None:
    broken = {"prompt": "What?", "chosen": "This.", "rejected": "This."}
    write_rows(folder / "rows.jsonl", [*pairs(9, ties=True), broken])
    progress.set_quiet(False)
    done = train(model, "train.max_steps=1")
    assert "rows.jsonl: 4 of 10 rows refused: 3 for a tie, which dpo cannot learn from, 1 for identical responses" in done.err
    refused, groups = trained(done, folder)
    assert refused == {"a tie, which dpo cannot learn from": 3, "identical responses": 1} and groups == 6


def test_columns_that_a_loss_does_not_look_at_are_said(folder: Path, model: Path) -> None:
    write_rows(folder / "rows.jsonl", without(PAIRS, "probability"))
    progress.set_quiet(False)
    assert "the column margin is not used by dpo; odpo and reward would" in train(model, "train.max_steps=1").err


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_refuses_the_same(folder: Path, model: Path) -> None:
    write_rows(folder / "rows.jsonl", labels(6))
    done = prefopt("train", f"model.name={model}", "data.train=rows.jsonl", "--dry-run")
    assert_refused(done, DATA, "this is a label row", "Losses for label rows: ")
    write_rows(folder / "rows.jsonl", preference_rows(6))
    done = prefopt("train", f"model.name={model}", "data.train=rows.jsonl", "reference.kind=tr-dpo", "--dry-run")
    assert_refused(done, USAGE, "reference.kind=tr-dpo moves the reference every 512 steps")
