"""Shared-prefix attention by every backend of the device, forward and backward, beside rows that repeat the prompt.

    python benchmarks/attention.py                               # on a GPU: the heads of Llama-3.2-1B, 16,384 packed tokens
    python benchmarks/attention.py --heads 16 8 128 --tokens 32768

Outputs and gradients are compared with the backend "segments" in fp32 on the same inputs; the difference is the norm of what
differs over the norm of what is wanted. TFLOP/s count the attended pairs of tokens once, for the rows that repeat prompts
as well: they compute more for the same use. Those rows are causal SDPA of torch over equal lengths, without any padding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shapes import PROFILES, made_group, made_pairs
from sides import table
from torch import Tensor

from prefopt.data.encode import TokenGroup
from prefopt.model import attention
from prefopt.model.attention_request import Request
from prefopt.model.batch import packed_batch
from prefopt.model.layout import Layout, use_layout
from prefopt.model.precision import pick_device
from prefopt.train.flops import attended_pairs

HEADER = ("groups", "tokens", "backend", "forward ms", "and backward ms", "TFLOP/s", "output differs by", "gradients differ by")
KINDS = (*PROFILES, "8 responses of 200, prompt 2000")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def parse() -> argparse.Namespace:
    cuda = pick_device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--tokens", type=int, default=16384 if cuda else 2048, help="packed tokens, as many as whole groups fill"
    )
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.25, help="factor of all lengths")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], metavar=("QUERY", "KEY", "SIZE"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--backends", nargs="+", default=list(attention.BACKENDS), choices=list(attention.BACKENDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write each row to this file as well, one line each")
    return parser.parse_args()


def groups_of(kind: str, tokens: int, scale: float) -> list[TokenGroup]:
    """Groups of this kind, as many as fit into `tokens`, at least one."""
    if kind in PROFILES:
        drawn = made_pairs(PROFILES[kind], 2000, 500, scale=scale)
    else:
        random = np.random.default_rng(0)
        drawn = [made_group(random, 500, int(2000 * scale), [int(200 * scale)] * 8) for _ in range(100)]
    lengths = np.cumsum([group.unique_tokens for group in drawn])
    return drawn[: max(1, int((lengths <= tokens).sum()))]


def along(layout: Layout, backend: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with use_layout(layout), attention.use_backend(backend):
            return attention.attention(torch.nn.Module(), query, key, value, None)[0]

    return attend


def repeated(groups: Sequence[TokenGroup], heads: Sequence[int], like: Tensor) -> tuple[list[Tensor], Attend]:
    """Inputs and function of one causal call over (responses, longest row): what a trainer makes that shares nothing."""
    rows = [len(group.prompt_ids) + len(ids) for group in groups for ids in group.response_ids]
    longest = max(1, round(sum(rows) / len(rows)))
    query, key = (
        torch.randn(len(rows), number, longest, heads[2], device=like.device, dtype=like.dtype).requires_grad_()
        for number in heads[:2]
    )
    value = torch.randn_like(key).requires_grad_()
    return [query, key, value], lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(attend: Attend, inputs: Sequence[Tensor], gradient: Tensor | None, repeats: int) -> tuple[float, float]:
    """Best seconds of a forward pass and of forward and backward."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats + 1):  # the first compiles
        _wait(inputs[0])
        started = time.perf_counter()
        output = attend(*inputs)
        _wait(output)
        forward = time.perf_counter() - started
        torch.autograd.grad(output, list(inputs), torch.ones_like(output) if gradient is None else gradient)
        _wait(output)
        best = [min(best[0], forward), min(best[1], time.perf_counter() - started)]
    return best[0], best[1]


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def rows_of(kind: str, args: argparse.Namespace, device: torch.device) -> Iterator[list[str]]:
    groups = groups_of(kind, args.tokens, args.scale)
    layout = packed_batch(groups, device).layout
    assert layout is not None
    queries, keys, size = args.heads
    torch.manual_seed(0)
    truth = [
        torch.randn(1, number, layout.tokens, size, device=device).to(DTYPES[args.dtype]) for number in (queries, keys, keys)
    ]
    gradient = torch.randn(1, layout.tokens, queries, size, device=device).to(DTYPES[args.dtype])
    exact = [part.float().requires_grad_() for part in truth]
    wanted = along(layout, "segments")(*exact)
    wanted_grads = torch.autograd.grad(wanted, exact, gradient.float())
    wanted = wanted.detach()
    operations = 12.0 * queries * size * sum(attended_pairs(group) for group in groups)
    labels = [kind, f"{layout.tokens:,}"]
    request = Request(device, DTYPES[args.dtype], size, size, gradient=True)
    for backend in args.backends:
        why = attention.BACKENDS[backend].unsupported(request)
        if why is not None:
            yield [*labels, backend, why[:80], "", "", "", ""]
            continue
        inputs = [part.clone().requires_grad_() for part in truth]
        try:
            output = along(layout, backend)(*inputs)
            grads = torch.autograd.grad(output, inputs, gradient)
            differs = max(relative(ours, theirs) for ours, theirs in zip(grads, wanted_grads, strict=True))
            of_output = relative(output.detach(), wanted)
            seconds = timed(along(layout, backend), inputs, gradient, args.repeats)
        except Exception as error:  # one that fails here does not end the others
            yield [*labels, backend, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "", "", "", ""]
            continue
        yield [*labels, backend, *_speeds(seconds, operations), f"{of_output:.1e}", f"{differs:.1e}"]
    try:
        separate, attend = repeated(groups, args.heads, truth[0])
        seconds = timed(attend, separate, None, args.repeats)
        yield [*labels, "prompts repeated, SDPA", *_speeds(seconds, operations), "", ""]
    except Exception as error:  # as above
        yield [*labels, "prompts repeated, SDPA", f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "", "", "", ""]


def _speeds(seconds: tuple[float, float], operations: float) -> list[str]:
    return [f"{1000 * seconds[0]:.2f}", f"{1000 * seconds[1]:.2f}", f"{operations / seconds[1] / 1e12:.3g}"]


def main() -> None:
    args = parse()
    device = pick_device()
    rows = []
    for kind in args.groups:
        for row in rows_of(kind, args, device):
            rows.append(row)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n")
    heads = "{} query heads, {} key heads of size {}".format(*args.heads)
    print(f"{heads}, {args.dtype}, {device.type}, lengths x {args.scale:g}\n\n{table(HEADER, rows)}")


if __name__ == "__main__":
    main()
