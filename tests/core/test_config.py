"""Configuration: what is wrong is named with the nearest right thing, and nothing is ever ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError
from prefopt.core.resolve import option_table, parse_override, read_recipe, resolve_config


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("train.learning=1", 'train.learning: there is no option "learning"'),
        ("train.schedul=linear", 'did you mean "schedule"'),
        ("trian.lr=1", 'did you mean "train"'),
        ("data.on_bad_rows=drop", 'did you mean "on_bad_row"'),
        ("loss.betta=0.1", 'did you mean "beta"'),
        ("loss.name=dpoo", 'did you mean "dpo"'),
        ("loss.reduce=sum", "belongs to: ipo"),
        ("train.lr=fast", "train.lr"),
        ("train.lr=-1", "Peak learning rate"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.groups_per_step=0", "train.groups_per_step"),
        ("train.groups_per_step=1.5", "train.groups_per_step"),
        ("train.sinks=[mlflow]", "train.sinks"),
        ("data.on_overlong=cut", "data.on_overlong"),
        ("train.warmup_fraction=1.1", "train.warmup_fraction"),
        ("loss.beta=0", "loss.beta"),
        ("train.adam_betas=[0.9, 1.0]", "train.adam_betas"),
        ("train.adam_betas=[0.9]", "train.adam_betas"),
        ("train=3", "train"),
        ("train.lr.peak=3", "train.lr"),
    ],
)
def test_what_cannot_be_run_is_named(word: str, match: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_config({"train": {"lr": 1e-5}}, [word], source="mine.yaml")
    assert match in str(raised.value)
    assert raised.value.exit_code == 2


def test_the_recipe_is_named_in_the_error() -> None:
    for values in ({"train": {"lrr": 1}}, {"loss": {"beta": -1}}, {"train": {"keep_best": True}}):
        with pytest.raises(ConfigError, match=r"\(mine\.yaml\)"):
            resolve_config(values, source="mine.yaml")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.eval=x.jsonl", "data.eval_rows=5"], "both set"),
        (["train.keep_best=true"], "train.keep_best"),
        (["train.eval_every_steps=5"], "train.eval_every_steps"),
    ],
)
def test_combinations_that_contradict_each_other_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as raised:
        resolve_config({}, words)
    assert raised.value.todo


@pytest.mark.parametrize("held_out", ["data.eval=x.jsonl", "data.eval_rows=5"])
def test_the_same_options_are_fine_with_held_out_rows(held_out: str) -> None:
    config = resolve_config({}, [held_out, "train.keep_best=true", "train.eval_every_steps=5"])
    assert config.train.keep_best and config.train.eval_every_steps == 5


def test_defaults_then_recipe_then_words() -> None:
    recipe = {"train": {"lr": 3e-6, "keep_last": 4}, "loss": {"beta": 0.2}}
    config = resolve_config(recipe, ["train.lr=5e-6", "loss.label_smoothing=0.1", "train.lr=7e-6"])
    assert (config.train.lr, config.train.keep_last, config.train.epochs) == (7e-6, 4, RunConfig().train.epochs)
    part = config.loss.parts[0]
    assert (part.name, part.knobs["beta"], part.knobs["label_smoothing"]) == ("dpo", 0.2, 0.1)
    assert recipe == {"train": {"lr": 3e-6, "keep_last": 4}, "loss": {"beta": 0.2}}, "the recipe itself stays as it was"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.lr=1e-6", 1e-6),
        ("train.lr=1E-6", 1e-6),
        ("train.lr=0.5", 0.5),
        ("data.train=a=b.jsonl", "a=b.jsonl"),
        ("data.train=", ""),
        ("data.eval=null", None),
        ("train.keep_best=true", True),
        ("train.adam_betas=[0.9, 0.95]", [0.9, 0.95]),
        ("data.template={{x}}.jinja", "{{x}}.jinja"),
    ],
)
def test_words_are_read_as_they_are_meant(word: str, value: object) -> None:
    assert parse_override(word)[1] == value


@pytest.mark.parametrize("word", ["train.lr", "=3", "--train.lr"])
def test_a_word_without_key_and_value_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_override(word)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train:\n  lr: 1e-6\n  adam_eps: 1e-8\nloss:\n  beta: 5e-2\n")
    config = resolve_config(read_recipe(path))
    assert (config.train.lr, config.train.adam_eps, config.loss.beta) == (1e-6, 1e-8, 0.05)


def test_the_saved_configuration_is_a_recipe_of_the_same_run(tmp_path: Path) -> None:
    config = resolve_config({}, ["loss.name=ipo", "loss.beta=0.3", "data.eval_rows=7", "train.adam_betas=[0.8, 0.9]"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.resolved(), indent=2))
    again = resolve_config(read_recipe(path))
    assert again.resolved() == config.resolved()
    saved = config.resolved()["loss"]
    assert {key: saved[key] for key in ("name", "beta", "reduce")} == {"name": "ipo", "beta": 0.3, "reduce": "mean"}


@pytest.mark.parametrize("body", [b"- 1\n", b"", b"a: [", b"\xff\xfe\x00", b"text"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(body)
    for where in (path, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=where.name):
            read_recipe(where)


def test_a_configuration_cannot_be_changed() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.loss.name = "ipo"


def test_every_option_is_documented_and_its_default_is_the_one_shown() -> None:
    rows = option_table()
    assert all(about for _, _, about in rows)
    shown = {key: default for key, default, _ in rows}
    for section, values in RunConfig().model_dump().items():
        if values is None:
            assert shown[section] == "None"
            continue
        for key, value in values.items():
            assert shown[f"{section}.{key}"] == (repr(value) if isinstance(value, str) else str(value))
