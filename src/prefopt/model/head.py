"""Log-probs of the scored tokens from hidden states, in chunks of tokens: logits of N x V never exist.

Shapes: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 2**25  # logits held at once: 128 MiB in fp32


@dataclass(frozen=True, slots=True)
class Head:
    """What lies between the last hidden state and the log-probs: `softcap * tanh(scale * (h W^T + b) / softcap)`."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logps(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """Log-prob of each target in nats, shape (N,), fp32."""
        keep = torch.is_grad_enabled() and self.softcap is None
        apply: Callable[..., Tensor] = _ChunkedLogProb.apply
        return apply(hidden_ND, self.weight, self.bias, target_N, self.scale, self.softcap, keep)


def head_of(model: Any) -> Head:
    """The head of a transformers causal language model, with the scaling that its configuration asks for."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(output.weight, getattr(output, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap is not None else logits


class _ChunkedLogProb(torch.autograd.Function):
    """Backward computes each chunk's logits again, unless all fit in one chunk: then its probabilities are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])
        out = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        kept: Tensor | None = None
        for start in range(0, len(hidden_ND), rows):
            chunk = slice(start, start + rows)
            logits = _logits(hidden_ND[chunk], weight_VD, bias_V, scale, softcap)
            total = logits.logsumexp(dim=1)
            out[chunk] = logits.gather(1, target_N[chunk, None])[:, 0] - total
            if keep and len(hidden_ND) <= rows:
                kept = logits.sub_(total[:, None]).exp_()
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, kept)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_N: Tensor = grads[0]
        hidden_ND, weight_VD, bias_V, target_N, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=grad_N.device) if needs_weight else None
        grad_bias = torch.zeros(len(weight_VD), dtype=torch.float32, device=grad_N.device) if needs_bias else None
        rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, len(hidden_ND), rows):
            chunk = slice(start, start + rows)
            hidden = hidden_ND[chunk]
            grad = _logit_gradient(hidden, weight_VD, bias_V, target_N[chunk], grad_N[chunk], kept, ctx.scale, ctx.softcap)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            compute = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = compute @ weight_VD
            if grad_weight is not None:
                if compute.dtype == torch.float32:
                    grad_weight.addmm_(compute.T, hidden)
                else:
                    grad_weight += compute.T @ hidden
        weight_out = grad_weight.to(weight_VD.dtype) if grad_weight is not None else None
        bias_out = grad_bias.to(weight_VD.dtype) if grad_bias is not None else None
        return grad_hidden, weight_out, bias_out, None, None, None, None


def _logit_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad: Tensor,
    kept: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Gradient of `sum(grad * log p[target])` in the raw logits: grad * (onehot - softmax), through cap and scale."""
    logits = None if kept is not None else _logits(hidden, weight, bias, scale, softcap)
    probabilities = kept if logits is None else torch.softmax(logits, dim=1)
    assert probabilities is not None
    gradient = probabilities * -grad[:, None]
    gradient.scatter_add_(1, target[:, None], grad[:, None])
    if softcap is not None and logits is not None:
        gradient *= 1 - (logits / softcap) ** 2
    return gradient if scale == 1.0 else gradient * scale
