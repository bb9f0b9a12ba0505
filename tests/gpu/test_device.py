"""What this machine's device computes is what it should: every attention backend, the head, selfcheck, training.

The same laws run on a CPU, where only the backends that it has are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.tiny_models import awkward_groups, causal_model, plain_logps
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import GroupSet
from prefopt.model import attention, head
from prefopt.model.attention_request import Request
from prefopt.model.batch import Batch, packed_batch, padded_batch
from prefopt.model.engine import LanguageModel, cast_parameters
from prefopt.model.head import Head
from prefopt.model.paths import confirm, fast_paths
from prefopt.model.precision import pick_device
from prefopt.model.selfcheck import selfcheck
from prefopt.pipeline import Prepared, start_training
from prefopt.train.loop import Training

pytestmark = pytest.mark.slow

DEVICE, CPU = pick_device(), torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
MODELS = ["llama", "qwen3", "gemma2", "gemma3", "gpt-oss", "gpt2"]
SOFT_CAPPED, WITH_SINKS = {"gemma2"}, {"gpt-oss"}
HEAD_SIZE = 8
# Rounding of one path over rounding of another: both are a few steps of bf16.
TIMES = 2.0


def on(device: torch.device, name: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = causal_model(name, attention=None).to(device)
    return LanguageModel(model, None, name=name, dtype=dtype, device=device)


def rounded(name: str) -> Any:
    """The model whose weights are rounded to bf16 and which computes in fp32: the exact numbers of bf16 compute."""
    model = causal_model(name)
    cast_parameters(model, torch.bfloat16)
    return model.float()


def cases(dtype: torch.dtype) -> Iterator[Any]:
    for name in MODELS:
        request = Request(
            DEVICE, dtype, HEAD_SIZE, HEAD_SIZE, softcap=name in SOFT_CAPPED, sinks=name in WITH_SINKS, gradient=True
        )
        for backend, found in attention.BACKENDS.items():
            if found.unsupported(request) is None:
                yield pytest.param(name, backend, id=f"{name}-{backend}")


def gradients(model: Any, logps: Tensor) -> Tensor:
    """The gradient of a sum with both signs, over all weights that have one."""
    signs = 1.0 - 2.0 * (torch.arange(len(logps), device=logps.device) % 3 == 0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad((logps * signs).sum(), weights, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.detach().cpu().double().flatten() for gradient in found])


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().cpu().double() - wanted.detach().cpu().double()).norm() / wanted.detach().double().norm())


def logps_and_gradient(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    logps = model.token_logps(batch)
    return logps.detach().cpu(), gradients(model.model, logps)


@pytest.mark.parametrize(("name", "backend"), list(cases(torch.float32)))
def test_fp32_gives_the_numbers_of_the_plain_forward_on_the_cpu(name: str, backend: str) -> None:
    groups = awkward_groups()
    theirs = causal_model(name)
    wanted = torch.cat(plain_logps(theirs, groups))
    with attention.use_backend(backend):
        found, gradient = logps_and_gradient(on(DEVICE, name), packed_batch(groups, DEVICE))
    assert (found - wanted).abs().max() < 1e-3
    assert distance(gradient, gradients(theirs, wanted)) < 1e-3


@pytest.mark.parametrize(("name", "backend"), list(cases(torch.bfloat16)))
def test_bf16_is_as_near_to_the_exact_numbers_as_the_plain_forward(name: str, backend: str) -> None:
    groups = awkward_groups()
    exact = rounded(name)
    wanted = torch.cat(plain_logps(exact, groups))
    wanted_gradient = gradients(exact, wanted)
    model = on(DEVICE, name, torch.bfloat16)
    cast_parameters(model.model, torch.bfloat16)
    with model.fused.plain():
        plain, plain_gradient = logps_and_gradient(model, padded_batch(groups, DEVICE))
    with attention.use_backend(backend):
        found, gradient = logps_and_gradient(model, packed_batch(groups, DEVICE))
    assert distance(found, wanted) < TIMES * distance(plain, wanted)
    assert distance(gradient, wanted_gradient) < TIMES * distance(plain_gradient, wanted_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_selfcheck_passes_and_no_fast_path_is_given_up(name: str, dtype: torch.dtype) -> None:
    model, groups = on(DEVICE, name, dtype), awkward_groups()
    cast_parameters(model.model, dtype)
    assert model.sharing
    failed = {check.name: check.deviation for check in selfcheck(model, groups) if not check.passed}
    assert not failed
    before = [path.name for path in fast_paths(model)]
    confirm(model, groups[:1])
    assert [path.name for path in fast_paths(model)] == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_is_as_near_to_the_exact_log_probs_as_full_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_LOGITS", {DEVICE.type: 2**14})
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=random) for shape in ((300, 64), (1000, 64)))
    targets = torch.randint(0, 1000, (300,), generator=random)
    inputs = [hidden.to(dtype), (weight / 8).to(dtype)]
    factor = torch.randn(300, generator=random)

    def dense(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        return (hidden_ND @ weight_VD.T).float().log_softmax(-1).gather(1, target_N[:, None])[:, 0]

    def passes(function: Any, device: torch.device, compute: torch.dtype) -> list[Tensor]:
        leaves = [part.to(device, compute).requires_grad_() for part in inputs]
        logps = function(*leaves, targets.to(device))
        return [logps, *torch.autograd.grad(logps, leaves, factor.to(device))]

    exact = passes(dense, CPU, torch.float64)
    plain = passes(dense, DEVICE, dtype)
    ours = passes(lambda hidden_ND, weight_VD, target_N: Head(weight_VD).logps(hidden_ND, target_N), DEVICE, dtype)
    for found, other, wanted in zip(ours, plain, exact, strict=True):
        assert distance(found, wanted) < TIMES * distance(other, wanted) + 1e-6


def training_on(device: torch.device, folder: Path, precision: str, groups: list[TokenGroup], **model: Any) -> Training:
    config = resolve_config(
        {
            "model": {"name": "tiny", **model},
            "reference": {"cache_dir": str(folder / str(device))},
            "train": {
                "groups_per_step": 4,
                "micro_batch_tokens": 64,
                "lr": 1e-3,
                "precision": precision,
                "max_steps": 4,
                "warmup_fraction": 0.0,
            },
        }
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    policy = on(device, "llama", dtype)
    assert policy.sharing
    return start_training(config, policy, Prepared(GroupSet(()), TokenSet(tuple(groups)), TokenSet(()), {}))


def pairs() -> list[TokenGroup]:
    return [group for seed in range(3) for group in awkward_groups(seed) if len(group.response_ids) == 2]


def losses_of(training: Training, groups: list[TokenGroup]) -> list[float]:
    return [training.train_step(groups).metrics()["loss"] for _ in range(4)]


def test_training_in_fp32_gives_the_losses_of_the_cpu(tmp_path: Path) -> None:
    groups = pairs()
    found, wanted = (losses_of(training_on(device, tmp_path, "fp32", groups), groups) for device in (DEVICE, CPU))
    assert wanted[-1] < 0.9 * wanted[0]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("model", [{}, {"lora": {"r": 4}}], ids=["all weights", "lora"])
def test_training_in_bf16_starts_at_ln_2_and_follows_fp32(model: dict[str, Any], tmp_path: Path) -> None:
    groups = pairs()
    found = losses_of(training_on(DEVICE, tmp_path, "bf16", groups, **model), groups)
    wanted = losses_of(training_on(CPU, tmp_path, "fp32", groups, **model), groups)
    assert found[0] == pytest.approx(math.log(2), abs=5e-3)
    assert found == pytest.approx(wanted, abs=0.05)
