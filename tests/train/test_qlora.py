"""An adapter on quantised weights: what is computed, what is saved, and that both are the same."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from model.tiny_models import awkward_groups, causal_model
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, ModelError, TrainingError
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder
from prefopt.model.adapters import add_lora
from prefopt.model.batch import packed_batch, padded_batch
from prefopt.model.engine import LanguageModel
from prefopt.model.footprint import Ledger, forward_backward
from prefopt.model.load import load_model, model_config
from prefopt.model.quantized import dequantized_model, quantized_layers
from prefopt.model.selfcheck import selfcheck
from prefopt.pipeline import train_run
from prefopt.train.plan import fullest_micro_batches, plan_memory
from train.test_plan import groups_of, machine
from train.tiny_runs import stop_after, tiny_config, tiny_tokenizer, tiny_training, weights_of, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]
KINDS = ("nf4", "int8")
LN_2 = 0.6931471805599453
STEPS = 3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config_of(folder: Path, kind: str | None, name: str = "run", *, lora: Any = None, **train: Any) -> RunConfig:
    options = {"output_dir": str(folder / name), "max_steps": STEPS, "save_every_steps": 1, "lr": 3e-2, **train}
    return tiny_config(folder, model={"quantize": kind, "lora": {"r": 4, "alpha": 8, **(lora or {})}}, train=options)


def newest(run: RunFolder) -> Path:
    return run.complete_checkpoints()[-1]


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
    return out


def saved(folder: Path, name: str) -> Path:
    """A tiny model of the architecture `name` in a folder, with a tokenizer."""
    causal_model(name, attention=None).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantised_layers_compute_as_the_plain_model_of_their_weights(tmp_path: Path, name: str, kind: str) -> None:
    """In training and in evaluation, and not as the model before it was quantised."""
    model = load_model(str(saved(tmp_path, name)), precision="fp32", for_training=True, quantize=kind)
    plain = dequantized_model(model.model)
    assert not quantized_layers(plain) and len(quantized_layers(model.model)) == {"llama": 14, "gpt2": 8}[name]
    model.disable_dropout()
    for training in (True, False):
        model.model.train(training)
        ids = torch.arange(5, 45)[None]
        with torch.no_grad():
            torch.testing.assert_close(model.model(input_ids=ids, use_cache=False).logits, logits(plain), atol=1e-4, rtol=1e-4)
    change = float((logits(plain) - logits(causal_model(name, attention=None))).abs().max())
    assert change > {"nf4": 0.1, "int8": 0.005}[kind]
    original = causal_model(name, attention=None).state_dict()
    for key, value in plain.state_dict().items():
        largest = float(original[key].abs().max())
        bound = {"nf4": 0.2, "int8": 0.01}[kind] * largest if key.rpartition(".")[0] in quantized_layers(model.model) else 0
        assert float((value - original[key]).abs().max()) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_model_of_the_same_weights(tmp_path: Path, kind: str) -> None:
    quantised = load_model(str(saved(tmp_path, "llama")), precision="fp32", for_training=True, quantize=kind)
    plain = LanguageModel(
        dequantized_model(quantised.model), None, name="plain", dtype=torch.float32, device=torch.device("cpu")
    )
    found = []
    for model in (quantised, plain):
        add_lora(model, resolve_config({}, ["model.lora.r=3"]).model.lora)  # type: ignore[arg-type]
        weights = {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}
        for name, weight in weights.items():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        packed, padded = (
            torch.autograd.grad(model.token_logps(make(awkward_groups(), model.device)).sum(), list(weights.values()))
            for make in (packed_batch, padded_batch)
        )
        found.append(packed)
        for one, other in zip(packed, padded, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quantised_model_passes_the_selfcheck(tmp_path: Path, kind: str, precision: str) -> None:
    model = load_model(str(write_model(tmp_path / "model")), precision=precision, quantize=kind)
    groups = list(groups_of(tiny_config(tmp_path)))[:3]
    assert model.sharing
    failed = [check for check in selfcheck(model, groups) if not check.passed]
    assert not failed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "none"), ("bf16", "selective"), ("bf16", "full")])
def test_only_the_adapter_moves_and_the_loss_starts_at_ln_2(
    tmp_path: Path, kind: str, precision: str, checkpointing: str
) -> None:
    training = tiny_training(
        config_of(tmp_path, kind, precision=precision, activation_checkpointing=checkpointing),
        policy=load_model(str(write_model(tmp_path / "model")), precision=precision, for_training=True, quantize=kind),
    )
    frozen = {name: value.clone() for name, value in training.policy.model.state_dict().items() if ".lora_" not in name}
    before = weights_of(training)
    first = training.train_step(training.groups_of(0))
    assert first.values.total == pytest.approx(LN_2, abs=1e-6)
    training.run([])
    state = training.policy.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in frozen.items())
    assert all(not torch.equal(value, training.optimizer.masters[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["cached", "adapter-off", "live"])
def test_every_reference_is_the_quantised_base(tmp_path: Path, kind: str, reference: str) -> None:
    values = config_of(tmp_path, kind).resolved()
    values["reference"] = {"kind": reference}
    if reference == "cached":
        values["reference"]["cache_dir"] = str(tmp_path / "cache")
    run = train_run(resolve_config(values))
    assert losses(run)[0] == pytest.approx(LN_2, abs=1e-6)
    assert losses(run)[-1] < LN_2
    if reference == "cached":
        start = next(event for event in run.events() if event["kind"] == "start")
        assert f"-{kind}-float32-cpu" in start["reference"], "part of the key of every entry"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Path, kind: str) -> None:
    unbroken = train_run(config_of(tmp_path, kind, "unbroken", lora={"dropout": 0.1}, precision="bf16"))
    config = config_of(tmp_path, kind, "broken", lora={"dropout": 0.1}, precision="bf16")
    stop_after(1, config)
    run = train_run(config, resume=True)
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert same(load_file(newest(run) / file), load_file(newest(unbroken) / file))
    assert losses(run) == losses(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_computes_what_was_trained(tmp_path: Path, kind: str) -> None:
    """The adapter with its base loaded, the merged checkpoint, and the policy in memory: the same numbers."""
    alone, whole = (train_run(config_of(tmp_path, kind, save, lora={"save": save})) for save in ("adapter", "merged"))
    policy = load_model(str(tmp_path / "model"), precision="fp32", for_training=True, quantize=kind)
    training = tiny_training(config_of(tmp_path, kind, "memory"), policy=policy)
    training.run([])
    wanted = logits(training.policy.model)
    loaded = load_model(str(newest(alone)), precision="fp32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(newest(whole), dtype=torch.float32)
    for model in (loaded.model, merged):
        torch.testing.assert_close(logits(model), wanted, atol=1e-3, rtol=1e-3)
    assert same(loaded.model.state_dict(), merged.state_dict())
    config = json.loads((newest(whole) / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert np.isfinite(logits(peft.PeftModel.from_pretrained(base, newest(alone))).numpy()).all()


def test_another_quantisation_is_not_resumed_and_other_weights_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nf4")
    run = stop_after(1, config)
    for kind in ("int8", None):
        with pytest.raises(TrainingError, match=r"its (reference|lora\.base) was '\w+-nf4"):
            train_run(config_of(tmp_path, kind), resume=True)
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", seed=5)
    with pytest.raises(ModelError, match="trained on other weights"):
        load_model(str(newest(run)), precision="fp32")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    run = train_run(config_of(tmp_path, None, max_steps=1))
    with pytest.raises(ModelError, match="is an adapter"):
        load_model(str(newest(run)), quantize="nf4")
    with pytest.raises(ConfigError, match="the model given is in memory, with weights of full precision"):
        train_run(config_of(tmp_path, "nf4", "other"), model=load_model(str(tmp_path / "model"), for_training=True))
    model = load_model(str(tmp_path / "model"), quantize="nf4")
    model.model.save_pretrained(tmp_path / "packed")
    model.tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match="quantised already"):
        load_model(str(tmp_path / "packed"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_counts_quantised_weights_and_their_products(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = config_of(tmp_path, kind, precision=precision, micro_batch_tokens=400)
    policy = load_model(config.model.name, precision=precision, for_training=True, quantize=kind)
    layers = quantized_layers(policy.model)
    training = tiny_training(config, policy=policy)
    planned = plan_memory(
        config, model_config(config.model.name), training.groups, machine(dtype=dtype), micro_batch_tokens=400
    )
    scales = ("SCB", "weight.absmax", "weight.nested_absmax")
    states = [layer.state_dict() for layer in layers.values()]
    held = sum(value.nbytes for state in states for key, value in state.items() if key in ("weight", *scales))
    assert planned.parts["weights, quantised"] == held
    assert planned.weights == sum(weight.numel() for weight in dequantized_model(policy_alone(config)).parameters())
    fullest = fullest_micro_batches(config, training.groups, 400)
    with Ledger() as ledger:
        for value in training.policy.model.state_dict().values():
            ledger.enter(value)
        before = ledger.live
        for micro_batch in fullest:
            forward_backward(training.policy, training.policy.batch(micro_batch))
    assert planned.parts["passes over the largest micro-batch"] == pytest.approx(ledger.peak - before, rel=0.05, abs=8192)


def policy_alone(config: RunConfig) -> Any:
    return load_model(config.model.name, precision="fp32", quantize=config.model.quantize).model
