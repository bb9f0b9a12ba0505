"""Laws of learning from the policy's own samples: plain gradients, runs that agree however they are cut, stopped or resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt.core.config import RunConfig
from prefopt.core.errors import PrefoptError, TrainingError
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder
from prefopt.data.merge import merged
from prefopt.data.tokens import TokenGroup
from prefopt.model.load import load_model
from prefopt.online import prepare_prompts
from prefopt.pipeline import start_training, train_run
from prefopt.rollout.rounds import read_round, round_path, write_round
from prefopt.train import online
from prefopt.train.online import OnlineTraining
from train.tiny_runs import SUBJECTS, preference_rows, stop_after, write_model, write_rows

pytestmark = pytest.mark.slow


def vowels(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that a tiny model can learn: the share of the letter a."""
    return [text.count("a") / max(1, len(text)) for text in responses]


def online_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """The configuration of a tiny run with rounds; model and prompts are written below `folder`."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        (folder / "prompts.txt").write_text("\n".join(f"What of {subject}?" for subject in SUBJECTS))
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model")},
        "loss": {"name": "ppo"},
        "rollout": {
            "prompts": str(folder / "prompts.txt"),
            "reward": "train.test_online:vowels",
            "rounds": 3,
            "prompts_per_round": 8,
            "samples_per_prompt": 4,
            "max_new_tokens": 8,
        },
        "train": {"output_dir": str(folder / "run"), "groups_per_step": 4, "lr": 1e-3, "precision": "fp32"},
    }
    for name, options in sections.items():
        values.setdefault(name, {}).update(options)
    return resolve_config(values)


def started(config: RunConfig) -> OnlineTraining:
    policy = load_model(config.model.name, precision="fp32", for_training=True)
    rows = prepare_prompts(config, policy.tokenizer, policy.context_tokens)
    training = start_training(config, policy, rows)
    assert isinstance(training, OnlineTraining)
    return training


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    folder = run.complete_checkpoints()[-1]
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_weights(one: RunFolder, other: RunFolder) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def plain_ppo(training: OnlineTraining, groups: list[TokenGroup], head: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """Gradients of PPO as a textbook has it: row by row, transformers' own forward, the loss written out."""
    model = training.policy.model
    parameters = dict(model.named_parameters()) | {f"value_head.{name}": weight for name, weight in head.named_parameters()}
    tokens = sum(len(ids) for group in groups for ids in group.response_ids)
    loss = torch.zeros(())
    with training.policy.fused.plain():
        for group in groups:
            drawn = group.experience
            assert drawn is not None
            for place, ids in enumerate(group.response_ids):
                row = torch.tensor(np.concatenate([group.prompt_ids, ids]).astype(np.int64))[None]
                output = model(input_ids=row, output_hidden_states=True, use_cache=False)
                before = slice(len(group.prompt_ids) - 1, -1)
                logp = torch.log_softmax(output.logits[0, before], dim=-1).gather(1, row[0, len(group.prompt_ids) :, None])[
                    :, 0
                ]
                value = head(output.hidden_states[-1][0, before])[:, 0]
                old, advantage, old_value, target = (
                    torch.from_numpy(part[place])
                    for part in (drawn.old_logps, drawn.advantages, drawn.old_values, drawn.returns)
                )
                ratio = torch.exp(logp - old)
                policy = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.2))
                near = old_value + torch.clamp(value - old_value, -0.2, 0.2)
                error = torch.max((value - target) ** 2, (near - target) ** 2)
                loss = loss + (policy + 0.1 * 0.5 * error).sum() / tokens
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def test_gradients_of_ppo_are_those_of_a_plain_implementation(tmp_path: Path) -> None:
    training = started(online_config(tmp_path, rollout={"epochs_per_round": 2}))
    for step in range(2):  # with the second, ratios and values have moved
        training.train_step(training.groups_of(step))
    groups = training.groups_of(2)
    head = training.policy.value_head
    assert head is not None and float(head.weight.detach().abs().max()) > 0
    wanted = plain_ppo(training, groups, head)
    training.accumulate_gradients(groups)
    for name, master in training.optimizer.masters.items():
        assert master.grad is not None
        assert float((master.grad - wanted[name]).abs().max()) <= 1e-6, name


@pytest.mark.parametrize("loss", ["ppo", "rloo", "grpo"])
def test_micro_batches_do_not_change_a_policy_gradient(tmp_path: Path, loss: str) -> None:
    found = []
    for budget in (16, 4096):
        training = started(online_config(tmp_path, loss={"name": loss}, train={"micro_batch_tokens": budget}))
        values = training.accumulate_gradients(training.groups_of(0))
        gradients = [master.grad for master in training.optimizer.masters.values() if master.grad is not None]
        found.append((values, torch.cat([gradient.flatten() for gradient in gradients])))
        for path in training.folder.glob("*"):
            path.unlink()
    (first, one), (second, other) = found
    assert float((one - other).abs().max()) <= 2e-6 * float(other.abs().max()) + 1e-9
    assert first.total == pytest.approx(second.total, abs=1e-6)
    assert first.statistics == pytest.approx(second.statistics, abs=1e-5)


@pytest.mark.parametrize("loss", ["ppo", "dpo"])
def test_a_run_killed_within_a_round_goes_on_as_the_unbroken_one(tmp_path: Path, loss: str) -> None:
    steps = {"save_every_steps": 1}
    unbroken = train_run(online_config(tmp_path, loss={"name": loss}, train={"output_dir": str(tmp_path / "whole"), **steps}))
    config = online_config(tmp_path, loss={"name": loss}, train={"output_dir": str(tmp_path / "broken"), **steps})
    stop_after(3, config)  # one of two steps of the second round
    broken = train_run(resolve_config(RunFolder(tmp_path / "broken").read("config.json") or {}), resume=True)
    assert same_weights(unbroken, broken)
    ours, theirs = ([event for event in run.events() if event["kind"] == "round"] for run in (unbroken, broken))
    assert [event["objective/scores"] for event in ours] == [event["objective/scores"] for event in theirs]


def test_a_run_killed_while_it_samples_goes_on_as_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"save_every_steps": 2}
    unbroken = train_run(online_config(tmp_path, train={"output_dir": str(tmp_path / "whole"), **steps}))
    config = online_config(tmp_path, train={"output_dir": str(tmp_path / "broken"), **steps})
    make, rounds = online.make_round, []

    def dies(*given: Any, **more: Any) -> Any:
        rounds.append(1)
        if len(rounds) == 3:
            raise RuntimeError("the machine went away")
        return make(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(online, "make_round", dies)
        with pytest.raises(RuntimeError, match="went away"):
            train_run(config)
    assert same_weights(unbroken, train_run(config, resume=True))


def test_a_round_is_read_as_it_was_written(tmp_path: Path) -> None:
    for loss, more in (("ppo", {}), ("dpo", {"pairing": "all-pairs"}), ("plackett_luce", {"pairing": "scores"})):
        training = started(online_config(tmp_path / loss, loss={"name": loss}, rollout=more))
        made = (training.groups_of(0), training._round)[1]
        assert made is not None
        write_round(tmp_path / "round.npz", made)
        again = read_round(tmp_path / "round.npz")
        assert (again.metrics, again.next_kl_coefficient, again.shown) == (made.metrics, made.next_kl_coefficient, made.shown)
        for one, other in zip(made.groups, again.groups, strict=True):
            assert one.feedback == other.feedback and one.finished == other.finished and one.source == other.source
            assert np.array_equal(one.prompt_ids, other.prompt_ids)
            assert all(map(np.array_equal, one.response_ids, other.response_ids))
            assert one.experience is not None and other.experience is not None
            for name in ("old_logps", "reference_logps", "advantages", "old_values", "returns"):
                ours, theirs = getattr(one.experience, name), getattr(other.experience, name)
                assert len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("loss", ["ppo", "rloo", "grpo", "dpo", "sft", "kto"])
def test_each_way_of_learning_raises_the_reward(tmp_path: Path, loss: str) -> None:
    gradients = loss in ("ppo", "rloo", "grpo")
    rollout = {"rounds": 12, "samples_per_prompt": 8} | ({"kl_coefficient": 0.0} if gradients else {})
    train = {"lr": 4e-3, "schedule": "constant"}
    run = train_run(online_config(tmp_path, loss={"name": loss}, rollout=rollout, train=train))
    rewards = [event["objective/scores"] for event in run.events() if event["kind"] == "round"]
    assert len(rewards) == 12, loss
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])


def test_a_reference_of_the_previous_round_starts_each_round_at_zero_nats(tmp_path: Path) -> None:
    for kind, zero in (("live", False), ("tr-dpo", True)):
        config = online_config(
            tmp_path, loss={"name": "dpo"}, reference={"kind": kind}, train={"output_dir": str(tmp_path / kind)}
        )
        drift = [event["objective/kl"] for event in train_run(config).events() if event["kind"] == "round"]
        assert drift[0] == pytest.approx(0, abs=1e-4)
        assert (np.abs(drift[1:]) < 1e-4).all() == zero


def test_replayed_rounds_are_trained_on_again(tmp_path: Path) -> None:
    config = online_config(tmp_path, loss={"name": "dpo"}, rollout={"replay_rounds": 1})
    training = started(config)
    assert training.steps_per_round == 4 and training.total_steps == 12
    first = [group.response_ids[0].tobytes() for step in range(4) for group in training.groups_of(step)]
    training.step = 4
    second = [group.response_ids[0].tobytes() for step in range(4, 8) for group in training.groups_of(step)]
    assert set(first) < set(second)


def test_all_pairs_of_a_round_come_by_prompt_and_a_resumed_run_has_the_same_order(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "loss": {"name": "dpo"},
        "rollout": {"pairing": "all-pairs"},
        "data": {"by_prompt": True},
        "train": {"groups_per_step": 8, "save_every_steps": 1},
    }
    training = started(online_config(tmp_path, **sections))
    steps = [training.groups_of(step) for step in range(training.steps_per_round)]
    prompts = [group.prompt_ids.tobytes() for groups in steps for group in groups]
    changes = sum(one != other for one, other in zip(prompts, prompts[1:], strict=False))
    assert changes == len(set(prompts)) - 1 < len(prompts) - 1
    assert sum(len(merged(groups).groups) for groups in steps) < len(prompts) / 2
    parts = {"train": {**sections["train"], "output_dir": str(tmp_path / "cut")}}
    cut = stop_after(2, online_config(tmp_path, **{**sections, **parts}))
    train_run(online_config(tmp_path, **{**sections, **parts}), resume=True)
    assert same_weights(
        cut,
        train_run(
            online_config(tmp_path, **{**sections, "train": {**sections["train"], "output_dir": str(tmp_path / "whole")}})
        ),
    )


def test_the_price_of_kl_is_carried_from_round_to_round(tmp_path: Path) -> None:
    rollout = {"kl_target": 1e-6, "kl_horizon": 32.0, "kl_coefficient": 0.1, "rounds": 4}
    config = online_config(tmp_path, rollout=rollout, train={"save_every_steps": 2})
    stop_after(4, config)
    prices = [
        event["objective/kl_coefficient"] for event in train_run(config, resume=True).events() if event["kind"] == "round"
    ]
    assert prices[0] == 0.1 and prices[3] == pytest.approx(prices[2] * 1.2) and prices[2] == pytest.approx(prices[1] * 1.2)


def test_a_run_ends_with_a_checkpoint_once_it_is_too_far_from_its_reference(tmp_path: Path) -> None:
    config = online_config(tmp_path, rollout={"rounds": 20, "stop_at_kl": 0.5}, train={"lr": 5e-3, "schedule": "constant"})
    run = train_run(config)
    rounds = [event for event in run.events() if event["kind"] == "round"]
    assert len(rounds) < 20 and rounds[-1]["objective/kl"] > 0.5 and all(e["objective/kl"] <= 0.5 for e in rounds[:-1])
    assert run.complete_checkpoints()[-1].name == f"step-{rounds[-1]['step']:06d}"


def test_samples_that_the_policy_did_not_draw_are_refused(tmp_path: Path) -> None:
    training = started(online_config(tmp_path))
    groups = training.groups_of(0)
    made = training._round
    assert made is not None
    with torch.no_grad():
        training.policy.model.get_output_embeddings().weight.mul_(2)
    with pytest.raises(TrainingError, match="differs from the one that drew"):
        training.train_step(groups)


def test_kto_compares_with_the_reference_under_the_same_other_prompts(tmp_path: Path) -> None:
    """While policy and reference are equal, the KL under other prompts is exactly 0."""
    training = started(online_config(tmp_path, loss={"name": "kto"}))
    groups = training.groups_of(0)
    others = [group.mismatched for group in groups if group.mismatched is not None]
    assert len(others) == len(groups)
    ours, theirs = training.policy.score(others), training.reference.of(others)
    flat = [np.concatenate([part for group in scores for part in group]) for scores in (ours, theirs)]
    assert np.abs(flat[0] - flat[1]).max() <= 1e-5
    assert np.abs(flat[0] - np.concatenate([part for group in training.reference.of(groups) for part in group])).max() > 1e-3


@pytest.mark.parametrize(
    ("loss", "estimator"),
    [
        ({"name": "ppo"}, "gae"),
        ({"name": "rloo"}, "leave_one_out"),
        ({"name": "grpo"}, "group_normalised"),
        ({"sft": 0.1, "rloo": 1.0}, "leave_one_out"),
        ({"sft": 0.1, "grpo": 1.0}, "group_normalised"),
        ({"name": "dpo"}, None),
    ],
    ids=str,
)
def test_the_estimator_is_that_of_the_loss_wherever_it_stands_in_a_mix(
    tmp_path: Path, loss: dict[str, Any], estimator: str | None
) -> None:
    assert started(online_config(tmp_path, loss={"name": None, **loss})).learning.advantages == estimator


def test_one_sample_a_prompt_is_enough_with_a_value_head(tmp_path: Path) -> None:
    run = train_run(online_config(tmp_path, rollout={"samples_per_prompt": 1, "rounds": 2}))
    steps = [event for event in run.events() if event["kind"] == "step"]
    assert len(steps) == 4 and all(np.isfinite(event["loss"]) for event in steps)


def test_online_preferences_are_measured_on_held_out_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "held_out.jsonl", preference_rows(6))
    run = train_run(online_config(tmp_path, loss={"name": "dpo"}, data={"eval": str(rows)}, rollout={"rounds": 2}))
    losses = [event["eval/loss"] for event in run.events() if event["kind"] == "eval"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] != losses[0]


def test_a_missing_end_costs_what_it_is_said_to(tmp_path: Path) -> None:
    plain, priced = (
        started(online_config(tmp_path / str(price), loss={"name": "rloo"}, rollout={"missing_end_penalty": price}))
        for price in (0.0, 2.0)
    )
    for one, other in zip(plain.groups_of(0), priced.groups_of(0), strict=True):
        penalties = np.array(one.feedback.scores) - np.array(other.feedback.scores)
        assert penalties == pytest.approx([0.0 if done else 2.0 for done in one.finished])


def test_a_checkpoint_is_a_plain_model_beside_its_value_head(tmp_path: Path) -> None:
    run = train_run(online_config(tmp_path, rollout={"rounds": 1}))
    folder = run.complete_checkpoints()[-1]
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]
    assert set(load_file(folder / "value_head.safetensors")) == {"value_head.weight", "value_head.bias"}
    assert round_path(run.path / "rollouts", 0).exists()


def test_lora_learns_against_the_policy_without_its_adapter(tmp_path: Path) -> None:
    config = online_config(tmp_path, model={"name": str(tmp_path / "model"), "lora": {"r": 4}}, train={"save_every_steps": 1})
    stop_after(3, config)
    run = train_run(config, resume=True)
    drift = [event["objective/kl"] for event in run.events() if event["kind"] == "round"]
    assert drift[0] == pytest.approx(0, abs=1e-5) and drift[-1] != drift[0]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"temperature": 0.5}}, "samples of the policy itself"),
        ({"rollout": {"pairing": "all-pairs"}}, "does not use it"),
        ({"loss": {"name": "dpo"}, "rollout": {"kl_coefficient": 0.1}}, "does not use it"),
        ({"loss": {"name": "grpo"}, "rollout": {"gae_lambda": 0.9}}, "does not use it"),
        ({"loss": {"name": "dpo"}, "rollout": {"pairing": "scores"}}, "scores rows"),
        ({"loss": {"name": "rloo"}, "rollout": {"samples_per_prompt": 1}}, "compares the samples"),
        ({"loss": {"name": "sft"}, "rollout": {"samples_per_prompt": 1}}, "compares the samples"),
        ({"loss": {"name": None, "rloo": 1.0, "grpo": 1.0}}, "in different ways"),
        ({"loss": {"name": "reward"}}, "trains a reward model"),
        ({"data": {"train": "rows.jsonl"}}, "learns from its own samples"),
        ({"train": {"epochs": 2.0}}, "rollout.rounds"),
        ({"reference": {"kind": "cached"}}, "in each round"),
        ({"data": {"eval": "rows.jsonl"}}, "did not draw"),
        ({"model": {"lora": {"dropout": 0.1}}}, "without dropout"),
        ({"rollout": {"prompts_per_round": 9}}, "has 8 prompts"),
        ({"rollout": {"max_new_tokens": 120}}, "do not fit"),
        ({"rollout": {"reward": "vadr"}}, "vader"),
    ],
)
def test_what_cannot_be_right_is_said_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(online, "make_round", lambda *given, **more: pytest.fail("it sampled"))
    with pytest.raises(PrefoptError, match=said):
        train_run(online_config(tmp_path, **sections))


def test_a_policy_gradient_without_rollouts_is_refused() -> None:
    with pytest.raises(PrefoptError, match="no section rollout"):
        resolve_config({"loss": {"name": "ppo"}, "data": {"train": "rows.jsonl"}})
