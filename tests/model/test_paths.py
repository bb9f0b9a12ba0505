"""A fast path that does not agree with the plain one on real rows is given up, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.tiny_models import awkward_groups, language_model
from prefopt.model import attention
from prefopt.model.engine import LanguageModel
from prefopt.model.fused import EMBEDDING, MLPS, NORMS
from prefopt.model.paths import confirm, deviation, fast_paths

DIRECT = "direct attention"


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.model.paths.say", lines.append)
        yield lines


def break_mlps(model: LanguageModel, change: Any) -> None:
    """Let the fused MLPs compute `change(result)`, on a model that was found sound before."""
    assert model.sharing
    forwards = model.fused.forwards[MLPS]
    model.fused.forwards[MLPS] = [(module, lambda self, x, of=of: change(of(self, x))) for module, of in forwards]
    model.fused.put_in(MLPS)


def fail(result: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 1.01


def test_sound_paths_stay(said: list[str]) -> None:
    model = language_model()
    confirm(model, awkward_groups())
    assert [path.name for path in fast_paths(model)] == [NORMS, MLPS, EMBEDDING, DIRECT] and said == []


@pytest.mark.parametrize("change", [lambda x: x * 1.01, fail, _WrongBackward.apply], ids=["values", "failure", "gradients"])
def test_what_differs_is_given_up_and_the_others_stay(said: list[str], change: Any) -> None:
    model = language_model()
    with torch.no_grad():
        wanted = model.token_logps(model.batch(awkward_groups()))
    break_mlps(model, change)
    confirm(model, awkward_groups())
    assert [path.name for path in fast_paths(model)] == [NORMS, EMBEDDING, DIRECT]
    assert any(line.startswith(f"llama: {MLPS} ") for line in said)
    with torch.no_grad():
        assert torch.equal(model.token_logps(model.batch(awkward_groups())), wanted)


def test_a_model_of_another_dtype_has_another_tolerance() -> None:
    model = language_model()
    break_mlps(model, lambda x: x * 1.001)
    found = deviation(model, model.batch(awkward_groups()), fast_paths(model))
    assert 0 < found.value < 0.5 and found.gradient > 0
    assert found.within(torch.bfloat16)


def test_attention_falls_back_backend_by_backend(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broken backend first in line, the segments take over."""
    monkeypatch.setattr(attention, "_ORDER", {"cpu": ("flex", "segments")})
    monkeypatch.setattr(attention, "BACKENDS", {**attention.BACKENDS})
    flex = attention.BACKENDS["flex"] = attention.BACKENDS["segments"]
    model = language_model()
    assert model.sharing and "flex attention" in [path.name for path in fast_paths(model)]
    confirm(model, awkward_groups())
    assert model.attention_backend is None and said == []
    attention.BACKENDS["flex"] = flex._replace(attend=lambda *args, **kwargs: 1.1 * flex.attend(*args, **kwargs))
    confirm(model, awkward_groups())
    assert model.attention_backend == "segments" and len(said) == 2
    assert [path.name for path in fast_paths(model)] == [NORMS, MLPS, EMBEDDING]
