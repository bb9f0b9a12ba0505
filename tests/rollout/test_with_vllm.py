"""vLLM is called with what its documentation asks for, and its answers become rows; a stand-in answers here."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import prefopt.rollout.with_vllm as module
from cli.command_line import prefopt
from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.rollout.with_vllm import chosen_engine, sample_with_vllm
from tiny_word_model import language_model

PROMPTS = ["a b", "c d e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = language_model()
    model.model.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


class StandIn(ModuleType):
    """Answers response k of every prompt with k + 1 words and the end of turn, and the last one without it, out of order."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        self.loaded: list[dict[str, Any]] = []
        self.asked: list[tuple[list[Any], list[Any]]] = []

    def SamplingParams(self, **settings: Any) -> Any:
        return SimpleNamespace(**settings)

    def TokensPrompt(self, *, prompt_token_ids: list[int]) -> Any:
        return {"prompt_token_ids": prompt_token_ids}

    def LLM(self, **settings: Any) -> Any:
        self.loaded.append(settings)
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts: list[Any], settings: list[Any]) -> list[Any]:
        self.asked.append((prompts, settings))
        answers = []
        for one in settings:
            ids = [[2 + k] * (k + 1) + ([1] if k < one.n - 1 else []) for k in range(one.n)]
            outputs = [SimpleNamespace(index=k, token_ids=tuple(tokens)) for k, tokens in enumerate(ids)]
            answers.append(SimpleNamespace(outputs=outputs[::-1]))
        return answers


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return stand_in


def test_prompts_settings_and_answers_are_passed_on(vllm: StandIn, folder: Path) -> None:
    rows = sample_with_vllm(str(folder), PROMPTS, n=3, top_p=0.9, temperature=0.7, max_new_tokens=5, seed=4, precision="fp32")
    (loaded,), ((prompts, settings),) = vllm.loaded, vllm.asked
    assert loaded["model"] == str(folder)
    assert loaded["dtype"] == "float32"
    assert loaded["generation_config"] == "vllm"
    assert loaded["max_model_len"] == 3 + 5
    assert "max_num_seqs" not in loaded
    assert prompts == [{"prompt_token_ids": [2, 3]}, {"prompt_token_ids": [4, 5, 6]}]
    for one in settings:
        known = (one.n, one.temperature, one.top_p, one.max_tokens, one.stop_token_ids, one.skip_special_tokens)
        assert known == (3, 0.7, 0.9, 5, [1], False)
    assert settings[0].seed != settings[1].seed
    assert [row.prompt for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [row.response_ids.tolist() for row in rows] == [[2, 1], [3, 3, 1], [4, 4, 4]] * 2
    assert [row.response.strip() for row in rows] == ["a", "b b", "c c c"] * 2
    assert [row.finished for row in rows] == [True, True, False] * 2


def test_the_batch_size_is_passed_on_where_it_is_given(vllm: StandIn, folder: Path) -> None:
    sample_with_vllm(str(folder), PROMPTS, max_new_tokens=5, batch_size=7)
    assert vllm.loaded[0]["max_num_seqs"] == 7
    assert sample_with_vllm(str(folder), []) == []
    assert len(vllm.loaded) == 1


def test_what_cannot_be_is_refused_before_vllm_is_loaded(vllm: StandIn, folder: Path) -> None:
    for error, prompts, settings in (
        (ModelError, ["a " * 40], {"max_new_tokens": 5}),
        (ConfigError, PROMPTS, {"top_p": 0.0}),
        (DataError, [""], {}),
    ):
        with pytest.raises(error):
            sample_with_vllm(str(folder), prompts, **settings)
    assert not vllm.loaded


def test_a_model_that_vllm_cannot_load_is_named(vllm: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**settings: Any) -> None:
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(vllm, "LLM", failing)
    with pytest.raises(ModelError, match="no kernel for this device") as caught:
        sample_with_vllm(str(folder), PROMPTS, max_new_tokens=5)
    assert "--engine torch" in str(caught.value)


def test_the_engine_is_vllm_only_where_it_can_be(
    vllm: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}', encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    whole, adapter = str(folder), str(tmp_path)
    assert chosen_engine("torch", whole) == chosen_engine("auto", whole) == "torch"
    assert chosen_engine("vllm", whole) == "vllm"
    with pytest.raises(ConfigError, match="is an adapter"):
        chosen_engine("vllm", adapter)
    monkeypatch.setattr(module, "pick_device", lambda: torch.device("cuda"))
    assert chosen_engine("auto", whole) == "vllm"
    assert chosen_engine("auto", adapter) == "torch"
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert chosen_engine("auto", whole) == "torch"
    with pytest.raises(ConfigError, match="not installed"):
        chosen_engine("vllm", whole)
    with pytest.raises(ConfigError, match='did you mean "vllm"'):
        chosen_engine("vlm", whole)


def test_the_command_samples_with_vllm_where_it_is_asked_to(vllm: StandIn, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ["sample", tmp_path / "prompts.txt", "-m", folder, "-o", tmp_path / "samples.jsonl", "-n", 2]
    done = prefopt(*words, "--max-new-tokens", 5, "--batch-size", 3, "--engine", "vllm")
    assert done.code == 0, done.err
    assert vllm.loaded[0]["max_num_seqs"] == 3
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [line["finished"] for line in lines] == [[True, False]] * 2
    refused = prefopt(*words, "--engine", "vlm")
    assert refused.code == 2
    assert 'did you mean "vllm"' in refused.err
