"""Log-probs and other statistics of the scored tokens from hidden states, in chunks of tokens: logits of N x V never exist.

Shapes: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.core.errors import ModelError
from prefopt.model.tables import sum_of

_CHUNK_LOGITS = 2**25  # logits held at once: 128 MiB in fp32
_SLICE_NUMBERS = 2**22  # numbers of the head's gradient made at once in bf16: 8 MiB


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
        return apply(hidden_ND, self.weight, self.bias, self.scale, self.softcap, target_N, keep)

    @torch.no_grad()
    def log_square(self, hidden_ND: Tensor) -> Tensor:
        """log sum_v p_v^2 of each position in nats, shape (N,), fp32, without a gradient.

        From -log V (uniform) to 0 (certain). The sum is the mean probability of a token drawn from the policy itself, by
        which WPO (arXiv 2406.11827) divides a token's probability so that an entropy of the policy is not a low weight.
        """
        out_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for chunk in self._chunks(len(hidden_ND)):
            # On log-probs and not as logsumexp(2 z) - 2 logsumexp(z), which loses the digits of large logits.
            out_N[chunk] = self._logits(hidden_ND[chunk]).log_softmax(dim=1).mul_(2).logsumexp(dim=1)
        return out_N

    def kl_from(self, hidden_ND: Tensor, reference_hidden_ND: Tensor, reference_head: Head) -> Tensor:
        """KL(reference || policy) over the vocabulary at each position, in nats, shape (N,), fp32.

        sum_v q_v (log q_v - log p_v) with q the reference's probabilities and p those of this head: the per-token term of
        TDPO's sequential KL (arXiv 2404.11999). Exactly 0 where both sides are equal; rounding can put a KL of that
        size some 1e-6 below 0. Differentiable in `hidden_ND`, this weight and this bias; the reference gets no gradient,
        and its hidden size may be another one. ModelError where the vocabularies differ in size.
        """
        ours, theirs = len(self.weight), len(reference_head.weight)
        if ours != theirs:
            raise ModelError(
                f"KL needs one vocabulary; the policy's head has {ours} rows and the reference's {theirs}",
                todo="Use a reference with the policy's tokenizer and the same padding of the vocabulary.",
            )
        apply: Callable[..., Tensor] = _ChunkedKL.apply
        other = reference_head
        return apply(
            *(hidden_ND, self.weight, self.bias, self.scale, self.softcap),
            *(reference_hidden_ND, other.weight, other.bias, other.scale, other.softcap),
        )

    def _chunks(self, positions: int) -> list[slice]:
        rows = max(1, _CHUNK_LOGITS // len(self.weight))
        return [slice(start, start + rows) for start in range(0, positions, rows)]

    def _logits(self, hidden_ND: Tensor, room: Tensor | None = None) -> Tensor:
        """Logits of one chunk in fp32, in the first rows of `room` or in a tensor of their own."""
        if room is None:
            logits = torch.nn.functional.linear(hidden_ND, self.weight, self.bias).float()
        elif hidden_ND.dtype != room.dtype:
            logits = room[: len(hidden_ND)].copy_(torch.nn.functional.linear(hidden_ND, self.weight, self.bias))
        elif self.bias is None:
            logits = torch.mm(hidden_ND, self.weight.T, out=room[: len(hidden_ND)])
        else:
            logits = torch.addmm(self.bias, hidden_ND, self.weight.T, out=room[: len(hidden_ND)])
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap is not None else logits

    def _room(self, chunks: list[slice], device: torch.device) -> Tensor | None:
        """Place for the logits of each of several chunks in turn: made anew, blocks of this size would lie side by side."""
        if len(chunks) < 2:
            return None
        return torch.empty(chunks[0].stop, len(self.weight), dtype=torch.float32, device=device)

    def _before_cap(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient in the logits -> gradient in h W^T + b. `gradient` is used up; `logits` matter under a soft cap only."""
        if self.softcap is not None and logits is not None:
            gradient *= 1 - (logits / self.softcap) ** 2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def head_of(model: Any) -> Head:
    """The head of a transformers causal language model, with the scaling that its configuration asks for."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(output.weight, getattr(output, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


class _ChunkedLogProb(torch.autograd.Function):
    """Backward computes each chunk's logits again, unless all fit in one chunk: then its probabilities are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        target_N: Tensor,
        keep: bool,
    ) -> Tensor:
        head = Head(weight_VD, bias_V, scale, softcap)
        chunks = head._chunks(len(hidden_ND))
        out_N, total_N = (torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device) for _ in range(2))
        kept: Tensor | None = None
        room = head._room(chunks, hidden_ND.device)
        for chunk in chunks:
            logits = head._logits(hidden_ND[chunk], room)
            of_target = logits.gather(1, target_N[chunk, None])[:, 0]
            largest = logits.amax(dim=1)
            sums = logits.sub_(largest[:, None]).exp_().sum(dim=1)  # torch.logsumexp makes a second tensor of this size
            total_N[chunk] = sums.log().add_(largest)
            out_N[chunk] = of_target - total_N[chunk]
            if keep and len(chunks) == 1:
                kept = logits.div_(sums[:, None])
            del logits  # before the next chunk makes its own
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, total_N)
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, kept
        ctx.room = room if any(ctx.needs_input_grad) else None
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_N: Tensor = grads[0]
        hidden_ND, weight_VD, bias_V, target_N, total_N = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)
        kept, ctx.kept = ctx.kept, None  # used up in place; a second backward computes it again
        room, ctx.room = ctx.room, None
        if room is None:
            room = head._room(head._chunks(len(hidden_ND)), hidden_ND.device)

        def gradient_of(chunk: slice) -> Tensor:
            """grad * (onehot - softmax)"""
            logits = head._logits(hidden_ND[chunk], room) if kept is None else None
            if logits is None:
                gradient = kept
            elif ctx.softcap is None:
                gradient = logits.sub_(total_N[chunk, None]).exp_()
            else:  # the cap's own gradient needs the logits again
                gradient = (logits - total_N[chunk, None]).exp_()
            assert gradient is not None
            gradient.mul_(-grad_N[chunk, None])
            gradient.scatter_add_(1, target_N[chunk, None], grad_N[chunk, None])
            return head._before_cap(gradient, logits)

        return *_gradients(ctx, head, hidden_ND, gradient_of), *(None,) * 4


class _ChunkedKL(torch.autograd.Function):
    """Backward computes the logits of both sides again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden_ND, weight_VD, bias_V, scale, softcap = inputs[:5]
        reference_hidden_ND, *reference = inputs[5:]
        head, reference_head = Head(weight_VD, bias_V, scale, softcap), Head(*reference)
        out_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for chunk in head._chunks(len(hidden_ND)):
            log_q = reference_head._logits(reference_hidden_ND[chunk]).log_softmax(dim=1)
            log_p = head._logits(hidden_ND[chunk]).log_softmax(dim=1)
            q = log_q.exp()
            out_N[chunk] = q.mul_(log_q.sub_(log_p)).sum(dim=1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, reference_hidden_ND, *reference[:2])
        ctx.knobs, ctx.reference_knobs = (scale, softcap), reference[2:]
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_N: Tensor = grads[0]
        hidden_ND, weight_VD, bias_V, reference_hidden_ND, *reference = ctx.saved_tensors
        head, reference_head = Head(weight_VD, bias_V, *ctx.knobs), Head(*reference, *ctx.reference_knobs)

        def gradient_of(chunk: slice) -> Tensor:
            """grad * (p - q)"""
            q = torch.softmax(reference_head._logits(reference_hidden_ND[chunk]), dim=1)
            logits = head._logits(hidden_ND[chunk])
            gradient = torch.softmax(logits, dim=1).sub_(q).mul_(grad_N[chunk, None])
            return head._before_cap(gradient, logits)

        return *_gradients(ctx, head, hidden_ND, gradient_of), *(None,) * 7


def _add_product(total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
    """total += gradient^T hidden, in place; in bf16 slice by slice of the vocabulary, for a product of V x D is not small."""
    if gradient_NV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_NV.T, hidden_ND)
        return
    rows = max(1, _SLICE_NUMBERS // total_VD.shape[1])
    for start in range(0, len(total_VD), rows):
        total_VD[start : start + rows] += gradient_NV[:, start : start + rows].T @ hidden_ND


def _gradients(
    ctx: Any, head: Head, hidden_ND: Tensor, gradient_of: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden states, weight and bias, as far as they are asked for, from the gradient in `h W^T + b` of a chunk."""
    weight_VD, device = head.weight, hidden_ND.device
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
    total = sum_of(weight_VD) if needs_weight else None
    grad_weight = total
    if needs_weight and total is None:
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device)
    grad_bias = torch.zeros(len(weight_VD), dtype=torch.float32, device=device) if needs_bias else None
    for chunk in head._chunks(len(hidden_ND)):
        hidden = hidden_ND[chunk]
        gradient = gradient_of(chunk)
        if grad_bias is not None:
            grad_bias += gradient.sum(dim=0)
        compute = gradient.to(hidden.dtype)
        del gradient
        if grad_hidden is not None:
            grad_hidden[chunk] = compute @ weight_VD
        if grad_weight is not None:
            _add_product(grad_weight, compute, hidden)
        del compute  # before the next chunk makes its own
    weight_out = grad_weight.to(weight_VD.dtype) if grad_weight is not None and total is None else None
    bias_out = grad_bias.to(weight_VD.dtype) if grad_bias is not None else None
    return grad_hidden, weight_out, bias_out
