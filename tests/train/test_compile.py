"""train.compile: the same run through torch.compile, and the layers' own code where the compiler fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.tiny_models import awkward_groups, causal_model, language_model
from prefopt.core.errors import ModelError
from prefopt.model.compiled import compile_layers, decoder_layers
from prefopt.model.fused import COMPILED, EMBEDDING, MLPS, NORMS
from prefopt.model.paths import confirm, fast_paths
from prefopt.pipeline import train_run
from train.tiny_runs import tiny_config

DIRECT = "direct attention"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    def metrics(**train: Any) -> list[tuple[float, float]]:
        config = tiny_config(tmp_path, train={"max_steps": 3, "output_dir": str(tmp_path / f"run{len(train)}"), **train})
        return [(event["loss"], event["grad_norm"]) for event in train_run(config).events() if event["kind"] == "step"]

    torch.compiler.reset()
    for ours, plain in zip(metrics(compile=True), metrics(), strict=True):
        assert ours == pytest.approx(plain, rel=1e-4)


def test_a_compiler_that_fails_leaves_the_layers_own_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def program(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no C++ compiler was found")

        return program

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    monkeypatch.setattr("prefopt.model.paths.say", said.append)
    model = language_model()
    with torch.no_grad():
        wanted = model.token_logps(model.batch(awkward_groups()))
    compile_layers(model)
    assert [path.name for path in fast_paths(model)] == [EMBEDDING, COMPILED, DIRECT]
    confirm(model, awkward_groups())
    assert "no C++ compiler was found" in said[0]
    assert [path.name for path in fast_paths(model)] == [NORMS, MLPS, EMBEDDING, DIRECT]
    with torch.no_grad():
        assert torch.equal(model.token_logps(model.batch(awkward_groups())), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox", "gemma2"])
def test_the_layers_of_an_architecture(name: str) -> None:
    layers = decoder_layers(causal_model(name))
    assert layers is not None and len(layers) == 2


def test_a_model_without_layers_is_refused() -> None:
    model = language_model()
    model.model.model.layers = torch.nn.ModuleList([*model.model.model.layers, torch.nn.Identity()])
    with pytest.raises(ModelError, match="no list of decoder layers"):
        compile_layers(model)
