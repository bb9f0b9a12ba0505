"""How far the samples of one prompt lie apart for a model that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from prefopt.core.errors import ConfigError
from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.data.pack import micro_batches
from prefopt.evaluate.intervals import Floats
from prefopt.model.engine import LanguageModel
from prefopt.rollout.sample import SampleRow


def embedding_spread(model: LanguageModel, samples: Sequence[SampleRow], *, micro_batch_tokens: int = 4096) -> float:
    """Mean over prompts of the mean cosine distance, 1 - cosine, of any two samples' embeddings; 0 where all are equal.

    An embedding is the mean of the last hidden states of `model` that predict the sample's tokens. Hidden states of language
    models point much the same way, so that values are small: compare them between policies under one model, not between
    models. ConfigError where no prompt has two samples.
    """
    of_prompt: dict[bytes, list[int]] = {}
    for at, row in enumerate(samples):
        of_prompt.setdefault(row.prompt_ids.tobytes(), []).append(at)
    several = [members for members in of_prompt.values() if len(members) > 1]
    if not several:
        raise ConfigError("embedding spread: no prompt has two samples", todo="Draw at least two samples a prompt (-n 2).")
    embedding_SD = _embeddings(model, samples, micro_batch_tokens)
    embedding_SD /= np.maximum(np.linalg.norm(embedding_SD, axis=1, keepdims=True), 1e-30)
    return float(np.mean([_distance(embedding_SD[members]) for members in several]))


def _distance(unit_KD: Floats) -> float:
    """Mean of 1 - cosine over the pairs of K unit vectors: |sum|^2 = K + twice the sum of the pairs' cosines."""
    count = len(unit_KD)
    cosines = (float((unit_KD.sum(axis=0) ** 2).sum()) - count) / (count * (count - 1))
    return max(0.0, 1 - cosines)


def sample_groups(samples: Sequence[SampleRow]) -> list[TokenGroup]:
    """Token groups with every token scored; neighbours with the same prompt are one group, so that it is computed once."""
    return [
        TokenGroup(
            prompt_ids=rows[0].prompt_ids,
            response_ids=tuple(row.response_ids for row in rows),
            scored=tuple(np.ones(len(row.response_ids), dtype=np.bool_) for row in rows),
            feedback=Feedback("demonstration"),
            source="sample",
            finished=tuple(row.finished for row in rows),
        )
        for _, neighbours in groupby(samples, key=lambda row: row.prompt_ids.tobytes())
        if (rows := list(neighbours))
    ]


@torch.no_grad()
def _embeddings(model: LanguageModel, samples: Sequence[SampleRow], micro_batch_tokens: int) -> Floats:
    """Mean hidden state of each sample, shape (S, D)."""
    groups = sample_groups(samples)
    starts = np.cumsum([0, *(len(group.response_ids) for group in groups)])
    found: list[Floats] = [np.empty(0)] * len(samples)
    was_training = model.model.training
    model.model.eval()
    lengths = [model.computed_tokens(group) for group in groups]
    for members in micro_batches(lengths, budget_tokens=micro_batch_tokens):
        batch = model.batch([groups[place] for place in members])
        hidden_ND = model.hidden_states(batch)[batch.predictor_N].double()
        sums_SD = torch.zeros(batch.responses, hidden_ND.shape[1], dtype=torch.float64, device=hidden_ND.device)
        sums_SD.index_add_(0, batch.response_N, hidden_ND)
        counts_S = torch.bincount(batch.response_N, minlength=batch.responses).clamp(min=1)
        means = iter((sums_SD / counts_S[:, None]).cpu().numpy())
        for place in members:
            for at in range(int(starts[place]), int(starts[place + 1])):
                found[at] = next(means)
    model.model.train(was_training)
    return np.stack(found)
