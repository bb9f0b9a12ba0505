"""Reward models from language models and from disk: nothing is made up, and plain transformers reads the same scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from data.tiny_tokenizers import CHATML, byte_level, metaspace
from model.tiny_models import causal_model
from model.tiny_reward_models import classifier, groups, plain_scores, save
from prefopt.core.errors import ModelError
from prefopt.core.files import write_json
from prefopt.data.encode import encode_groups
from prefopt.data.load import load_groups
from prefopt.model.engine import weights_identity
from prefopt.model.load import load_model, load_reward_model
from prefopt.model.padding import padding_token, set_padding
from prefopt.model.reward_model import RewardModel

ROWS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris, of course.", "rejected": "yes"},
    {"prompt": "hello", "chosen": "a number of words that are here to be merged", "rejected": "12 + 30 = 42"},
    {"prompt": "hello world, what of 12 + 30?", "chosen": "42", "rejected": "what are the words"},
]


def loaded(name: object, **options: Any) -> RewardModel:
    return load_reward_model(str(name), precision="fp32", **options)


def with_random_head(model: RewardModel, seed: int = 5) -> RewardModel:
    """A head as after training: the one that a new reward model has is 0."""
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(seed)) / 5)
    return model


def words(vocabulary: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token=vocabulary[-1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def refused(name: object, **options: Any) -> str:
    with pytest.raises(ModelError) as raised:
        loaded(name, **options)
    assert raised.value.todo and "\n" not in raised.value.what
    return raised.value.what


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt-neox", "qwen3-moe"])
def test_a_language_model_gives_its_decoder_and_a_head_of_zeros(name: str, tmp_path: Path) -> None:
    causal = causal_model(name)
    folder = save(causal, byte_level(), tmp_path / "causal")
    torch.manual_seed(1)
    first = loaded(folder)
    torch.manual_seed(2)
    second = loaded(folder, for_training=True)
    assert first.identity == second.identity, "nothing is left to chance"
    wanted = {key: value for key, value in causal.state_dict().items() if key.startswith(causal.base_model_prefix)}
    found = first.model.state_dict()
    assert found.keys() - wanted.keys() == {"score.weight"}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not first.head.weight.any() and first.head.weight.shape == (1, 32)
    assert all(not scores.any() for scores in first.score_groups(groups(pad=first.pad_id)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_plain_transformers_reads_the_same_scores_from_what_was_saved(name: str, tmp_path: Path) -> None:
    """Ids and padding are transformers' and the saved tokenizer's alone; rows have many lengths."""
    tokenizer = byte_level()
    causal = causal_model(name)
    causal.resize_token_embeddings(len(tokenizer))
    ours = with_random_head(loaded(save(causal, tokenizer, tmp_path / "causal")))
    folder = save(ours.model, ours.tokenizer, tmp_path / "reward")
    token_set = encode_groups(load_groups(ROWS), ours.tokenizer)
    scores = np.concatenate(ours.score_groups(token_set.groups))
    assert scores.std() > 0.05

    theirs, reader = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(classifier(name)).__name__] and theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == reader.pad_token_id == config["pad_token_id"]
    assert "prefopt" not in json.dumps(config), "a checkpoint must not ask others for our attention"
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]
        for row in ROWS
        for answer in ("chosen", "rejected")
    ]
    written = [reader.apply_chat_template(chat, tokenize=False).removesuffix("\n") for chat in chats]
    rows = reader(written, return_tensors="pt", padding=True, add_special_tokens=False)
    assert len(set(rows["attention_mask"].sum(dim=1).tolist())) >= 4
    with torch.no_grad():
        plain = theirs(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, 0].numpy()
    assert np.abs(plain - scores).max() < 1e-5

    again = loaded(folder, require_trained=True)
    assert again.identity == weights_identity(ours.model)
    assert np.abs(np.concatenate(again.score_groups(token_set.groups)) - scores).max() < 1e-6


def test_an_adapter_gives_the_decoder_that_it_makes_of_its_base(tmp_path: Path) -> None:
    causal = causal_model("llama")
    save(causal, byte_level(), tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    model, wanted = loaded(tmp_path / "adapter"), adapted.merge_and_unload().state_dict()
    found = model.model.state_dict()
    assert found.keys() - wanted.keys() == {"score.weight"} and not model.head.weight.any()
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in found if key in wanted)
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], causal.model.layers[0].mlp.up_proj.weight)
    saved = save(with_random_head(model).model, model.tokenizer, tmp_path / "reward")
    assert loaded(saved, require_trained=True).head.weight.equal(model.head.weight)


def test_a_run_of_a_reward_model_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "config.json", {"model": {"name": "base"}, "train": {}})
    checkpoint = save(classifier("llama"), byte_level(), tmp_path / "run" / "checkpoints" / "step-000004")
    write_json(checkpoint / "manifest.json", {"files": {path.name: path.stat().st_size for path in checkpoint.iterdir()}})
    model = loaded(tmp_path / "run", require_trained=True)
    rows = groups()
    with torch.no_grad():
        assert np.abs(np.concatenate(model.score_groups(rows)) - plain_scores(classifier("llama"), rows).numpy()).max() < 1e-4


# which token pads


SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "a", "b"]
PADDING: dict[str, tuple[Any, str]] = {
    "its own where that ends nothing": (byte_level(), "<|endoftext|>"),
    "as SmolLM2, which pads with its end of turn": (
        words(
            SMOL,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            unk_token="<|endoftext|>",
            additional_special_tokens=["<repo_name>", "<reponame>"],
            chat_template=CHATML,
        ),
        "<repo_name>",
    ),
    "as Llama 2, with a template that writes bos_token": (metaspace(), "<unk>"),
    "the beginning of text where nothing else is left": (
        words(["<s>", "</s>", "a"], bos_token="<s>", eos_token="</s>", pad_token="</s>"),
        "<s>",
    ),
}


@pytest.mark.parametrize("kind", PADDING)
def test_the_padding_token_ends_no_response(kind: str) -> None:
    tokenizer, wanted = PADDING[kind]
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    set_padding(tokenizer, config, trained=False)
    assert tokenizer.pad_token == wanted
    assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(wanted)
    assert tokenizer.padding_side == "right"
    rows = [{"prompt": "a", "chosen": "a b " + " ".join(tokenizer.all_special_tokens), "rejected": "b"}]
    if tokenizer.chat_template is None or "<|im_start|>" in tokenizer.chat_template:
        for group in encode_groups(load_groups(rows), tokenizer).groups:
            assert all(ids[-1] != config.pad_token_id for ids in group.response_ids)


def test_a_token_without_an_embedding_pads_nothing() -> None:
    tokenizer = words(["a", "b", "</s>", "<x>", "<y>"], eos_token="</s>", additional_special_tokens=["<x>", "<y>"])
    tokenizer.pad_token = "<y>"
    assert padding_token(tokenizer, 5) == 4
    assert padding_token(tokenizer, 4) == 3
    with pytest.raises(ModelError, match="No special token") as raised:
        padding_token(tokenizer, 3)
    assert "resize_token_embeddings" in raised.value.todo


def test_transformers_reads_the_end_of_turn_where_the_base_model_pads_with_it(tmp_path: Path) -> None:
    """The trap itself: with the base model's padding token the score would be read one token early."""
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    causal = causal_model("llama")
    causal.resize_token_embeddings(len(tokenizer))
    causal.config.pad_token_id = tokenizer.eos_token_id
    ours = with_random_head(loaded(save(causal, tokenizer, tmp_path / "causal")))
    assert ours.pad_id != tokenizer.eos_token_id
    rows = list(encode_groups(load_groups(ROWS), ours.tokenizer).groups)
    assert all(ids[-1] == tokenizer.eos_token_id for group in rows for ids in group.response_ids)
    theirs = AutoModelForSequenceClassification.from_pretrained(save(ours.model, ours.tokenizer, tmp_path / "reward"))
    scores = np.concatenate(ours.score_groups(rows))
    with torch.no_grad():
        assert np.abs(plain_scores(theirs, rows).numpy() - scores).max() < 1e-5
        theirs.config.pad_token_id = tokenizer.eos_token_id
        assert np.abs(plain_scores(theirs, rows).numpy() - scores).min() > 1e-3


# what is refused


def test_a_language_model_is_no_trained_reward_model(tmp_path: Path) -> None:
    folder = save(causal_model("llama"), byte_level(), tmp_path)
    assert refused(folder, require_trained=True).endswith(
        "is a language model, not a reward model: it has no weights for score.weight"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_a_reward_model_is_no_language_model(name: str, tmp_path: Path) -> None:
    """GPT-2, OPT and Bloom tie their embeddings: transformers finds no weight missing and loads them in silence."""
    folder = save(classifier(name), byte_level(), tmp_path)
    with pytest.raises(ModelError, match="is a reward model") as raised:
        load_model(str(folder), precision="fp32")
    assert "--reward-model" in raised.value.todo


@pytest.mark.parametrize("name", ["granite", "mamba"])
def test_an_architecture_without_a_classifier_is_refused(name: str, tmp_path: Path) -> None:
    folder = save(causal_model(name, attention=None), byte_level(), tmp_path)
    assert f"no sequence classifier for models of type {name}" in refused(folder)


@pytest.mark.parametrize("missing", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_a_reward_model_lacks_are_not_made_up(missing: str, tmp_path: Path) -> None:
    folder = save(classifier("llama"), byte_level(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert missing in refused(folder)


def test_weights_that_a_language_model_lacks_are_not_made_up_either(tmp_path: Path) -> None:
    folder = save(causal_model("llama"), byte_level(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(folder)


def test_a_head_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = classifier("llama")
    with torch.no_grad():
        model.score.weight[0, 3] = float("nan")
    assert "score.weight" in refused(save(model, byte_level(), tmp_path))


def test_a_classifier_of_more_labels_is_no_reward_model(tmp_path: Path) -> None:
    config = causal_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    model = AutoModelForSequenceClassification.from_config(config)
    assert "is a classifier of 3 labels" in refused(save(model, byte_level(), tmp_path))


def test_a_reward_model_that_was_read_in_front_of_its_end_is_refused(tmp_path: Path) -> None:
    model, tokenizer = classifier("llama"), byte_level()
    model.config.pad_token_id = tokenizer.eos_token_id
    assert "pads with '<|im_end|>', which also ends responses" in refused(save(model, tokenizer, tmp_path))


def test_a_trained_reward_model_keeps_its_padding_token(tmp_path: Path) -> None:
    model = classifier("llama")
    model.config.pad_token_id = 7
    kept = loaded(save(model, byte_level(), tmp_path))
    assert kept.pad_id == kept.tokenizer.pad_token_id == 7


def test_a_folder_that_does_not_exist_and_one_without_weights(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "absent")
    folder = save(classifier("llama"), byte_level(), tmp_path)
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refused(folder)
