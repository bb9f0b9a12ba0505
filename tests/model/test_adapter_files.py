"""Adapters on disk: others read them, they load as base and adapter in one, and a base that is not the right one is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data.tiny_tokenizers import byte_level
from model.tiny_models import awkward_groups, causal_model
from prefopt.core.config import LoraConfig
from prefopt.core.errors import ModelError
from prefopt.core.files import write_json
from prefopt.core.progress import set_quiet
from prefopt.model.adapter_files import base_of, is_adapter, read_adapter, write_adapter
from prefopt.model.adapters import add_lora, lora_identity, merged_state
from prefopt.model.engine import LanguageModel, weights_identity
from prefopt.model.load import as_language_model, load_model, load_tokenizer, model_facts

pytestmark = pytest.mark.slow

NAMES = ("llama", "gpt2", "gemma2", "qwen3-moe", "phi3", "opt", "cohere")


def write_base(folder: Path, name: str = "llama", *, seed: int = 0) -> Path:
    causal_model(name, seed=seed).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def trained(base: Path, **options: Any) -> LanguageModel:
    """The model in `base` with an adapter whose B is not 0."""
    model = load_model(str(base), precision="fp32", for_training=True)
    add_lora(model, LoraConfig(**{"r": 3, "alpha": 5, **options}))
    random = torch.Generator().manual_seed(7)
    for name, parameter in model.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return model


def masters_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.model.named_parameters() if value.requires_grad}


def saved(folder: Path, name: str = "llama", **options: Any) -> tuple[LanguageModel, Path]:
    """A trained adapter of a base in `folder`/base, written to `folder`/adapter."""
    model = trained(write_base(folder / "base", name), **options)
    write_adapter(model, masters_of(model), folder / "adapter")
    return model, folder / "adapter"


def logits(model: Any) -> torch.Tensor:
    row = torch.tensor([awkward_groups()[0].prompt_ids.tolist()])
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=row, use_cache=False).logits
    return out


def flat(model: LanguageModel) -> np.ndarray[Any, Any]:
    return np.concatenate([values for group in model.score(awkward_groups()) for values in group])


@pytest.mark.parametrize("name", NAMES)
def test_peft_and_transformers_load_the_folder_with_the_same_logits(tmp_path: Path, name: str) -> None:
    model, folder = saved(tmp_path, name)
    wanted = logits(model.model)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(base) - wanted).abs().max() > 0.1
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for other in (peft.PeftModel.from_pretrained(base, folder), plain):
        torch.testing.assert_close(logits(other), wanted, atol=1e-5, rtol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert (settings["peft_type"], settings["task_type"], settings["inference_mode"]) == ("LORA", "CAUSAL_LM", True)


def test_many_layers_are_named_by_their_ends_and_reach_no_others(tmp_path: Path) -> None:
    """From 20 layers on peft writes the shortest names that reach them."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=61, num_hidden_layers=4, initializer_range=0.25, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_level().save_pretrained(tmp_path / "base")
    names = [f"model.layers.{at}.{part}" for at in range(4) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
    names += [
        f"model.layers.{at}.{part}" for at in range(2) for part in ("mlp.gate_proj", "self_attn.v_proj", "self_attn.o_proj")
    ]
    for number, targets in enumerate(("all-linear", [*names, "layers.3.mlp.gate_proj", "layers.3.self_attn.v_proj"])):
        model, folder = trained(tmp_path / "base", targets=targets), tmp_path / str(number)
        assert model.adapter is not None and len(model.adapter.targets) == (28, 20)[number]
        write_adapter(model, masters_of(model), folder)
        written = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert len(written) < 20
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, folder)
        assert loaded.targeted_module_names == list(model.adapter.targets)
        torch.testing.assert_close(logits(loaded), logits(model.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_folder_loads_as_the_merged_model(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = saved(tmp_path, name)
    assert is_adapter(str(folder)) and not is_adapter(str(tmp_path / "base"))
    set_quiet(False)
    loaded = load_model(str(folder), precision="fp32")
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "LoRA" in line] == [f"{folder}: LoRA adapter merged into {(tmp_path / 'base').resolve()}"]
    state = merged_state(model, masters_of(model))
    merged = loaded.model.state_dict()
    assert merged.keys() == state.keys()
    assert [key for key, value in merged.items() if not torch.equal(value, state[key])] == []
    assert np.abs(flat(loaded) - flat(model)).max() < 2e-4
    assert loaded.identity == weights_identity(loaded.model) != model.identity
    assert loaded.adapter is None
    assert model_facts(str(folder)) == model_facts(str(tmp_path / "base"))


def test_an_adapter_of_peft_itself_loads_too(tmp_path: Path) -> None:
    """With options that training here has not, and without a tokenizer of its own."""
    base = write_base(tmp_path / "base")
    settings = peft.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_model(str(tmp_path / "theirs"), precision="fp32")
    torch.testing.assert_close(logits(loaded.model), logits(theirs), atol=1e-4, rtol=1e-5)
    assert loaded.tokenizer.get_vocab() == load_tokenizer(str(base)).get_vocab()
    byte_level("{{ messages[0].content }}").save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(str(tmp_path / "theirs")).chat_template == "{{ messages[0].content }}"


def test_what_was_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    again = trained(tmp_path / "base")
    back = read_adapter(again, folder)
    masters = masters_of(model)
    assert back.keys() == masters.keys()
    assert all(torch.equal(value, masters[name]) for name, value in back.items())
    stored = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert set(stored) == {f"base_model.model.{name.replace('.default', '')}" for name in masters}


def test_a_relative_base_is_looked_for_here_and_beside_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path)
    rename(folder, "../base")
    assert load_model(str(folder), precision="fp32")
    shutil.rmtree(folder / "nested", ignore_errors=True)
    rename(folder, "base")
    monkeypatch.chdir(tmp_path)
    assert base_of(folder) == ("base", None)


def rename(folder: Path, base: str | None) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as raised:
        load_model(str(folder), precision="fp32")
    assert str(folder) in raised.value.what and raised.value.todo
    assert "\n" not in raised.value.what
    return raised.value


def test_a_base_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    byte_level().save_pretrained(folder)
    base = (tmp_path / "base").resolve()
    base.rename(tmp_path / "moved")
    error = refused(folder)
    assert f'the base of its adapter, "{base}", is not there; looked at {base}' in error.what
    assert "adapter_config.json" in error.todo
    with pytest.raises(ModelError, match="is not there"):
        model_facts(str(folder))
    rename(folder, "models/of/mine")
    assert f"looked at models/of/mine and {folder / 'models/of/mine'}" in refused(folder).what
    rename(folder, str(tmp_path / "moved"))
    assert load_model(str(folder), precision="fp32")


def test_a_base_on_the_hub_keeps_its_name_and_commit(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": "org/model", "revision": "a1b2"})
    assert base_of(folder) == ("org/model", "a1b2")
    model = as_language_model(
        causal_model("llama"), None, name="x", dtype=torch.float32, device=torch.device("cpu"), for_training=True
    )
    model.model.name_or_path, model.model.config._commit_hash = "org/model", "c3d4"
    add_lora(model, LoraConfig(r=2))
    write_adapter(model, masters_of(model), tmp_path / "other")
    assert base_of(tmp_path / "other") == ("org/model", "c3d4")


@pytest.mark.parametrize("base", [None, "", 3])
def test_an_adapter_without_the_name_of_its_base(tmp_path: Path, base: Any) -> None:
    _, folder = saved(tmp_path)
    byte_level().save_pretrained(folder)
    rename(folder, base)
    assert "does not name the model" in refused(folder).what
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refused(folder).what


def test_an_adapter_of_another_model_is_not_merged(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    byte_level().save_pretrained(folder)
    for name in ("gpt2", "opt"):
        rename(folder, str(write_base(tmp_path / name, name)))
        assert "cannot be merged" in refused(folder).what
    rename(folder, str(tmp_path / "base"))
    weights = load_file(folder / "adapter_model.safetensors")
    some = next(name for name in weights if "lora_B" in name)
    save_file({name: value for name, value in weights.items() if name != some}, folder / "adapter_model.safetensors")
    assert some in refused(folder).what
    save_file(
        {**weights, "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": weights[some].clone()},
        folder / "adapter_model.safetensors",
    )
    assert "layers.2" in refused(folder).what
    save_file({**weights, some: weights[some] * float("nan")}, folder / "adapter_model.safetensors")
    assert "NaN" in refused(folder).what
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    assert "cannot be merged" in refused(folder).what
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    assert "pickled weights are not read" in refused(folder).todo


def test_a_base_whose_weights_have_changed_is_refused(tmp_path: Path) -> None:
    """The same folder, trained anew: everything fits, and every number would be another."""
    model, folder = saved(tmp_path)
    byte_level().save_pretrained(folder)
    write_json(folder / "training.json", {"step": 3, "lora": lora_identity(model)})
    assert load_model(str(folder), precision="fp32")
    write_base(tmp_path / "base", seed=1)
    assert "was trained on other weights than" in refused(folder).what


def test_an_adapter_on_a_merged_adapter_has_the_first_folder_as_its_base(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    second = trained(folder, targets=["v_proj"])
    assert second.adapter is not None and second.adapter.base == str(folder.resolve())
    write_adapter(second, masters_of(second), tmp_path / "second")
    loaded = load_model(str(tmp_path / "second"), precision="fp32")
    assert np.abs(flat(loaded) - flat(second)).max() < 2e-4


def test_a_model_that_carries_an_adapter_is_no_base(tmp_path: Path) -> None:
    model = peft.get_peft_model(causal_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for given in (model, model.get_base_model()):
        with pytest.raises(ModelError, match="carries an adapter"):
            as_language_model(given, None, name="x", dtype=torch.float32, device=torch.device("cpu"), for_training=True)
