"""The vocabulary head: log-probs of scored tokens forward and backward, by every implementation that is installed.

    python benchmarks/head.py                                    # SmolLM2's head on a CPU, Llama-3.2-1B's and Qwen3-0.6B's on a GPU
    python benchmarks/head.py --tokens 4096 --hidden 2048 --vocabulary 128256 --chunks 23 25 27

Values and gradients are compared with full logits in fp32 on the same inputs; the gradient that arrives has both signs, as
that of a preference loss, so that a kernel which takes it for all ones is seen to be wrong. Time is the best of --repeats;
memory is what a pass allocates beyond its inputs and the two gradients that it returns (CUDA only). The share of the
peak counts 6 operations a weight and token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sides import table
from torch import Tensor

from prefopt.model import head as head_module
from prefopt.model.head import Head
from prefopt.model.precision import matmul_flops, pick_device

SIZES = {"cpu": [(512, 576, 49152)], "cuda": [(4096, 2048, 128256), (4096, 1024, 151936)]}
HEADER = ("N", "D", "V", "implementation", "ms", "of the peak", "MiB beyond", "log-probs differ by", "gradients differ by")
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="scored tokens")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--chunks", type=int, nargs="+", default=[25], help="logits held at once, as powers of two")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-compiled", action="store_true", help="leave out what torch.compile makes")
    parser.add_argument("--json", type=Path, help="write each row to this file as well, one line each")
    return parser.parse_args()


def dense(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """All logits at once, log-softmax in fp32."""
    logits = torch.nn.functional.linear(hidden_ND, weight_VD).float()
    return torch.log_softmax(logits, dim=1).gather(1, target_N[:, None])[:, 0]


def ours(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return Head(weight_VD).logps(hidden_ND, target_N)


@torch.compile(dynamic=True)
def _forward_chunk(hidden: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight_VD).float()
    total = logits.logsumexp(dim=1)
    return logits.gather(1, target[:, None])[:, 0] - total, total


@torch.compile(dynamic=True)
def _gradient_chunk(hidden: Tensor, weight_VD: Tensor, target: Tensor, total: Tensor, grad: Tensor) -> Tensor:
    """Gradient in the logits of one chunk, in the dtype of the products that follow."""
    logits = torch.nn.functional.linear(hidden, weight_VD).float()
    columns = torch.arange(len(weight_VD), device=target.device)
    hit = (columns[None, :] == target[:, None]).float()
    return (grad[:, None] * (hit - torch.exp(logits - total[:, None]))).to(hidden.dtype)


class _Compiled(torch.autograd.Function):
    """The same chunks as prefopt's head with the work between its matrix products in one compiled kernel each."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        out_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        total_N = torch.empty_like(out_N)
        for chunk in _chunks(len(hidden_ND), len(weight_VD)):
            out_N[chunk], total_N[chunk] = _forward_chunk(hidden_ND[chunk], weight_VD, target_N[chunk])
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, total_N)
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        hidden_ND, weight_VD, target_N, total_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for chunk in _chunks(len(hidden_ND), len(weight_VD)):
            gradient = _gradient_chunk(hidden_ND[chunk], weight_VD, target_N[chunk], total_N[chunk], grads[0][chunk])
            grad_hidden[chunk] = gradient @ weight_VD
            if gradient.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, hidden_ND[chunk])
            else:
                grad_weight += gradient.T @ hidden_ND[chunk]
            del gradient  # before the next one is made
        return grad_hidden, grad_weight.to(weight_VD.dtype), None


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    rows = max(1, _chunk_logits() // vocabulary)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _chunk_logits() -> int:
    return head_module._CHUNK_LOGITS.get(pick_device().type, head_module._CHUNK_LOGITS_ELSEWHERE)


@contextmanager
def chunks_of(logits: int) -> Iterator[None]:
    """Within it a chunk of prefopt's head holds this many logits."""
    before = head_module._CHUNK_LOGITS
    head_module._CHUNK_LOGITS = {pick_device().type: logits}
    try:
        yield
    finally:
        head_module._CHUNK_LOGITS = before


def compiled(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Compiled.apply
    return apply(hidden_ND, weight_VD, target_N)


def liger(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_ND, target_N)


def cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Without a threshold no gradient is dropped for being small.
    return -linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none", filter_eps=None)


def implementations(device: torch.device, args: argparse.Namespace) -> Iterator[tuple[str, LogProbs, int]]:
    """(name, function, logits of a chunk) of each, and a line for what cannot run here."""
    yield "dense", dense, _chunk_logits()
    for power in args.chunks:
        yield f"prefopt, chunks of 2^{power}", ours, 2**power
        if not args.skip_compiled:
            yield f"compiled, chunks of 2^{power}", compiled, 2**power
    for name, package, function in (
        ("liger-kernel", "liger_kernel", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
    ):
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed", flush=True)
        elif device.type != "cuda":
            print(f"{name}: needs a GPU", flush=True)
        else:
            yield name, function, _chunk_logits()


class Inputs:
    """Hidden states and a weight whose logits are of the order of 1, targets, and a gradient of both signs."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        random = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=random)

        self.hidden = normal(tokens, hidden).to(dtype).requires_grad_()
        self.weight = (normal(vocabulary, hidden) * hidden**-0.5).to(dtype).requires_grad_()
        self.target = torch.randint(0, vocabulary, (tokens,), device=device, generator=random)
        self.grad = normal(tokens) / tokens

    def passes(self, function: LogProbs) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and their gradients in hidden states and weight."""
        logps = function(self.hidden, self.weight, self.target)
        grad_hidden, grad_weight = torch.autograd.grad(logps, (self.hidden, self.weight), self.grad)
        return logps.detach(), grad_hidden, grad_weight

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same from full logits in fp32, in pieces of the tokens."""
        weight = self.weight.detach().float().requires_grad_()
        values, grads = [], []
        total = torch.zeros_like(weight)
        for start in range(0, len(self.hidden), 256):
            part = slice(start, start + 256)
            hidden = self.hidden.detach()[part].float().requires_grad_()
            logps = dense(hidden, weight, self.target[part])
            grad_hidden, grad_weight = torch.autograd.grad(logps, (hidden, weight), self.grad[part])
            total += grad_weight
            values.append(logps.detach())
            grads.append(grad_hidden)
        return torch.cat(values), torch.cat(grads), total


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((found.float() - wanted).norm() / wanted.norm())


def measured(inputs: Inputs, function: LogProbs, truth: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, float]:
    """Seconds, bytes beyond inputs and results, and deviations of one implementation."""
    cuda = inputs.hidden.is_cuda
    found = inputs.passes(function)
    deviations = [relative(ours, wanted) for ours, wanted in zip(found[1:], truth[1:], strict=True)]
    values = float((found[0].float() - truth[0]).abs().max())
    kept = sum(part.nbytes for part in found)
    del found
    best, peak = float("inf"), float("nan")
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        inputs.passes(function)
        if cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before - kept
        best = min(best, time.perf_counter() - started)
    return {"seconds": best, "beyond": peak, "values": values, "gradients": max(deviations)}


def rows_of(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, args: argparse.Namespace, peak: float
) -> Iterator[list[str]]:
    tokens, hidden, vocabulary = size
    inputs = Inputs(tokens, hidden, vocabulary, dtype, device)
    truth = inputs.truth()
    for name, function, logits in implementations(device, args):
        labels = [str(tokens), str(hidden), str(vocabulary), name]
        try:
            with chunks_of(logits):
                found = measured(inputs, function, truth, args.repeats)
        except Exception as error:  # one that fails here does not end the others
            yield [*labels, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "", "", "", ""]
            continue
        share = 6 * tokens * hidden * vocabulary / found["seconds"] / peak
        beyond = f"{found['beyond'] / 2**20:.0f}" if found["beyond"] == found["beyond"] else ""
        yield [
            *labels,
            f"{1000 * found['seconds']:.1f}",
            f"{share:.0%}",
            beyond,
            f"{found['values']:.1e}",
            f"{found['gradients']:.1e}",
        ]


def main() -> None:
    args = parse()
    device = pick_device()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    peak = matmul_flops(device, dtype, size=8192 if device.type == "cuda" else 1024)
    given = (args.tokens, args.hidden, args.vocabulary)
    sizes = [given] if all(given) else SIZES.get(device.type, SIZES["cpu"])
    rows = []
    for size in sizes:
        for row in rows_of(size, dtype, device, args, peak):
            rows.append(row)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n")
    print(f"forward and backward of the head, {dtype}, {device.type}; a matrix product: {peak / 1e9:,.0f} GFLOP/s\n")
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
