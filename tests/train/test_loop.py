"""The step's laws: what it computes does not depend on how it is computed, and it stops before it goes wrong."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefopt import preparing
from prefopt.core.config import TrainConfig
from prefopt.core.errors import TrainingError
from prefopt.data.encode import TokenGroup
from prefopt.model.reference import Logps
from prefopt.train.gradients import Gradients
from prefopt.train.loop import Training
from prefopt.train.optimizer import learning_rate
from train.tiny_objectives import run
from train.tiny_runs import tiny_config, tiny_training, weights_of, write_rows


def gradients(training: Training) -> dict[str, torch.Tensor]:
    training.accumulate_gradients(training.groups_of(0))
    found = {name: master.grad.clone() for name, master in training.optimizer.masters.items() if master.grad is not None}
    training.optimizer.clear()
    return found


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys() and first
    scale = max(float(value.abs().max()) for value in first.values())
    worst = max(float((value - second[name]).abs().max()) for name, value in first.items())
    assert worst <= tolerance * scale, f"{worst:.3g} of {scale:.3g}"


class Poisoned:
    """A reference whose value for one row is not what it was."""

    def __init__(self, inner: Any, source: str, value: float) -> None:
        self.inner, self.source, self.value = inner, source, value
        self.identity, self.model, self.scope = inner.identity, inner.model, inner.scope

    def of(self, groups: list[TokenGroup]) -> list[Logps]:
        found = self.inner.of(groups)
        return [
            tuple(np.full_like(values, self.value) for values in logps) if group.source == self.source else logps
            for group, logps in zip(groups, found, strict=True)
        ]


def test_one_micro_batch_of_eight_equals_eight_of_one(tmp_path: Path) -> None:
    large = tiny_training(tiny_config(tmp_path, train={"micro_batch_tokens": 4096}))
    small = tiny_training(tiny_config(tmp_path, train={"micro_batch_tokens": 16}))
    assert_close(gradients(large), gradients(small), 1e-5)
    for ours, theirs in zip(run(large), run(small), strict=True):
        assert ours.values.sources == theirs.values.sources
        np.testing.assert_allclose(ours.values.loss, theirs.values.loss, atol=2e-5)
        np.testing.assert_allclose(ours.values.logp, theirs.values.logp, atol=2e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    assert_close(weights_of(large), weights_of(small), 1e-4)


def test_the_groups_of_a_step_do_not_depend_on_packing(tmp_path: Path) -> None:
    large = tiny_training(tiny_config(tmp_path, train={"micro_batch_tokens": 4096}))
    small = tiny_training(tiny_config(tmp_path, train={"micro_batch_tokens": 16}))
    steps = [[group.source for group in large.groups_of(step)] for step in range(5)]
    assert steps == [[group.source for group in small.groups_of(step)] for step in range(5)]
    assert [len(step) for step in steps[:4]] == [8] * 4
    assert len({source for step in steps[:4] for source in step}) == 32


@pytest.mark.parametrize("schedule_epochs", [(1.0, [16, 16, 8]), (1.5, [16, 16, 16, 12])])
def test_an_epoch_sees_every_row_once_and_its_last_step_is_smaller(
    tmp_path: Path, schedule_epochs: tuple[float, list[int]]
) -> None:
    epochs, sizes = schedule_epochs
    training = tiny_training(tiny_config(tmp_path, train={"max_steps": None, "epochs": epochs, "groups_per_step": 16}))
    assert training.total_steps == len(sizes)
    steps = [[group.source for group in training.groups_of(step)] for step in range(len(sizes))]
    assert [len(step) for step in steps] == sizes
    assert sorted([source for step in steps for source in step][:40]) == sorted(group.source for group in training.groups)
    assert run(training)[-1].epoch == pytest.approx(epochs)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_the_first_loss_of_dpo_is_ln_2(tmp_path: Path, beta: float) -> None:
    metrics = run(tiny_training(tiny_config(tmp_path, loss={"beta": beta}, train={"max_steps": 1})))[0].metrics()
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert metrics["drift/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_first_loss_of_ipo_is_its_target_margin_squared(tmp_path: Path, reduce: str) -> None:
    config = tiny_config(tmp_path, loss={"name": "ipo", "beta": 0.2, "reduce": reduce}, train={"max_steps": 1})
    metrics = run(tiny_training(config))[0].metrics()
    assert metrics["loss"] == pytest.approx(1 / (4 * 0.2**2), rel=1e-4)


def test_rewards_and_logps_of_a_step_are_those_of_a_plain_forward(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))
    run(training)
    group = training.groups[0]
    values = training.evaluate([group])
    before = training.reference.of([group])[0]
    for ids, flags, logp, reward, old in zip(
        group.response_ids,
        group.scored,
        values.logp,
        values.reward,
        before,
        strict=True,
    ):
        row = torch.as_tensor(np.concatenate([group.prompt_ids, ids]), dtype=torch.long)
        with torch.no_grad():
            logits = training.policy.model(input_ids=row[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
        each = torch.log_softmax(logits, dim=-1).gather(1, torch.as_tensor(ids, dtype=torch.long)[:, None])[:, 0]
        total = float(each[torch.as_tensor(flags)].sum())
        assert logp == pytest.approx(total, abs=1e-3)
        assert reward == pytest.approx(0.1 * (total - float(old.sum())), abs=1e-3)


def test_activation_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    plain = tiny_training(tiny_config(tmp_path))
    again = tiny_training(tiny_config(tmp_path, train={"activation_checkpointing": True}))
    run(plain)
    run(again)
    assert_close(weights_of(plain), weights_of(again), 1e-6)


def test_a_cached_reference_trains_like_a_live_one(tmp_path: Path) -> None:
    cached = tiny_training(tiny_config(tmp_path))
    live = tiny_training(tiny_config(tmp_path, reference={"kind": "live", "cache_dir": None}))
    ours, theirs = run(cached), run(live)
    assert [step.values.total for step in ours] == pytest.approx([step.values.total for step in theirs], abs=1e-5)
    assert_close(weights_of(cached), weights_of(live), 1e-4)


def test_bf16_masters_keep_updates_below_the_resolution_of_bf16(tmp_path: Path) -> None:
    lr, steps = 1e-6, 4
    config = tiny_config(tmp_path, train={"precision": "bf16", "lr": lr, "schedule": "constant", "warmup_fraction": 0})
    training = tiny_training(config)
    before, rounded = weights_of(training), {k: v.clone() for k, v in training.policy.model.state_dict().items()}
    run(training)
    after = weights_of(training)
    moved = {name: (after[name] - before[name]).abs() for name in before}
    assert all(value.dtype == torch.float32 for value in after.values())
    assert max(float(value.max()) for value in moved.values()) <= 1.5 * lr * steps
    kept = after["model.layers.0.mlp.up_proj.weight"] != before["model.layers.0.mlp.up_proj.weight"]
    assert kept.float().mean() > 0.9
    weight = training.policy.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert (weight == rounded["model.layers.0.mlp.up_proj.weight"]).float().mean() > 0.9
    assert torch.equal(weight, after["model.layers.0.mlp.up_proj.weight"].bfloat16())


def test_bf16_gradients_of_micro_batches_are_added_in_fp32(tmp_path: Path) -> None:
    large = gradients(tiny_training(tiny_config(tmp_path, train={"precision": "bf16", "micro_batch_tokens": 4096})))
    small = gradients(tiny_training(tiny_config(tmp_path, train={"precision": "bf16", "micro_batch_tokens": 16})))
    assert all(value.dtype == torch.float32 for value in small.values())
    assert_close(large, small, 0.05)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "fraction"), [(100, 0.1), (7, 0.0), (10, 1.0), (1, 0.1)])
def test_learning_rates_follow_their_closed_form(schedule: str, total: int, fraction: float) -> None:
    config = TrainConfig(lr=2e-5, schedule=schedule, warmup_fraction=fraction)  # type: ignore[arg-type]
    warmup = round(total * fraction)
    for step in range(total):
        done = (step - warmup) / max(1, total - warmup)
        decay = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]
        expected = 2e-5 * ((step + 1) / warmup if step < warmup else decay)
        assert learning_rate(step, total=total, config=config) == pytest.approx(expected, rel=1e-12)
        assert learning_rate(step, total=total, config=config) > 0


def test_a_non_finite_loss_stops_before_the_update_and_names_its_row(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))
    training.train_step(training.groups_of(0))
    source = training.groups_of(1)[3].source
    training.reference = Poisoned(training.reference, source, math.nan)
    before = weights_of(training)
    with pytest.raises(TrainingError, match=rf"Step 2: the loss is not finite; rows: {source}\. The update was not made"):
        training.train_step(training.groups_of(1))
    assert training.step == 1
    assert all(torch.equal(value, before[name]) for name, value in training.optimizer.masters.items())
    assert all(master.grad is None for master in training.optimizer.masters.values())


def test_a_non_finite_gradient_stops_before_the_update(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path))
    weight = next(iter(training.optimizer.masters.values()))
    weight.register_hook(lambda gradient: gradient * math.nan)
    before = weights_of(training)
    groups = training.groups_of(0)
    with pytest.raises(TrainingError, match=r"gradient norm \(nan\) is not finite") as caught:
        training.train_step(groups)
    assert groups[0].source in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in training.optimizer.masters.items())


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_wrong_reference_is_stopped_before_the_first_update(tmp_path: Path, value: float) -> None:
    training = tiny_training(tiny_config(tmp_path))
    groups = training.groups_of(0)
    source = groups[5].source
    training.reference = Poisoned(training.reference, source, value)
    before = weights_of(training)
    with pytest.raises(TrainingError, match=f"{source}: before the first update the policy differs from its reference"):
        training.train_step(groups)
    assert training.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in training.optimizer.masters.items())


def test_a_tampered_cache_on_disk_is_found_out(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tiny_training(config)
    part = next((tmp_path / "reference").rglob("part-*.npz"))
    with np.load(part) as stored:
        kept = {name: stored[name] for name in stored.files}
    np.savez(part, **{**kept, "values": kept["values"] * 0.5})
    training = tiny_training(config)
    with pytest.raises(TrainingError, match=r"rows\.jsonl:\d+: before the first update"):
        training.train_step(training.groups_of(0))


def test_gradients_are_scaled_down_to_the_norm_and_never_up(tmp_path: Path) -> None:
    free = tiny_training(tiny_config(tmp_path, train={"max_grad_norm": 1e9}))
    free.accumulate_gradients(free.groups_of(0))
    norm = free.optimizer.clip()
    total = math.sqrt(sum(float(master.grad.pow(2).sum()) for master in free.optimizer.masters.values()))  # type: ignore[union-attr]
    assert total == pytest.approx(norm, rel=1e-5)
    bound = norm / 3
    tight = tiny_training(tiny_config(tmp_path, train={"max_grad_norm": bound}))
    tight.accumulate_gradients(tight.groups_of(0))
    assert tight.optimizer.clip() == pytest.approx(norm, rel=1e-4)
    total = math.sqrt(sum(float(master.grad.pow(2).sum()) for master in tight.optimizer.masters.values()))  # type: ignore[union-attr]
    assert total == pytest.approx(bound, rel=1e-4)


def test_weight_decay_is_for_matrices_only(tmp_path: Path) -> None:
    """With gradients of zero AdamW's update is the decay alone: w (1 - lr * decay)."""
    training = tiny_training(tiny_config(tmp_path, train={"weight_decay": 0.5}))
    before = weights_of(training)
    for master in training.optimizer.masters.values():
        master.grad = torch.zeros_like(master)
    training.optimizer.step(0.1)
    for name, master in training.optimizer.masters.items():
        factor = 1 - 0.1 * 0.5 if master.ndim > 1 else 1.0
        torch.testing.assert_close(master.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_identical_rows_count_by_the_step_and_not_by_the_row(tmp_path: Path) -> None:
    """The step's gradient is the mean over its groups: doubling every group changes nothing."""
    once, twice = tiny_training(tiny_config(tmp_path)), tiny_training(tiny_config(tmp_path))
    groups = once.groups_of(0)
    once.accumulate_gradients(groups)
    twice.accumulate_gradients([*groups, *(replace(group, source=f"{group.source} again") for group in groups)])
    assert_close(
        {name: master.grad for name, master in once.optimizer.masters.items()},  # type: ignore[misc]
        {name: master.grad for name, master in twice.optimizer.masters.items()},  # type: ignore[misc]
        1e-5,
    )


class Mark:
    """Something that can be looked at from afar."""


@pytest.mark.parametrize("loss", [{"name": "dpo"}, {"name": "aot"}])
def test_no_graph_outlives_its_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any]) -> None:
    """What a graph consists of is small and lies between the activations: the next one's would find no room of their size."""
    training = tiny_training(tiny_config(tmp_path, loss=loss, train={"micro_batch_tokens": 64, "groups_per_step": 8}))
    measure = Gradients._measure
    graphs: list[Any] = []
    alive: list[int] = []

    def watched(self: Gradients, *given: Any) -> Any:
        alive.append(sum(graph() is not None for graph in graphs))
        seen = measure(self, *given)
        for node in (leaf.grad_fn for leaf in seen.differentiable if leaf.grad_fn is not None):
            node.metadata["mark"] = mark = Mark()  # lives as long as the node does
            graphs.append(weakref.ref(mark))
            del mark
        return seen

    monkeypatch.setattr(Gradients, "_measure", watched)
    training.accumulate_gradients(training.groups_of(0))
    assert len(graphs) >= 3 and set(alive) == {0}


def test_rows_that_share_prompts_are_pointed_out_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of three responses: a step of a prompt's rows computes and counts each response once."""
    said: list[str] = []
    monkeypatch.setattr(preparing, "say", said.append)
    texts = ["It is calm", "It is bad and lost", "It shines"]
    pairs = [(one, other) for one in texts for other in texts if one < other]
    rows = [{"prompt": f"What of {n}?", "chosen": one, "rejected": other} for n in range(4) for one, other in pairs]
    write_rows(tmp_path / "rows.jsonl", rows)
    apart = tiny_training(tiny_config(tmp_path, train={"groups_per_step": 3}))
    assert any("12 rows have 4 prompts: data.by_prompt=true" in line for line in said)
    said.clear()
    together = tiny_training(tiny_config(tmp_path, train={"groups_per_step": 3}, data={"by_prompt": True}))
    assert not any("by_prompt" in line for line in said)
    groups = together.groups_of(1)
    assert len({group.prompt_ids.tobytes() for group in groups}) == 1 < len({one.source for one in groups})
    unique = len(groups[0].prompt_ids) + sum(
        len(ids) for ids in {ids.tobytes(): ids for g in groups for ids in g.response_ids}.values()
    )
    assert together.train_step(groups).tokens == unique < sum(group.unique_tokens for group in groups)
    assert sorted(group.source for step in range(4) for group in apart.groups_of(step)) == sorted(
        group.source for step in range(4) for group in together.groups_of(step)
    )


@pytest.mark.parametrize(("on_overlong", "points_out"), [("truncate", True), ("drop", False)])
def test_responses_that_are_cut_beside_whole_ones_are_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_overlong: str, points_out: bool
) -> None:
    """Which of two responses ends tells them apart without any preference."""
    said: list[str] = []
    monkeypatch.setattr(preparing, "say", said.append)
    rows = [{"prompt": f"What of {n}?", "chosen": "calm " * (4 + 30 * (n % 4 == 0)), "rejected": "lost"} for n in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    tiny_training(tiny_config(tmp_path, data={"max_response_tokens": 30, "on_overlong": on_overlong}))
    assert any("in 2 of 8 rows a response is cut at 30 tokens beside one that ends" in line for line in said) == points_out
