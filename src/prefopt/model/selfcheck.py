"""Proof on the user's own model and rows that the fast paths compute what the plain ones do.

Shapes: N scored tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encode import TokenGroup
from prefopt.model.batch import Batch, packed_batch, padded_batch
from prefopt.model.engine import GRADIENT_TOLERANCE, TOLERANCE, LanguageModel
from prefopt.model.paths import deviation, fast_paths
from prefopt.model.reference import ReferenceCache, fill_cache


@dataclass(frozen=True, slots=True)
class Check:
    """One agreement: the largest deviation found (nats per token, or relative for gradients) and the bound."""

    name: str
    about: str
    deviation: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.deviation <= self.tolerance  # False for NaN


def selfcheck(model: LanguageModel, groups: Sequence[TokenGroup]) -> list[Check]:
    """Every agreement on `groups` (a handful of rows is enough), worst deviation each."""
    tolerance = TOLERANCE[model.dtype]
    with torch.no_grad():
        with model.fused.plain():
            plain = _plain_logps(model, groups)
        padded = model.token_logps(padded_batch(groups, model.device))
        used = model.token_logps(model.batch(groups))
    checks = [
        Check(
            "chunked == dense",
            "the chunked head against full logits of transformers' own forward",
            _worst(padded, plain),
            tolerance,
        )
    ]
    if model.sharing:
        with torch.no_grad():
            alone = model.token_logps(packed_batch(_duplicated(groups), model.device))
        checks.append(
            Check(
                "packed == padded", "rows laid end to end against one padded row a response", _worst(alone, padded), tolerance
            )
        )
        checks.append(
            Check("shared == duplicated", "the prompt computed once against once per response", _worst(used, alone), tolerance)
        )
        gradient = _gradient_deviation(model, groups)
        checks.append(
            Check(
                "gradients agree",
                "packed and shared against padded, relative to the largest",
                gradient,
                GRADIENT_TOLERANCE[model.dtype],
            )
        )
    batch = model.batch(groups)
    paths = fast_paths(model)
    for path in paths:
        found = deviation(model, batch, [path], beside=[other for other in paths if other is not path])
        checks.append(Check(f"{path.name} == plain", path.about, found.value, tolerance))
        checks.append(
            Check(f"{path.name}, gradients", "relative to the largest", found.gradient, GRADIENT_TOLERANCE[model.dtype])
        )
    checks.append(
        Check("all == transformers", "what training uses against transformers' own forward", _worst(used, plain), tolerance)
    )
    checks.append(
        Check(
            "cached == live",
            "reference log-probs read back from disk against computed ones",
            _cache_deviation(model, groups, used),
            tolerance,
        )
    )
    return checks


def _worst(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _plain_logps(model: LanguageModel, groups: Sequence[TokenGroup]) -> Tensor:
    """Log-probs by transformers alone: one unpadded row at a time, full logits, fp32 log-softmax."""
    values = []
    for group in groups:
        for tokens, scored in zip(group.response_ids, group.scored, strict=True):
            row = torch.as_tensor(np.concatenate([group.prompt_ids, tokens]), dtype=torch.long, device=model.device)
            logits = model.model(input_ids=row[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1].float()
            logps = torch.log_softmax(logits, dim=-1).gather(1, row[len(group.prompt_ids) :, None])[:, 0]
            values.append(logps[torch.as_tensor(scored, device=model.device)])
    return torch.cat(values)


def _duplicated(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Every response as a group of its own, in order."""
    return [
        replace(group, response_ids=(tokens,), scored=(scored,), finished=())
        for group in groups
        for tokens, scored in zip(group.response_ids, group.scored, strict=True)
    ]


def _gradient_deviation(model: LanguageModel, groups: Sequence[TokenGroup]) -> float:
    packed = _gradients(model, packed_batch(groups, model.device))
    with model.fused.plain():
        padded = _gradients(model, padded_batch(groups, model.device))
    largest = max(float(gradient.abs().max()) for gradient in padded)
    return max(float((a - b).abs().max()) for a, b in zip(packed, padded, strict=True)) / max(largest, 1e-30)


def _gradients(model: LanguageModel, batch: Batch) -> list[Tensor]:
    weights = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    logps = model.token_logps(batch)
    # A mix of signs, as in a preference loss.
    signs = 1.0 - 2.0 * (batch.response_N % 2)
    gradients = torch.autograd.grad((logps * signs).sum(), weights, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in gradients]


def _cache_deviation(model: LanguageModel, groups: Sequence[TokenGroup], live: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        fill_cache(
            ReferenceCache(model.identity, model.numerics, root=Path(folder)), groups, lambda: model, micro_batch_tokens=1024
        )
        stored = ReferenceCache(model.identity, model.numerics, root=Path(folder)).of(groups)
    flat = np.concatenate([values for group in stored for values in group])
    return float(np.abs(flat - live.cpu().numpy()).max())
