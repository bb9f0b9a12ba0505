"""Gradients of the two vocabulary tables, embedding and head, added where the optimizer keeps them.

A table has V x D numbers. Through autograd every backward pass makes a gradient of that size for each of them and adds it
to the sum: memory that grows with the vocabulary, and time. Within `gradients_into` the backward of the head and of the
embedding add to the sum themselves, the embedding only in the rows of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_sums: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of the weight, which is kept alive beside its sum


@contextmanager
def gradients_into(sums: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block a backward pass adds the gradient of each of these weights to its tensor, of the weight's shape.

    Weights of which the backward sees a copy (an offloaded one) keep their gradient in autograd.
    """
    global _sums
    before, _sums = _sums, {id(weight): (weight, total) for weight, total in sums.items()}
    try:
        yield
    finally:
        _sums = before


def sum_of(weight: Tensor) -> Tensor | None:
    """Where the gradient of `weight` is to be added; None where autograd shall have it."""
    return _sums[id(weight)][1] if id(weight) in _sums else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids, weight_VD)
        ctx.padding = padding
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ids, weight_VD = ctx.saved_tensors
        total = sum_of(weight_VD)
        if total is None:
            dense = torch.ops.aten.embedding_dense_backward(grads[0], ids, len(weight_VD), ctx.padding, False)
            return None, dense, None
        flat = grads[0].flatten(0, -2).to(total.dtype)
        if ctx.padding >= 0:
            flat = flat.masked_fill((ids == ctx.padding).flatten()[:, None], 0)
        total.index_put_((ids.flatten(),), flat, accumulate=True)  # in a fixed order on CUDA too, unlike index_add_
        return None, None, None


def looks_like_embedding(module: nn.Module) -> bool:
    """A plain embedding: no norm limit, no scaling by frequency, no sparse gradient, no subclass with a forward of its own."""
    return type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse)


def embedding_forward(self: Any, ids: Tensor) -> Tensor:
    """`nn.Embedding.forward` whose backward knows `gradients_into`."""
    apply: Callable[..., Tensor] = _Embedding.apply
    return apply(ids, self.weight, -1 if self.padding_idx is None else self.padding_idx)
