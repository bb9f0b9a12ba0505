"""Tiny random sequence classifiers of the architectures that have one, and what plain transformers says about their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from model.tiny_models import CONFIGS, UNSHARED, awkward_groups
from prefopt.data.encode import TokenGroup
from prefopt.model.reward_model import RewardModel

PAD = 60  # ends no response of `groups`
SHARED = [name for name in CONFIGS if name not in ("granite", "cohere")]  # those two have no classifier


def classifier(name: str, *, attention: str | None = "eager", seed: int = 0) -> Any:
    """The transformers sequence classifier called `name` with one label: the same weights at every call."""
    config = {**CONFIGS, **UNSHARED}[name]()
    config.num_labels, config.pad_token_id = 1, PAD
    torch.manual_seed(seed)
    chosen = {"attn_implementation": attention} if attention and name in CONFIGS else {}
    model = transformers.AutoModelForSequenceClassification.from_config(config, **chosen).float()
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def reward_model(name: str = "llama", *, seed: int = 0) -> RewardModel:
    """The same model as the engine sees it, in fp32."""
    model = classifier(name, attention=None, seed=seed)
    return RewardModel(model, None, name=name, dtype=torch.float32, device=torch.device("cpu"))


def groups(seed: int = 0, *, pad: int = PAD) -> list[TokenGroup]:
    """`awkward_groups` of which no response ends with `pad`."""
    return [replace(group, response_ids=tuple(map(_ended(pad), group.response_ids))) for group in awkward_groups(seed)]


def _ended(pad: int) -> Any:
    def other(ids: np.ndarray) -> np.ndarray:
        return np.append(ids[:-1], pad - 1 if ids[-1] == pad else ids[-1]).astype(np.int32)

    return other


def texts(groups: Sequence[TokenGroup]) -> list[list[int]]:
    """Prompt and response of each response, as one list of ids."""
    return [np.concatenate([group.prompt_ids, ids]).tolist() for group in groups for ids in group.response_ids]


def plain_scores(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """Logits of transformers' own forward on rows padded on the right, shape (S,)."""
    rows, pad = texts(groups), model.config.pad_token_id
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Model and tokenizer in `folder`, as a checkpoint has them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
