"""Stages of a recipe: what each is made of, what placeholders stand for, and what is refused, in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import ConfigError
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.core.stages import Stage, expand_stages, filled, is_staged, merged

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "model": {"name": "base"},
    "data": {"train": "pairs.jsonl", "eval_rows": 7, "seed": 3},
    "loss": {"name": "ipo", "beta": 0.3},
    "train": {"output_dir": "out/all", "lr": 1e-5, "epochs": 2},
    "stages": [
        {"name": "sft", "loss": {"name": "sft"}, "train": {"lr": 2e-5}},
        {"name": "dpo", "model": {"name": "{sft}"}, "loss": {"name": "dpo"}, "data": {"eval_rows": None}},
        {"name": "again", "model": {"name": "{dpo}"}, "reference": {"model": "{sft}"}},
    ],
}


def staged(*partials: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"train": "pairs.jsonl"}, **sections, "stages": list(partials)}


def refusal(recipe: dict[str, Any], *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        expand_stages(recipe, words, source="mine.yaml")
    return str(caught.value)


def by_name(stages: tuple[Stage, ...]) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def test_a_stage_is_the_defaults_with_its_own_keys_over_them() -> None:
    sft, dpo, again = expand_stages(RECIPE)
    assert [stage.name for stage in (sft, dpo, again)] == ["sft", "dpo", "again"]
    assert (
        sft.config.resolved()
        == resolve_config(
            {
                "model": {"name": "base"},
                "data": {"train": "pairs.jsonl", "eval_rows": 7, "seed": 3},
                "loss": {"name": "sft"},
                "train": {"output_dir": "out/all/sft", "lr": 2e-5, "epochs": 2},
            }
        ).resolved()
    )
    assert dpo.config.data.eval_rows == 0, "null takes a default away"
    assert dpo.config.loss.resolved()["beta"] == 0.1, "a loss with a name is a loss of its own"
    assert again.config.loss.resolved()["beta"] == 0.3 and again.config.loss.title == "ipo"


def test_a_placeholder_is_the_run_folder_of_an_earlier_stage() -> None:
    sft, dpo, again = expand_stages(RECIPE)
    assert dpo.config.model.name == str(sft.folder) == "out/all/sft"
    assert (again.config.model.name, again.config.reference.model) == ("out/all/dpo", "out/all/sft")
    assert (sft.uses, dpo.uses, again.uses) == ((), ("sft",), ("dpo", "sft"))


@given(st.text("12{}, -_", max_size=12))
def test_only_names_in_braces_stand_for_something(text: str) -> None:
    kept, uses = filled({"x": text}, {}, [], "")
    assert kept == {"x": text} and uses == ()
    written, uses = filled({"x": "{{a-b}} of {a}"}, {"a": Path("run")}, ["a"], "")
    assert written == {"x": "{a-b} of run"} and uses == ("a",)


def test_the_recipe_is_not_changed() -> None:
    before = repr(RECIPE)
    expand_stages(RECIPE, ["train.lr=1", "stages.dpo.loss.beta=1"])
    assert repr(RECIPE) == before


def test_overrides_go_to_all_stages_or_to_one() -> None:
    words = ["train.max_steps=3", "train.lr=1e-3", "stages.dpo.train.lr=5e-4", "stages.dpo.loss.beta=0.7"]
    sft, dpo, again = expand_stages(RECIPE, words)
    assert [stage.config.train.max_steps for stage in (sft, dpo, again)] == [3, 3, 3]
    assert [stage.config.train.lr for stage in (sft, dpo, again)] == [1e-3, 5e-4, 1e-3]
    assert dpo.config.loss.beta == 0.7
    first = expand_stages(RECIPE, words[::-1])
    assert [stage.config for stage in first] == [sft.config, dpo.config, again.config], "one stage's own come last"


def test_an_override_of_all_stages_leaves_what_names_an_earlier_one() -> None:
    sft, dpo, _ = expand_stages(RECIPE, ["model.name=other"])
    assert (sft.config.model.name, dpo.config.model.name) == ("other", "out/all/sft")
    assert by_name(expand_stages(RECIPE, ["stages.dpo.model.name=third"]))["dpo"].config.model.name == "third"
    assert by_name(expand_stages(RECIPE, ["stages.again.model.name={sft}"]))["again"].config.model.name == "out/all/sft"


def test_the_output_folder_is_the_parent_of_all_stages() -> None:
    assert [str(stage.folder) for stage in expand_stages(RECIPE, ["train.output_dir=new"])] == [
        "new/sft",
        "new/dpo",
        "new/again",
    ]
    assert str(expand_stages(staged({"name": "a"}))[0].folder) == "runs/latest/a"
    for recipe, words in (
        (staged({"name": "a", "train": {"output_dir": "x"}}), []),
        (RECIPE, ["stages.sft.train.output_dir=x"]),
    ):
        assert "train.output_dir of its own" in refusal(recipe, *words)


def test_a_stage_with_rollout_takes_nothing_about_rows_from_the_defaults() -> None:
    rollout = {"prompts": "p.txt", "reward": "length"}
    values = merged(RECIPE, {"rollout": rollout})
    assert values["data"] == {"seed": 3} and values["train"] == {"output_dir": "out/all", "lr": 1e-5}
    assert merged(RECIPE, {"rollout": rollout, "data": {"eval": "e.jsonl"}})["data"] == {"seed": 3, "eval": "e.jsonl"}


def test_the_recipe_of_rlhf_is_the_pipeline_of_the_papers() -> None:
    recipe = read_recipe(ROOT / "recipes" / "rlhf.yaml")
    assert is_staged(recipe)
    sft, reward, ppo = expand_stages(recipe, ["data.train=pairs.jsonl", "model.name=base"])
    assert (sft.config.loss.title, reward.config.loss.title, ppo.config.loss.title) == ("sft", "reward", "ppo")
    assert sft.config.model.name == "base"
    assert reward.config.model.name == ppo.config.model.name == str(sft.folder)
    assert ppo.config.rollout is not None and ppo.config.rollout.reward == f"model:{reward.folder}"
    assert ppo.config.data.train is None and ppo.uses == ("sft", "reward")


WRONG: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"stages": {"sft": {}}}, [], ["stages: is a list of partial recipes", "mine.yaml", "For example"]),
    ({"stages": []}, [], ["stages: is a list"]),
    (staged({"loss": {"name": "sft"}}), [], ["number 1 has no usable name", "None"]),
    (staged({"name": "a/b"}), [], ["number 1 has no usable name, its name is 'a/b'"]),
    (staged({"name": "a"}, {"name": "A"}), [], ['two are called "A"']),
    (
        staged({"name": "a", "model": {"name": "{b}"}}, {"name": "b"}),
        [],
        ["model.name: {b}", "which does not come before it", 'stage "a"'],
    ),
    (
        staged({"name": "a"}, {"name": "b", "model": {"name": "{aa}"}}),
        [],
        ["and there is no such stage", 'did you mean "a"', "{{aa}}"],
    ),
    (staged({"name": "a", "model": {"name": "{a}"}}), [], ["There is no stage before it"]),
    (
        staged({"name": "a"}, {"name": "b", "model": {"name": {"a": None}}}),
        [],
        ["model.name: YAML reads {a} as a mapping", '"{a}"'],
    ),
    (staged({"name": "a", "train": {"lrr": 1}}), [], ['train.lrr: there is no option "lrr"', 'stage "a", mine.yaml']),
    (RECIPE, ["stages.dqo.train.lr=1"], ['did you mean "dpo"', "stages.NAME.key=value"]),
    (RECIPE, ["stages.dpo=1"], ["there is no such stage or no key"]),
    (RECIPE, ["loss.beta=0.2"], ['the loss "sft" has no such option', 'stage "sft"', "stages.sft.loss.beta=..."]),
]


@pytest.mark.parametrize(("recipe", "words", "parts"), WRONG)
def test_what_is_wrong_is_said_with_the_stage(recipe: dict[str, Any], words: list[str], parts: list[str]) -> None:
    said = refusal(recipe, *words)
    for part in parts:
        assert part in said, said


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model() -> None:
    reward, policy = {"name": "rm", "loss": {"name": "reward"}}, {"name": "sft", "loss": {"name": "sft"}}
    assert "which trains a reward model" in refusal(staged(reward, {"name": "b", "model": {"name": "{rm}"}}))
    assert "which trains a reward model" in refusal(staged(reward, {"name": "b", "reference": {"model": "{rm}"}}))
    again = expand_stages(staged(reward, {"name": "more", "loss": {"name": "reward"}, "model": {"name": "{rm}"}}))
    assert again[1].uses == ("rm",)
    online = {"name": "ppo", "loss": {"name": "ppo"}, "rollout": {"prompts": "p.txt", "reward": "model:{sft}"}}
    assert 'the run of stage "sft", which trains no reward model' in refusal(staged(policy, online))
