"""A random Llama of two layers, rows of preferences, and Training objects made from both: seconds of nothing but arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.core.config import RunConfig
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder
from prefopt.model.engine import LanguageModel
from prefopt.model.load import load_model
from prefopt.pipeline import prepare_rows, start_training, train_run
from prefopt.train import observers
from prefopt.train.loop import Training

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SUBJECTS = ("the river", "a stone", "my boat", "the night", "an old song", "the market", "her garden", "this road")
GOOD = ("is calm and clear", "shines in the sun", "makes us glad", "is worth a long visit", "has a warm colour")
POOR = ("is bad", "no", "is loud and it is far too long to tell", "was lost", "is what it is and nothing more")


def preference_rows(count: int = 40) -> list[dict[str, str]]:
    """`count` rows of prompt, chosen and rejected; all differ, with responses of several lengths."""
    return [
        {
            "prompt": f"What of {SUBJECTS[number % 8]} at {number}?",
            "chosen": f"It {GOOD[number % 5]} {number}",
            "rejected": f"It {POOR[(number * 3 + number // 5) % 5]} {number}",
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[Any] | None = None) -> Path:
    """`rows` (by default `preference_rows()`) as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in (preference_rows() if rows is None else rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens with ChatML's special tokens; `<|im_end|>` ends text and turns."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([text for row in preference_rows() for text in row.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML if chat_template else None
    return tokenizer


def write_model(folder: Path, *, seed: int = 0, tied: bool = False, chat_template: bool = True) -> Path:
    """A random model and its tokenizer in Hugging Face's layout: hidden 32, 2 layers, context 128."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """The configuration of a tiny run below `folder`, whose model and rows are written where they are not there yet."""
    model, rows = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        write_model(model)
    if not rows.exists():
        write_rows(rows)
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(model)},
        "data": {"train": str(rows)},
        "reference": {"cache_dir": str(folder / "reference")},
        "train": {
            "output_dir": str(folder / "run"),
            "groups_per_step": 8,
            "max_steps": 4,
            "lr": 1e-3,
            "precision": "fp32",
        },
    }
    for name, options in sections.items():
        values.setdefault(name, {}).update(options)
    return resolve_config(values)


def tiny_training(config: RunConfig, *, policy: LanguageModel | None = None) -> Training:
    """The Training of `config` at step 0, as `train_run` makes it."""
    policy = policy or load_model(config.model.name, precision=config.train.precision, for_training=True)
    rows = prepare_rows(config, policy.tokenizer, policy.context_tokens)
    _ = policy.sharing
    return start_training(config, policy, rows)


def stop_after(step: int, config: RunConfig) -> RunFolder:
    """Train and fail behind the checkpoint of `step`, as a run does whose machine goes away."""
    before = observers.SaveCheckpoints.after_step

    def after_step(self: observers.SaveCheckpoints, record: Any) -> None:
        before(self, record)
        if record.step == step:
            raise RuntimeError("the machine went away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.SaveCheckpoints, "after_step", after_step)
        with pytest.raises(RuntimeError, match="went away"):
            train_run(config)
    return RunFolder(Path(config.train.output_dir))


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    """Copies of the master weights by name."""
    return {name: master.detach().clone() for name, master in training.optimizer.masters.items()}
