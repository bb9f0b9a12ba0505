"""Options three parts deep: set, switched on and off, listed and refused like any other."""

from __future__ import annotations

from typing import Any

import pytest

from prefopt.core.config import LoraConfig
from prefopt.core.errors import ConfigError
from prefopt.core.resolve import option_table, resolve_config, set_option


def lora_of(recipe: dict[str, Any], *words: str) -> LoraConfig | None:
    return resolve_config(recipe, words).model.lora


def test_an_adapter_is_trained_where_it_is_asked_for() -> None:
    assert lora_of({}) is None
    assert lora_of({"model": {"lora": {}}}) == LoraConfig()
    assert lora_of({}, "model.lora={}") == LoraConfig()
    assert lora_of({}, "model.lora.r=8") == LoraConfig(r=8)
    assert lora_of({"model": {"lora": {"r": 4}}}, "model.lora.alpha=9") == LoraConfig(r=4, alpha=9)
    assert lora_of({"model": {"lora": {"r": 4}}}, "model.lora=null") is None
    assert lora_of({"model": {"lora": None}}, "model.lora.r=4") == LoraConfig(r=4)
    assert lora_of({}, "model.lora=null", "model.lora.r=4", "model.lora.save=merged") == LoraConfig(r=4, save="merged")
    assert lora_of({}, "model.lora.targets=[v_proj, q_proj, v_proj]") == LoraConfig(targets=("q_proj", "v_proj"))


def test_the_recipe_stays_as_it_was() -> None:
    recipe = {"model": {"lora": {"r": 4, "targets": ["q_proj"]}}}
    resolve_config(recipe, ["model.lora.r=8", "model.lora.targets=[v_proj]"])
    assert recipe == {"model": {"lora": {"r": 4, "targets": ["q_proj"]}}}


def test_the_saved_configuration_is_a_recipe_of_the_same_adapter() -> None:
    for words in (["model.lora.r=8"], ["model.lora.targets=[b, a]", "model.lora.dropout=0.1"], []):
        config = resolve_config({}, words)
        assert resolve_config(config.resolved()).model == config.model
        assert resolve_config(config.resolved()).resolved() == config.resolved()


@pytest.mark.parametrize(
    ("word", "what", "todo"),
    [
        (
            "model.lora.rr=8",
            'model.lora.rr: there is no option "rr"',
            'did you mean "r"? Known here: alpha, dropout, r, save, targets.',
        ),
        ("model.lora.target=[q]", 'there is no option "target"', 'did you mean "targets"'),
        ("model.lroa.r=8", 'model.lroa: there is no option "lroa"', 'did you mean "lora"'),
        ("model.lora.r=0", "model.lora.r", "Rank"),
        ("model.lora.r=2.5", "model.lora.r", "Rank"),
        ("model.lora.r.x=3", "model.lora.r", "Rank"),
        ("model.lora.alpha=0", "model.lora.alpha", "alpha / r"),
        ("model.lora.dropout=1", "model.lora.dropout", "Dropout"),
        ("model.lora.dropout=-0.1", "model.lora.dropout", "Dropout"),
        ("model.lora.save=both", "model.lora.save: input should be 'adapter' or 'merged', found 'both'", "merged"),
        ("model.lora=true", "model.lora", "null: all weights"),
        (
            "model.lora.targets=q_proj",
            "should be all-linear or a list of module names such as [q_proj, v_proj], found 'q_proj'",
            "ends",
        ),
        ("model.lora.targets=all-liner", "found 'all-liner'", "all-linear"),
        ("model.lora.targets=[]", "model.lora.targets", "all-linear"),
        ("model.lora.targets=[1]", "model.lora.targets", "all-linear"),
        ("model.lora.targets=null", "model.lora.targets", "all-linear"),
    ],
)
def test_what_is_no_adapter_is_named(word: str, what: str, todo: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_config({}, [word], source="mine.yaml")
    assert what in raised.value.what and "(mine.yaml)" in raised.value.what
    assert todo in raised.value.todo


def test_the_table_lists_every_option_of_the_adapter_with_its_default() -> None:
    shown = {key: default for key, default, _ in option_table()}
    assert shown["model.lora"] == "None"
    for key, value in LoraConfig().model_dump().items():
        assert shown[f"model.lora.{key}"] == (repr(value) if isinstance(value, str) else str(value))


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(ConfigError, match=r'model\.lora\.r\.x: "r" is a value, not a section') as raised:
        set_option({"model": {"lora": {"r": 3}}}, ["model", "lora", "r", "x"], 1)
    assert "Sections" in raised.value.todo
