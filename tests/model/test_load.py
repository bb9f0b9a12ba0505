"""Loading: what cannot be used is refused with a way out, and what was saved comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tiny_tokenizers import byte_level
from model.tiny_models import awkward_groups, causal_model
from prefopt.core.errors import ModelError, PrefoptError
from prefopt.core.files import write_json
from prefopt.model.load import load_model, load_tokenizer, model_facts, model_folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    causal_model("llama").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


def refused(name: Any) -> PrefoptError:
    with pytest.raises(ModelError) as raised:
        load_model(str(name), precision="fp32")
    assert raised.value.todo
    assert raised.value.exit_code == 4
    assert "\n" not in raised.value.what
    return raised.value


def test_a_saved_model_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    first = load_model(str(folder), precision="fp32")
    assert first.context_tokens == 128 and first.dtype is torch.float32
    first.model.save_pretrained(tmp_path / "again")
    first.tokenizer.save_pretrained(tmp_path / "again")
    second = load_model(str(tmp_path / "again"), precision="fp32")
    assert first.identity == second.identity
    groups = awkward_groups()
    for one, other in zip(first.score(groups), second.score(groups), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert second.tokenizer.chat_template == byte_level().chat_template
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "prefopt" not in json.dumps(saved), "a checkpoint must not ask others for our attention"


def test_weights_are_masters_for_training_and_cast_for_inference(folder: Path) -> None:
    training = load_model(str(folder), precision="bf16", for_training=True)
    inference = load_model(str(folder), precision="bf16")
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert {p.dtype for p in inference.model.parameters()} == {torch.bfloat16}
    buffers = {name: b.dtype for name, b in inference.model.named_buffers() if b.is_floating_point()}
    assert set(buffers.values()) == {torch.float32}, "rotary frequencies in bf16 would move every position"
    assert training.identity == inference.identity, "one name for one file, whatever it is cast to"


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "./absent", "~/absent-model", "a/b/c"):
        assert "does not exist" in refused(name).what


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "is a file" in refused(tmp_path / "model.bin").what


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    error = refused(folder)
    assert "safetensors" in error.what and "safetensors" in error.todo


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder).what


def test_weights_that_are_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded" in refused(folder).what


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder).what


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    """transformers fills what a file lacks with random numbers, and says so only in a log."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder).what


def test_the_head_of_a_tied_model_is_not_missing(tmp_path: Path) -> None:
    model = causal_model("gpt2")
    model.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path), precision="fp32").model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("body", ["", "{", "[1, 2]", '"llama"', '{"model_type": "no-such-model"}', '{"model_type": "vit"}'])
def test_a_configuration_of_no_causal_language_model(folder: Path, body: str) -> None:
    (folder / "config.json").write_text(body)
    assert str(folder) in refused(folder).what


def test_a_folder_with_neither_configuration_nor_tokenizer(tmp_path: Path, folder: Path) -> None:
    assert str(tmp_path) in refused(tmp_path).what
    for path in folder.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refused(folder).what
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_code_that_comes_with_a_model_is_not_run_unless_asked(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "of-their-own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass OwnConfig: ...\nclass OwnModel: ...\n")
    error = refused(folder)
    assert "model.trust_remote_code" in error.todo
    with pytest.raises(ModelError):
        model_facts(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("body", [None, b"", b"GGUF", b"garbage" * 100])
def test_a_gguf_file_that_is_none(tmp_path: Path, body: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if body is not None:
        path.write_bytes(body)
    assert "model.gguf" in refused(path).what


def run_folder(folder: Path, root: Path, steps: tuple[int, ...]) -> Path:
    write_json(root / "config.json", {"model": {"name": str(folder)}, "train": {}})
    for step in steps:
        checkpoint = root / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(folder, checkpoint)
        files = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        write_json(checkpoint / "manifest.json", {"files": files})
    return root


def test_a_run_stands_for_its_newest_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = run_folder(folder, tmp_path / "run", (2, 10, 30))
    (run / "checkpoints" / "step-000030" / "model.safetensors").unlink()
    assert model_folder(str(run)) == str(run / "checkpoints" / "step-000010")
    assert load_model(str(run), precision="fp32").name == str(run)
    assert "no complete checkpoint" in refused(run_folder(folder, tmp_path / "fresh", ())).what


def test_facts_are_those_of_the_model_without_its_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    facts = model_facts(str(folder))
    assert facts.parameters == causal_model("llama").num_parameters()
    assert (facts.context_tokens, facts.hidden, facts.layers, facts.vocabulary) == (128, 32, 2, 61)


def test_a_hub_id_stays_one() -> None:
    assert model_folder("org/model") == "org/model"
