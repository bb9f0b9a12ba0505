"""A trained reward model on disk that is small, and whose scores differ from row to row."""

from __future__ import annotations

from pathlib import Path

import torch

from prefopt.model.load import load_reward_model
from train.tiny_runs import write_model


def write_reward_model(folder: Path, *, seed: int = 0) -> Path:
    """A reward model with a random head on the model of `write_model`, in Hugging Face's layout."""
    model = load_reward_model(str(write_model(folder.with_name(f"{folder.name}-base"), seed=seed)), precision="fp32")
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
