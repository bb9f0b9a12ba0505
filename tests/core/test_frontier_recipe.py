"""The section frontier: which runs it stands for, and what is refused, in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import ConfigError
from prefopt.core.frontier_recipe import Asked, FrontierPlan, expand_frontier

EVALUATION = {"prompts": "eval.txt", "reward": "length"}
PPO = {"rollout": {"prompts": "p.txt", "reward": "model:rm", "rounds": 2}}


def recipe(methods: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    return {
        "model": {"name": "base"},
        "data": {"train": "pairs.jsonl", "eval_rows": 5},
        "train": {"max_steps": 8},
        "frontier": {"evaluation": EVALUATION, "methods": {"dpo": {}} if methods is None else methods, **section},
    }


def plan(given: dict[str, Any], *words: str, **asked: Any) -> FrontierPlan:
    return expand_frontier(given, words, output=Path("out"), asked=Asked(**asked), source="mine.yaml")


def refusal(given: dict[str, Any], *words: str, **asked: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(given, *words, **asked)
    return str(caught.value)


def test_a_run_for_each_method_beta_and_seed() -> None:
    found = plan(recipe({"dpo": {}, "ipo": {}}), betas=[0.1, 0.5], seeds=[0, 1])
    assert [job.label for job in found.jobs] == [
        f"{method}-{beta}-seed{seed}" for method in ("dpo", "ipo") for beta in ("0.1", "0.5") for seed in (0, 1)
    ]
    for job in found.jobs:
        assert (job.config.loss.title, job.config.loss.beta) == (job.method, job.beta)
        assert job.config.data.seed == job.seed and job.config.data.train == "pairs.jsonl"
        assert Path(job.config.train.output_dir) == Path("out/runs") / job.label
    assert found.reference == "base" and found.best_of_n is None


def test_methods_without_a_beta_run_once_a_seed() -> None:
    jobs = plan(recipe({"sft": {}, "unlikelihood": {}, "dpo": {}}), betas=[0.1, 0.5], seeds=[0, 1]).jobs
    assert [job.label for job in jobs][:4] == ["sft-seed0", "sft-seed1", "unlikelihood-seed0", "unlikelihood-seed1"]
    assert len(jobs) == 8


def test_the_beta_of_a_policy_gradient_is_its_price_of_kl() -> None:
    jobs = plan(recipe({"ppo": PPO}), betas=[0.02, 0.3]).jobs
    assert [job.config.rollout.kl_coefficient for job in jobs if job.config.rollout] == [0.02, 0.3]
    assert jobs[0].config.data.train is None, "what belongs to rows is not taken from the defaults"


def test_ground_truth_ppo_is_ppo_with_the_true_reward() -> None:
    (job,) = plan(recipe({"ppo": PPO}), methods=["ppo-gt"]).jobs
    assert job.config.loss.title == "ppo" and job.config.rollout is not None
    assert (job.config.rollout.reward, job.config.rollout.rounds) == ("length", 2)


def test_the_beta_can_be_another_option_and_betas_can_be_the_methods_own() -> None:
    section = {"beta_key": {"unlikelihood": "loss.alpha", "dpo": None}, "betas": {"unlikelihood": [0.5, 1.0]}}
    jobs = plan(recipe({"unlikelihood": {}, "dpo": {}, "ipo": {}}, **section)).jobs
    assert [job.label for job in jobs] == ["unlikelihood-0.5-seed0", "unlikelihood-1-seed0", "dpo-seed0", "ipo-0.1-seed0"]
    assert [part.knobs["alpha"] for job in jobs[:2] for part in job.config.loss.parts] == [0.5, 1.0]


def test_a_method_of_your_own_is_a_partial_recipe() -> None:
    found = plan(recipe({"mixed": {"loss": {"dpo": 1.0, "sft": 0.1}, "train": {"lr": 1e-4}}}), betas=[0.2])
    assert found.jobs[0].config.loss.title == "dpo + sft" and found.jobs[0].config.loss.beta == 0.2
    assert found.jobs[0].config.train.lr == 1e-4


def test_best_of_n_is_no_run() -> None:
    found = plan(recipe({"best-of-n": {"n": 8, "reward": "vader"}, "dpo": {}}))
    assert found.best_of_n is not None and (found.best_of_n.n, found.best_of_n.reward) == (8, "vader")
    assert [job.method for job in found.jobs] == ["dpo"]
    assert plan(recipe(), methods=["best-of-n"]).jobs == ()


def test_words_reach_the_section_one_method_or_all() -> None:
    words = ["train.lr=1e-4", "frontier.methods.ipo.train.lr=1e-3", "frontier.evaluation.samples_per_prompt=9"]
    found = plan(recipe({"dpo": {}, "ipo": {"train": {"lr": 5e-5}}}), *words)
    assert found.evaluation.samples_per_prompt == 9
    assert [job.config.train.lr for job in found.jobs] == [1e-4, 1e-4], "what is said of all goes over what one says"
    assert plan(recipe(), "frontier.checkpoints=2").checkpoints == 2
    assert plan(recipe(), "frontier.checkpoints=2", checkpoints=7).checkpoints == 7


def test_policies_are_judged_in_the_precision_of_the_runs_or_in_their_own() -> None:
    assert plan(recipe()).evaluation.precision == "auto"
    assert plan(recipe(), "train.precision=fp32").evaluation.precision == "fp32"
    words = ["train.precision=fp32", "frontier.evaluation.precision=bf16"]
    assert plan(recipe(), *words).evaluation.precision == "bf16"
    assert "frontier.evaluation.precision" in refusal(recipe(), "frontier.evaluation.precision=fp16")


def test_stages_come_first_and_methods_name_their_runs() -> None:
    given = recipe(
        {"dpo": {}, "ppo": {"rollout": {"prompts": "p.txt", "reward": "model:{rm}"}}, "best-of-n": {"reward": "model:{rm}"}}
    )
    given["stages"] = [
        {"name": "sft", "loss": {"name": "sft"}},
        {"name": "rm", "model": {"name": "{sft}"}, "loss": {"name": "reward"}},
    ]
    given["frontier"]["defaults"] = {"model": {"name": "{sft}"}, "train": {"lr": 3e-5}}
    found = plan(given, "stages.sft.train.max_steps=3", "model.name=other")
    assert [str(stage.folder) for stage in found.stages] == ["out/stages/sft", "out/stages/rm"]
    assert (found.stages[0].config.model.name, found.stages[0].config.train.max_steps) == ("other", 3)
    assert found.reference == found.jobs[0].config.model.name == "out/stages/sft"
    assert found.stages[0].config.train.lr != 3e-5 == found.jobs[0].config.train.lr
    assert found.jobs[1].uses == ("sft", "rm") and found.best_of_n is not None
    assert found.best_of_n.reward == "model:out/stages/rm"


def test_a_method_does_not_start_from_a_reward_model() -> None:
    given = recipe({"dpo": {"model": {"name": "{rm}"}}})
    given["stages"] = [{"name": "rm", "loss": {"name": "reward"}}]
    assert 'method "dpo": model.name is the run of stage "rm", which trains a reward model' in refusal(given)


WRONG: list[tuple[dict[str, Any], list[str], dict[str, Any], list[str]]] = [
    (recipe({"dpoo": {}}), [], {}, ['"dpoo" is neither a loss', 'did you mean "dpo"', "mine.yaml"]),
    (recipe({}), [], {}, ["there are no methods", "--methods"]),
    ({"model": {"name": "base"}}, [], {}, ["frontier.evaluation: field required", "evaluation: {prompts: FILE"]),
    (
        recipe(evaluation={"prompts": "p", "reward": "r", "sample": 3}),
        [],
        {},
        ["frontier.evaluation.sample: there is no such option"],
    ),
    (recipe(betas=[-1]), [], {}, ["frontier.betas"]),
    (recipe({"best-of-n": {"n": 1}}), [], {}, ["frontier.methods.best-of-n.n"]),
    (recipe({"dpo": {"loss": {"bta": 1}}}), [], {}, ['the loss "dpo" has no such option', 'method "dpo"']),
    (recipe(), ["train.output_dir=x"], {}, ["train.output_dir is set", "--output"]),
    (recipe(), ["stages.a.train.lr=1"], {}, ["stages.a.train.lr", "there is no such stage"]),
    (recipe({"dpo": {"model": {"name": "{sft}"}}}), [], {}, ["{sft} stands for the run of a stage"]),
    (recipe({"ppo": {}}), [], {}, ['method "ppo"', "rollout"]),
]


@pytest.mark.parametrize(("given", "words", "asked", "parts"), WRONG)
def test_what_is_wrong_is_said(given: dict[str, Any], words: list[str], asked: dict[str, Any], parts: list[str]) -> None:
    said = refusal(given, *words, **asked)
    for part in parts:
        assert part in said, said
