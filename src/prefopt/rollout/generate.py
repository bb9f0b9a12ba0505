"""Responses by transformers' generate(), for models that keep other state than keys and values, or whose layers cannot follow
a packed batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from prefopt.data.encode import Ids
from prefopt.model.engine import LanguageModel

if TYPE_CHECKING:
    from prefopt.rollout.decode import Choose, Done, Wanted

_SETTINGS: Any = GenerationConfig  # its constructor has no types


def generate(
    model: LanguageModel,
    wanted: Sequence[Wanted],
    choose: Choose,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Done,
) -> None:
    """What `prefopt.rollout.decode.decode` does, in batches that last as long as their longest response."""
    pad = model.tokenizer.pad_token_id
    if pad is None or not 0 <= pad < model.model.get_input_embeddings().num_embeddings:
        pad = ends[0]  # only ever seen behind the attention mask and behind an end of turn
    settings = _SETTINGS(
        max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=pad, use_cache=True, do_sample=False
    )
    order = sorted(range(len(wanted)), key=lambda number: -len(wanted[number].prompt_ids))
    with torch.no_grad(), _own_settings_aside(model.model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            tokens, mask = _padded_left([wanted[number].prompt_ids for number in batch], pad)
            chosen: Any = LogitsProcessorList([_Chosen(choose, [wanted[number] for number in batch])])
            output = model.model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=chosen,
            )
            for number, new in zip(batch, output[:, tokens.shape[1] :].cpu().numpy().astype(np.int32), strict=True):
                found = np.flatnonzero(np.isin(new, ends))
                done(number, new[: found[0] + 1] if len(found) else new)


class _Chosen(LogitsProcessor):
    """Leaves one token to choose from: that of `choose`, so that generate() draws as `decode` does."""

    def __init__(self, choose: Choose, wanted: Sequence[Wanted]) -> None:
        self._choose = choose
        self._uniforms_ST = np.stack([one.uniforms() for one in wanted])
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_S = self._choose(scores, self._uniforms_ST[:, self._step])
        self._step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, token_S[:, None], 0.0)


@contextlib.contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """No generation settings of the model's own within the block: generate() fills what a call leaves open from them."""
    own, use_cache = model.generation_config, getattr(model.config, "use_cache", None)
    try:
        model.generation_config = _SETTINGS()
        model.config.use_cache = True
        yield
    finally:
        model.config.use_cache = use_cache
        model.generation_config = own


def _padded_left(prompts: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (S, longest prompt)."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
        mask[row, width - len(ids) :] = 1
    return tokens, mask
