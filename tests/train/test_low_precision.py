"""Optimizers of fewer bytes: rounding that is right on average, steps that follow AdamW, and the memory they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.tiny_models import language_model
from prefopt.core.config import TrainConfig
from prefopt.core.errors import ConfigError, TrainingError
from prefopt.core.resolve import resolve_config
from prefopt.pipeline import train_run
from prefopt.train.bf16_optimizer import Bf16Optimizer
from prefopt.train.optimizer import EightBitOptimizer, MasterOptimizer, Optimizer, make_optimizer
from prefopt.train.requirements import check_machine
from prefopt.train.rounding import Noise, pieces, rounded
from train.test_resume import assert_same_run, config_of
from train.tiny_runs import stop_after, tiny_config, tiny_training, weights_of

pytestmark = pytest.mark.slow

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
ALL_BITS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)


def in_all_ways(value: float) -> Tensor:
    """`value` rounded with each of the 65536 draws, as float64."""
    return rounded(torch.full((1 << 16,), value, dtype=torch.float32), ALL_BITS).double()


class TestRounding:
    @given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126)))
    def test_the_mean_over_all_draws_is_the_number_itself(self, value: float) -> None:
        found = in_all_ways(value)
        assert torch.equal(found, found.float().bfloat16().double()), "bf16 holds every result"
        assert float(found.mean()) == value
        assert len(found.unique()) <= 2

    @given(st.floats(width=16, allow_nan=False, allow_infinity=False))
    def test_what_bf16_holds_stays(self, value: float) -> None:
        value = float(torch.tensor(value).bfloat16())
        assert bool((in_all_ways(value) == value).all())

    def test_a_share_of_the_way_is_a_share_of_the_draws(self) -> None:
        step = 2.0**-7  # of bf16 just above 1
        for share in (0, 1 / 65536, 0.25, 0.75, 65535 / 65536):
            assert float((in_all_ways(1 + share * step) == 1 + step).double().mean()) == share

    def test_the_bits_are_uniform_and_a_function_of_their_purpose(self) -> None:
        noise, like = Noise(3, torch.device("cpu")), torch.empty(400, 501)
        noise.begin("update", 1, "weight")
        first = noise.bits(like)
        counts = torch.bincount((first.long() + (1 << 15)).flatten() >> 8, minlength=256).double()
        expected = like.numel() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 350  # chi square, 255 degrees of freedom: 1 in 30,000
        halves = first.flatten()[: 4 * 50100].view(-1, 4).double()
        assert float(torch.corrcoef(halves.T).fill_diagonal_(0).abs().max()) < 0.02
        noise.begin("update", 2, "weight")
        assert not torch.equal(noise.bits(like), first)
        again = Noise(3, torch.device("cpu"))
        again.begin("update", 1, "weight")
        assert torch.equal(again.bits(like), first)

    @pytest.mark.parametrize("shape", [(), (5,), (3, 4), (1, 7), (0, 3)])
    def test_pieces_cover_every_number_once(self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prefopt.train.rounding.PIECE", 4)
        counted = torch.zeros(shape)
        for (part,) in pieces(counted):
            part += 1
        assert bool((counted == 1).all())


class Regression(torch.nn.Module):
    """Weights of about 1, where bf16 has steps of 1/128, that have to move by 0.05."""

    def __init__(self) -> None:
        super().__init__()
        start = 1 + 0.5 * torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
        start = start.bfloat16().float()
        self.weight = torch.nn.Parameter(start.clone())
        self.start, self.goal = start, start + 0.05

    def backward(self, step: int) -> None:
        """Gradient of the mean squared error on inputs of `step`."""
        inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        (inputs @ (self.weight.float() - self.goal).T).pow(2).mean().backward()  # type: ignore[no-untyped-call]

    @property
    def distance(self) -> float:
        """Root mean square distance of the weights from their goal."""
        return float((self.weight.detach().float() - self.goal).pow(2).mean().sqrt())

    @property
    def way(self) -> float:
        return float((self.weight.detach().float() - self.start).mean())


LR, STEPS = 5e-4, 300


def trained(kind: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Regression, Optimizer]:
    model = Regression()
    config = TrainConfig(lr=LR, max_grad_norm=1e9, optimizer=kind)  # type: ignore[arg-type]
    optimizer = make_optimizer(model, config, dtype, seed=seed)
    for step in range(STEPS):
        model.backward(step)
        optimizer.clip()
        optimizer.step(LR)
    return model, optimizer


def trained_to_nearest() -> Regression:
    """PyTorch's AdamW on bf16 weights, as they are."""
    model = Regression().bfloat16()
    adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        model.backward(step)
        adam.step()
        adam.zero_grad()
    return model


def test_bf16_weights_arrive_where_fp32_ones_do_and_rounded_to_nearest_they_stay() -> None:
    whole, _ = trained("adamw", dtype=torch.float32)
    stuck = trained_to_nearest()
    assert whole.way > 0.045 and whole.distance < 0.01
    assert stuck.way == 0 and stuck.distance > 0.049
    for seed in range(2):
        rounded_model, optimizer = trained("adamw_bf16", seed=seed)
        assert isinstance(optimizer, Bf16Optimizer)
        assert rounded_model.weight.dtype == torch.bfloat16
        assert rounded_model.way == pytest.approx(whole.way, rel=0.02)
        assert rounded_model.distance < whole.distance + 1 / 128


def test_the_second_moment_in_bf16_falls_as_the_gradients_do() -> None:
    """Rounded to nearest it would stay: it loses 0.1 % a step, and bf16 resolves 0.4 %."""
    model = Regression()
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw_bf16"), torch.bfloat16)
    assert isinstance(optimizer, Bf16Optimizer)
    name = "weight"
    for step in range(401):
        optimizer.gradients[name].fill_(1.0 if step == 0 else 0.0)
        optimizer.step(0.0)
    mean = float(optimizer.moments[name][1].float().mean())
    assert mean == pytest.approx(1e-3 * 0.999**400, rel=5e-3)


def test_a_step_of_bf16_weights_is_adamws_up_to_one_rounding() -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(20, 30).bfloat16(), torch.nn.Linear(20, 30)
    other.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    config = TrainConfig(lr=0.1, weight_decay=0.1, max_grad_norm=0.5)
    ours = make_optimizer(model, config.model_copy(update={"optimizer": "adamw_bf16"}), torch.bfloat16)
    theirs = make_optimizer(other, config, torch.float32)
    inputs = torch.randn(7, 20).bfloat16()
    model(inputs).float().pow(2).sum().backward()
    for (name, gradient), weight in zip(ours.gradients.items(), theirs.masters.values(), strict=True):  # type: ignore[union-attr]
        assert model.get_parameter(name).grad is None
        weight.grad = gradient.float()
    assert ours.clip() == pytest.approx(theirs.clip(), rel=1e-6)
    ours.step(0.1)
    theirs.step(0.1)
    for mine, exact in zip(ours.masters.values(), theirs.masters.values(), strict=True):
        assert bool(((mine.float() - exact).abs() <= 2**-7 * exact.abs() + 1e-9).all())


def test_the_sum_of_many_small_gradients_is_right_on_average() -> None:
    """Added in bf16 to nearest, 1 + 255 times 1/512 stays 1."""
    model = torch.nn.Linear(4096, 1, bias=False)
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw_bf16"), torch.bfloat16)
    assert isinstance(optimizer, Bf16Optimizer)
    for value in (1.0, *[1 / 512] * 255):
        model.weight.sum().mul(value).backward()
    total = optimizer.gradients["weight"].float()
    assert float(total.mean()) == pytest.approx(1 + 255 / 512, abs=1e-3)
    optimizer.clear()
    assert bool((optimizer.gradients["weight"] == 0).all())


def test_a_single_micro_batch_is_added_exactly(tmp_path: Path) -> None:
    plain = tiny_training(tiny_config(tmp_path, train={"precision": "bf16"}))
    half = tiny_training(tiny_config(tmp_path, train={"precision": "bf16", "optimizer": "adamw_bf16"}))
    for training in (plain, half):
        training.accumulate_gradients(training.groups_of(0))
    assert isinstance(half.optimizer, Bf16Optimizer)
    for name, gradient in half.optimizer.gradients.items():
        wanted = plain.optimizer.masters[name].grad
        assert wanted is not None
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # fp32 masters get these without rounding to bf16
            assert float((gradient.float() - wanted).abs().max()) <= 2**-6 * float(wanted.abs().max())
        else:
            assert torch.equal(gradient.float(), wanted)
    assert half.optimizer.clip() == pytest.approx(plain.optimizer.clip(), rel=1e-3)  # the tables are rounded


@needs_bitsandbytes
def test_moments_in_8_bits_train_as_fp32_ones_do() -> None:
    whole, _ = trained("adamw", dtype=torch.float32)
    model, optimizer = trained("adamw_8bit", dtype=torch.float32)
    assert isinstance(optimizer, EightBitOptimizer)
    assert optimizer.state()["exp_avg.weight"].dtype == torch.uint8
    assert model.way == pytest.approx(whole.way, rel=0.02)
    assert model.distance < 1.5 * whole.distance + 1e-3


@pytest.mark.parametrize(
    ("kind", "each"), [("adamw", 8.0), pytest.param("adamw_8bit", 2.03125, marks=needs_bitsandbytes), ("adamw_bf16", 4.0)]
)
def test_moments_take_the_bytes_that_are_promised(kind: str, each: float) -> None:
    """bitsandbytes: a code a number and an fp32 scale for each 256, of both moments; small tensors stay in fp32."""
    model = torch.nn.Linear(256, 128)
    optimizer = make_optimizer(model, TrainConfig(optimizer=kind), torch.bfloat16)  # type: ignore[arg-type]
    model(torch.ones(1, 256, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(1e-3)
    sizes = {name: value.nbytes for name, value in optimizer.state().items() if name.startswith("exp_avg")}
    assert optimizer.moment_bytes == sum(sizes.values())
    assert sum(size for name, size in sizes.items() if name.endswith(".weight")) == each * 256 * 128
    held = sum(value.nbytes for value in optimizer.masters.values())
    assert held == (2 if kind == "adamw_bf16" else 4) * (256 + 1) * 128


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("adamw_8bit", marks=needs_bitsandbytes), "adamw_bf16"])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"precision": "bf16", "optimizer": kind, "micro_batch_tokens": 64}
    whole = train_run(config_of(tmp_path, "whole", **options))
    config = config_of(tmp_path, "broken", **options)
    stop_after(3, config)
    torch.rand(5)
    assert_same_run(train_run(config, resume=True), whole)


@pytest.mark.slow
def test_a_checkpoint_without_masters_is_a_bf16_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = train_run(config_of(tmp_path, "run", precision="bf16", optimizer="adamw_bf16", max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(run.complete_checkpoints()[-1])
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("was", "now"), [("adamw", "adamw_bf16"), ("adamw_bf16", "adamw")])
def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path, was: str, now: str) -> None:
    config = config_of(tmp_path, "run", precision="bf16", optimizer=was)
    stop_after(1, config)
    with pytest.raises(TrainingError, match=f"its optimizer was '{was}' and is now '{now}'"):
        train_run(config_of(tmp_path, "run", precision="bf16", optimizer=now), resume=True)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("reference", [None, "ema"])
def test_a_reference_follows_bf16_weights(tmp_path: Path, reference: str | None, lora: dict[str, Any] | None) -> None:
    if reference and lora:
        return
    section = {"reference": {"kind": reference, "cache_dir": None, "ema_decay": 0.5}} if reference else {}
    config = tiny_config(tmp_path, train={"precision": "bf16", "optimizer": "adamw_bf16"}, model={"lora": lora}, **section)
    training = tiny_training(config)
    before = weights_of(training)
    training.run([])
    after = weights_of(training)
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_bf16_weights_ask_for_bf16_compute(tmp_path: Path) -> None:
    words = ["train.optimizer=adamw_bf16"]
    model = language_model()
    with pytest.raises(ConfigError, match=r"needs bf16 compute, and this run computes in float32 \(cpu\)"):
        check_machine(resolve_config({}, words), model)
    model.dtype = torch.bfloat16
    check_machine(resolve_config({}, words), model)


@pytest.mark.parametrize("word", ["train.optimizer=adamw_8bit", "model.quantize=nf4"])
def test_a_missing_package_is_named_with_its_extra(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = resolve_config({}, ["model.lora={}", word])
    with pytest.raises(ConfigError, match=f"{word} needs the package bitsandbytes, which is not installed") as raised:
        check_machine(config)
    assert "prefopt[memory]" in str(raised.value.todo)


def test_gradients_of_an_adapter_stay_where_they_are(tmp_path: Path) -> None:
    training = tiny_training(tiny_config(tmp_path, model={"lora": {"r": 4}}))
    assert isinstance(training.optimizer, MasterOptimizer)
    places = {name: master.grad.data_ptr() for name, master in training.optimizer.masters.items()}  # type: ignore[union-attr]
    training.run([])
    assert places == {name: master.grad.data_ptr() for name, master in training.optimizer.masters.items()}  # type: ignore[union-attr]
    assert all(bool((master.grad == 0).all()) for master in training.optimizer.masters.values())  # type: ignore[union-attr]
