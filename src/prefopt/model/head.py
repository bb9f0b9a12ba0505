"""Log-probs and other statistics of the scored tokens from hidden states, in chunks of tokens: logits of N x V never exist.

Logits are made in fp32 chunk by chunk. What a backward pass needs of them, the gradient of the results in the logits, is made
in the compute dtype block by block: once, in forward, where all of it may be kept, else again in backward. Where the head does
not train (LoRA), forward makes the gradient in the hidden states instead, whatever the number of tokens.

Shapes: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.core.errors import ModelError
from prefopt.model.tables import sum_of

# Logits in fp32 at once, and bytes of a block of their gradient. On a CPU less than 64 MiB, which the allocator finds again:
# larger tensors are mapped anew each time, and to write on new pages takes longer than the products that fill them.
_CHUNK_LOGITS = {"cpu": 15 * 2**20}
_CHUNK_LOGITS_ELSEWHERE = 2**25
_BLOCK_BYTES = {"cpu": 60 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 2**27
_KEPT_BYTES = 2**27  # of all blocks, from forward to backward
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
        apply: Callable[..., Tensor] = _ChunkedLogProb.apply
        return apply(hidden_ND, self.weight, self.bias, self.scale, self.softcap, target_N, torch.is_grad_enabled())

    @torch.no_grad()
    def log_square(self, hidden_ND: Tensor) -> Tensor:
        """log sum_v p_v^2 of each position in nats, shape (N,), fp32, without a gradient.

        From -log V (uniform) to 0 (certain). The sum is the mean probability of a token drawn from the policy itself, by
        which WPO (arXiv 2406.11827) divides a token's probability so that an entropy of the policy is not a low weight.
        """
        out_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for chunk in self._chunks(hidden_ND):
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

    def _chunks(self, hidden_ND: Tensor, block: slice | None = None) -> list[slice]:
        """Positions whose logits in fp32 are held at once, of a block or of all."""
        limit = _CHUNK_LOGITS.get(hidden_ND.device.type, _CHUNK_LOGITS_ELSEWHERE)
        return _cut(block or slice(0, len(hidden_ND)), max(1, limit // len(self.weight)))

    def _blocks(self, hidden_ND: Tensor) -> list[slice]:
        """Positions whose gradient in the logits is made at once."""
        limit = _BLOCK_BYTES.get(hidden_ND.device.type, _BLOCK_BYTES_ELSEWHERE)
        return _cut(slice(0, len(hidden_ND)), max(1, limit // (len(self.weight) * hidden_ND.element_size())))

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

    def _slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the logits in h W^T + b but for the scale; None where it is 1."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1)

    def _log_prob_gradient(self, probabilities: Tensor, target_N: Tensor, slope: Tensor | None) -> Tensor:
        """(onehot - softmax) * slope * scale: the gradient of each log-prob in h W^T + b, in place of `probabilities`."""
        gradient = probabilities.neg_()
        gradient.scatter_add_(1, target_N[:, None], torch.ones_like(gradient[:, :1]))
        return self._before_cap(gradient, slope)

    def _before_cap(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Gradient in the logits -> gradient in h W^T + b, in place."""
        if slope is not None:
            gradient *= slope
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class _Pieces:
    """How hidden states are cut into blocks and chunks, and where a chunk's logits are made in fp32: in the rows of its block that
    their gradient takes, if that is fp32 too, else in one place for all chunks."""

    def __init__(self, head: Head, hidden_ND: Tensor) -> None:
        self.head, self.hidden_ND = head, hidden_ND
        self.blocks = head._blocks(hidden_ND)
        self.in_place = hidden_ND.dtype == torch.float32
        self._room: Tensor | None = None

    def chunks(self, block: slice) -> list[slice]:
        return self.head._chunks(self.hidden_ND, block)

    def new(self, block: slice) -> Tensor:
        """Place for the gradient of a block in the logits."""
        return self._empty(block.stop - block.start, self.hidden_ND.dtype)

    def place(self, rows: Tensor | None) -> Tensor:
        """Where the logits of a chunk are made; `rows` of its block, if there is one."""
        if rows is not None and self.in_place:
            return rows
        if self._room is None:  # made anew for each chunk, blocks of this size would lie side by side
            longest = max(chunk.stop - chunk.start for block in self.blocks for chunk in self.chunks(block))
            self._room = self._empty(longest, torch.float32)
        return self._room

    def store(self, gradient: Tensor, rows: Tensor) -> None:
        """Put what was made in `place(rows)` into `rows`."""
        if not self.in_place:
            rows.copy_(gradient)

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, len(self.head.weight), dtype=dtype, device=self.hidden_ND.device)


def head_of(model: Any) -> Head:
    """The head of a transformers causal language model, with the scaling that its configuration asks for."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(output.weight, getattr(output, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


class _ChunkedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        target_N: Tensor,
        learning: bool,
    ) -> Tensor:
        head = Head(weight_VD, bias_V, scale, softcap)
        out_N, total_N = (torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device) for _ in range(2))
        trains = learning and any(ctx.needs_input_grad[1:3])
        keeps = trains and len(hidden_ND) * len(weight_VD) * hidden_ND.element_size() <= _KEPT_BYTES
        through = torch.empty_like(hidden_ND) if learning and ctx.needs_input_grad[0] and not trains else None
        pieces = _Pieces(head, hidden_ND)
        kept: list[Tensor] = []
        for block in pieces.blocks:
            kept += [pieces.new(block)] if keeps else []
            for chunk in pieces.chunks(block):
                rows = kept[-1][chunk.start - block.start : chunk.stop - block.start] if keeps else None
                logits = head._logits(hidden_ND[chunk], pieces.place(rows))
                of_target = logits.gather(1, target_N[chunk, None])[:, 0]
                slope = head._slope(logits) if keeps or through is not None else None
                largest = logits.amax(dim=1)
                sums = logits.sub_(largest[:, None]).exp_().sum(dim=1)  # torch.logsumexp makes a second tensor of this size
                total_N[chunk] = sums.log().add_(largest)
                out_N[chunk] = of_target - total_N[chunk]
                if keeps or through is not None:
                    gradient = head._log_prob_gradient(logits.div_(sums[:, None]), target_N[chunk], slope)
                if through is not None:
                    through[chunk] = gradient.to(hidden_ND.dtype) @ weight_VD
                elif rows is not None:
                    pieces.store(gradient, rows)
        if through is not None:
            ctx.save_for_backward(through)
        else:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, total_N, *kept)
        ctx.scale, ctx.softcap = scale, softcap
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        first_ND, *others = ctx.saved_tensors
        if not others:
            return (first_ND * grads[0][:, None]).to(first_ND.dtype), *(None,) * 6
        hidden_ND, (weight_VD, bias_V, target_N, total_N, *kept) = first_ND, others
        head = Head(weight_VD, bias_V, ctx.scale, ctx.softcap)

        def gradient_of(chunk: slice, room: Tensor) -> Tensor:
            logits = head._logits(hidden_ND[chunk], room)
            slope = head._slope(logits)
            return head._log_prob_gradient(logits.sub_(total_N[chunk, None]).exp_(), target_N[chunk], slope)

        return *_gradients(ctx, head, hidden_ND, grads[0], gradient_of, kept), *(None,) * 4


class _ChunkedKL(torch.autograd.Function):
    """Backward computes the logits of both sides again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden_ND, weight_VD, bias_V, scale, softcap = inputs[:5]
        reference_hidden_ND, *reference = inputs[5:]
        head, reference_head = Head(weight_VD, bias_V, scale, softcap), Head(*reference)
        out_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for chunk in head._chunks(hidden_ND):
            log_q = reference_head._logits(reference_hidden_ND[chunk]).log_softmax(dim=1)
            log_p = head._logits(hidden_ND[chunk]).log_softmax(dim=1)
            q = log_q.exp()
            out_N[chunk] = q.mul_(log_q.sub_(log_p)).sum(dim=1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, reference_hidden_ND, *reference[:2])
        ctx.knobs, ctx.reference_knobs = (scale, softcap), reference[2:]
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, reference_hidden_ND, *reference = ctx.saved_tensors
        head, reference_head = Head(weight_VD, bias_V, *ctx.knobs), Head(*reference, *ctx.reference_knobs)

        def gradient_of(chunk: slice, room: Tensor) -> Tensor:
            """(p - q) * slope * scale"""
            q = torch.softmax(reference_head._logits(reference_hidden_ND[chunk]), dim=1)
            logits = head._logits(hidden_ND[chunk])
            gradient = torch.sub(torch.softmax(logits, dim=1), q, out=room[: len(q)])
            return head._before_cap(gradient, head._slope(logits))

        return *_gradients(ctx, head, hidden_ND, grads[0], gradient_of), *(None,) * 7


def _cut(positions: slice, most: int) -> list[slice]:
    """Slices of `positions` of nearly equal length, `most` at most."""
    length = positions.stop - positions.start
    rows = -(-length // max(1, -(-length // most)))
    rows = max(1, min(most, -(-rows // 8) * 8))  # see even_tokens
    return [slice(start, min(start + rows, positions.stop)) for start in range(positions.start, positions.stop, rows)]


def _add_product(total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
    """total += gradient^T hidden, in place; in bf16 slice by slice of the vocabulary, for a product of V x D is not small."""
    if gradient_NV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_NV.T, hidden_ND)
        return
    rows = max(1, _SLICE_NUMBERS // total_VD.shape[1])
    for start in range(0, len(total_VD), rows):
        total_VD[start : start + rows] += gradient_NV[:, start : start + rows].T @ hidden_ND


def _gradients(
    ctx: Any,
    head: Head,
    hidden_ND: Tensor,
    grad_N: Tensor,
    gradient_of: Callable[[slice, Tensor], Tensor],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden states, weight and bias, as far as they are asked for.

    `gradient_of(chunk, room)` makes the gradient of the results of a chunk in `h W^T + b`, fp32, in the first rows of `room`;
    `kept` is that of each block where it is known already, in the compute dtype. What arrives, `grad_N`, multiplies whole rows
    of it, and so is applied to the smaller factors and results of the products instead.
    """
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    weight_VD, dtype, device = head.weight, hidden_ND.dtype, hidden_ND.device
    grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
    total = sum_of(weight_VD) if needs_weight else None
    grad_weight = total
    if needs_weight and total is None:
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device)
    grad_bias = torch.zeros(len(weight_VD), dtype=torch.float32, device=device) if needs_bias else None
    pieces = _Pieces(head, hidden_ND)
    made = None if kept or not pieces.blocks else pieces.new(pieces.blocks[0])  # the longest
    for number, block in enumerate(pieces.blocks):
        gradient = kept[number] if made is None else made[: block.stop - block.start]
        for chunk in pieces.chunks(block) if made is not None else []:
            rows = gradient[chunk.start - block.start : chunk.stop - block.start]
            pieces.store(gradient_of(chunk, pieces.place(rows)), rows)
        hidden, grad = hidden_ND[block], grad_N[block, None]
        if grad_bias is not None:
            grad_bias += (gradient.T @ grad.to(dtype))[:, 0]
        if grad_hidden is not None:
            grad_hidden[block] = (gradient @ weight_VD) * grad
        if grad_weight is not None:
            _add_product(grad_weight, gradient, (hidden * grad).to(dtype))
    weight_out = grad_weight.to(weight_VD.dtype) if grad_weight is not None and total is None else None
    bias_out = grad_bias.to(weight_VD.dtype) if grad_bias is not None else None
    return grad_hidden, weight_out, bias_out
