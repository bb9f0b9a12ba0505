"""Token groups -> the tensors of one forward pass.

Shapes: G groups, S responses, T packed tokens, N scored tokens, L tokens of the longest padded row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encode import TokenGroup
from prefopt.model.layout import GroupSpan, Layout
from prefopt.model.transfer import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. `rows` x `columns` of ids; predictions are read from the flattened rows.

    `predictor_N`: flat position whose hidden state predicts scored token n. `target_N`: that token. `response_N`: the
    response it belongs to, counted over the batch. `last_S`: flat position of each response's last token, scored or not.
    `layout` is None for padded rows, which need no special attention.
    """

    token_ids: Tensor
    position_ids: Tensor
    predictor_N: Tensor
    target_N: Tensor
    response_N: Tensor
    last_S: Tensor
    responses_per_group: tuple[int, ...]
    layout: Layout | None

    @property
    def responses(self) -> int:
        return sum(self.responses_per_group)


def packed_batch(groups: Sequence[TokenGroup], device: torch.device, *, multiple_of: int = 1) -> Batch:
    """Groups laid end to end on one token axis, `[prompt | r1 | ... | rK]`, the prompt once per group.

    The axis is filled up to a multiple of `multiple_of` with tokens that see and are seen by themselves only.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    lasts: list[int] = []
    spans: list[GroupSpan] = []
    offset = response = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        ids.append(group.prompt_ids)
        positions.append(np.arange(prompt))
        start = offset + prompt
        for tokens, scored in zip(group.response_ids, group.scored, strict=True):
            length = len(tokens)
            ids.append(tokens)
            positions.append(np.arange(prompt, prompt + length))
            before = np.arange(start - 1, start + length - 1)
            before[:1] = offset + prompt - 1
            predictors.append(before[scored])
            targets.append(tokens[scored])
            owners.append(np.full(int(scored.sum()), response))
            response += 1
            start += length
            lasts.append(start - 1)
        spans.append(GroupSpan(offset, prompt, tuple(len(tokens) for tokens in group.response_ids)))
        offset = start
    fill = -offset % multiple_of
    if fill:
        ids.append(np.zeros(fill, dtype=np.int64))
        positions.append(np.arange(fill))
        spans.append(GroupSpan(offset, 0, (fill,)))
    return Batch(
        token_ids=_tensor(ids, device)[None],
        position_ids=_tensor(positions, device)[None],
        predictor_N=_tensor(predictors, device),
        target_N=_tensor(targets, device),
        response_N=_tensor(owners, device),
        last_S=to_device(np.array(lasts), device),
        responses_per_group=tuple(len(group.response_ids) for group in groups),
        layout=Layout(tuple(spans)),
    )


def padded_batch(groups: Sequence[TokenGroup], device: torch.device, *, pad_id: int = 0) -> Batch:
    """One row a response, `[prompt | response]`, padded on the right: what any causal model understands."""
    rows = [
        (group.prompt_ids, tokens, scored)
        for group in groups
        for tokens, scored in zip(group.response_ids, group.scored, strict=True)
    ]
    columns = max(len(prompt) + len(tokens) for prompt, tokens, _ in rows)
    ids = np.full((len(rows), columns), pad_id)
    predictors, targets, owners, lasts = [], [], [], []
    for number, (prompt, tokens, scored) in enumerate(rows):
        ids[number, : len(prompt) + len(tokens)] = np.concatenate([prompt, tokens])
        lasts.append(number * columns + len(prompt) + len(tokens) - 1)
        before = number * columns + len(prompt) - 1 + np.arange(len(tokens))
        predictors.append(before[scored])
        targets.append(tokens[scored])
        owners.append(np.full(int(scored.sum()), number))
    return Batch(
        token_ids=to_device(ids.astype(np.int64), device),
        position_ids=torch.arange(columns, device=device).expand(len(rows), columns),
        predictor_N=_tensor(predictors, device),
        target_N=_tensor(targets, device),
        response_N=_tensor(owners, device),
        last_S=to_device(np.array(lasts), device),
        responses_per_group=tuple(len(group.response_ids) for group in groups),
        layout=None,
    )


def _tensor(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return to_device(np.concatenate(parts).astype(np.int64), device)


def sum_per_response(values_N: Tensor, batch: Batch) -> Tensor:
    """Sum over the scored tokens of each response, shape (S,), in fp32."""
    total_S = torch.zeros(batch.responses, dtype=torch.float32, device=values_N.device)
    return total_S.index_add(0, batch.response_N, values_N.float())
