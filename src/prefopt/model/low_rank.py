"""The product of a LoRA layer in one function: x W^T + s (x A^T) B^T, with x and nothing else kept for backward.

Written with plain operations (peft's), the base's output, the adapter's, its multiple by s and their sum are four tensors of
the layer's output size, and x A^T is kept, a small tensor between large ones that come and go. Here the adapter's product
is added into the base's output, and x A^T, of rank r, is computed again. Rounding differs: `paths.confirm` compares.

Shapes: T positions (any leading ones), I inputs, O outputs, R the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_results_are_kept = False


@contextmanager
def results_kept() -> Iterator[None]:
    """Within the block the result of a matrix product is kept for a recomputation, so that nothing may be added into it."""
    global _results_are_kept
    before, _results_are_kept = _results_are_kept, True
    try:
        yield
    finally:
        _results_are_kept = before


@dataclass(frozen=True, slots=True)
class LowRank:
    """One LoRA layer as it computes now. `base`: the frozen linear layer, plain or quantised; a quantised weight exists
    only while it is multiplied."""

    a_RI: Tensor
    b_OR: Tensor
    base: Any
    scale: float

    def output(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias + s (x A^T) B^T"""
        out_TO = F.linear(x_TI, self._weight(x_TI.dtype), self.base.bias)
        low_TR = F.linear(x_TI.flatten(0, -2), self.a_RI)
        flat_TO = out_TO.view(-1, out_TO.shape[-1])
        if _results_are_kept:
            return torch.addmm(flat_TO, low_TR, self.b_OR.T, alpha=self.scale).view(out_TO.shape)
        flat_TO.addmm_(low_TR, self.b_OR.T, alpha=self.scale)
        return out_TO

    def gradients(self, grad_TO: Tensor, x_TI: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """In x, A and B, as far as they are `needed`."""
        shape, x_TI, grad_TO = x_TI.shape, x_TI.flatten(0, -2), grad_TO.flatten(0, -2)
        low_TR = grad_TO @ self.b_OR * self.scale
        found: list[Tensor | None] = [None, None, None]
        if needed[0]:
            found[0] = (grad_TO @ self._weight(x_TI.dtype)).addmm_(low_TR, self.a_RI).view(shape)
        if needed[1]:
            found[1] = low_TR.T @ x_TI
        if needed[2]:
            found[2] = grad_TO.T @ (F.linear(x_TI, self.a_RI) * self.scale)
        return found

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The base's weight as it is computed with, shape (out, in)."""
        weight: Tensor = self.base.dequantized(dtype) if _is_quantized(self.base) else self.base.weight
        return weight.T if isinstance(self.base, Conv1D) else weight


class _LowRankSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, base: Any, scale: float) -> Tensor:
        ctx.save_for_backward(x_TI, a_RI, b_OR)
        ctx.rest = base, scale
        return LowRank(a_RI, b_OR, base, scale).output(x_TI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TI, a_RI, b_OR = ctx.saved_tensors
        return *LowRank(a_RI, b_OR, *ctx.rest).gradients(grads[0], x_TI, ctx.needs_input_grad), None, None


def looks_like_lora(module: nn.Module) -> bool:
    """peft's LoRA on a linear layer, without peft being imported where there is none."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "base_layer")


def low_rank_of(module: Any, dtype: torch.dtype) -> LowRank | None:
    """What a layer of peft computes on inputs of `dtype`; None where that is not one plain LoRA on a frozen linear layer."""
    name = module.active_adapters[0] if len(module.active_adapters) == 1 else None
    if name not in module.lora_A or module.disable_adapters or module.merged or module.lora_variant:
        return None
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    frozen = not any(weight.requires_grad for weight in base.parameters())
    linear = type(base) in (nn.Linear, Conv1D) or _is_quantized(base)
    watched = base._forward_hooks or base._forward_pre_hooks
    dropout = not isinstance(module.lora_dropout[name], nn.Identity)
    if not (frozen and linear) or watched or dropout or b.bias is not None or a.weight.dtype != dtype:
        return None
    return LowRank(a.weight, b.weight, base, module.scaling[name])


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`peft.tuners.lora.Linear.forward` in one function where that is known to be the same, else peft's own."""
    found = None if args or kwargs else low_rank_of(self, x.dtype)
    if found is None:
        plain: Tensor = type(self).forward(self, x, *args, **kwargs)
        return plain
    apply: Callable[..., Tensor] = _LowRankSum.apply
    return apply(x, found.a_RI, found.b_OR, found.base, found.scale)


def _is_quantized(base: nn.Module) -> bool:
    return hasattr(base, "dequantized")  # prefopt.model.quantized
