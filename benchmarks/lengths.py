"""prefopt beside TRL on rows of four kinds of lengths: how much sharing and packing bring depends on them.

    python benchmarks/lengths.py                                 # a small model with random weights, about 5 minutes on 2 cores
    python benchmarks/lengths.py --model smollm2-135m --steps 6 --batch 8
    python benchmarks/lengths.py --model llama-3.2-1b --step-tokens 32768 --micro-batch-tokens 16384 --trl-batch 0 \
      --steps 5 --warm-up 2 --together                           # on a GPU

Rows are random tokens, the same on both sides; so are the random weights, the optimizer and the numerics, and the loss of
each step is compared. Where all rows of a kind are alike TRL loses nothing to padding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapes import PROFILES, SHAPES, made_pairs
from sides import (
    HEADER,
    TRL_SIDES,
    Outcome,
    Task,
    as_row,
    comparison,
    config_of,
    measured_peak,
    run_side,
    run_together,
    table,
    unique_tokens,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help=f"a shape ({', '.join(SHAPES)}), or a model that prefopt loads")
    parser.add_argument("--lengths", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="pairs of one step")
    parser.add_argument(
        "--step-tokens", type=int, help="instead of --batch: about so many unique tokens, a power of 2 of pairs"
    )
    parser.add_argument(
        "--trl-batch",
        type=int,
        default=2,
        help="pairs of one forward pass of TRL, the rest is accumulated; 0: as many as keep each within --micro-batch-tokens",
    )
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL recomputes activations")
    parser.add_argument("--trl", nargs="*", default=["precomputed"], choices=TRL_SIDES)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank on both sides")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="prefopt's budget; 0: the device's own")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of prefopt")
    parser.add_argument("--warm-up", type=int, default=1, help="first steps that are not timed")
    parser.add_argument("--together", action="store_true", help="one process a side for all lengths: for GPUs")
    parser.add_argument("--timeout", type=float, help="seconds for all; what is not done by then is left out")
    parser.add_argument("--peak", type=float, help="operations a second that MFU refers to; by default measured")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    if not args.trl_batch and not args.micro_batch_tokens:
        parser.error("--trl-batch 0 needs --micro-batch-tokens")
    return args


def task_of(args: argparse.Namespace, name: str) -> Task:
    config = config_of(Task(args.model, [], steps=args.steps))
    vocabulary = int(config.get_text_config().vocab_size)
    batch = args.batch
    if args.step_tokens:
        some = made_pairs(PROFILES[name], 256, vocabulary, scale=args.scale)
        batch = power_of_2(args.step_tokens * len(some) / sum(group.unique_tokens for group in some))
    rows = [as_row(group) for group in made_pairs(PROFILES[name], args.steps * batch, vocabulary, scale=args.scale)]
    return Task(
        model=args.model,
        rows=rows,
        steps=args.steps,
        batch=batch,
        precision=args.precision,
        micro_batch_tokens=args.micro_batch_tokens,
        options=tuple(args.set),
        lora_rank=args.lora,
        trl_batch=args.trl_batch or pairs_within(rows, batch, args.micro_batch_tokens),
        trl_checkpointing=args.trl_checkpointing,
        warm_up=args.warm_up,
    )


def power_of_2(value: float) -> int:
    """The largest power of 2 up to `value`, at least 1."""
    return int(2 ** max(0, math.floor(math.log2(value))))


def pairs_within(rows: list[dict[str, Any]], batch: int, tokens: int) -> int:
    """The largest divisor of `batch` with which all padded passes over `rows` have at most `tokens`; 1 where none has."""
    longest = [len(row["prompt"]) + max(map(len, row["responses"])) for row in rows]

    def largest_pass(pairs: int) -> int:
        return max(2 * pairs * max(longest[at : at + pairs]) for at in range(0, len(rows), pairs))

    fitting = [pairs for pairs in range(1, batch + 1) if batch % pairs == 0 and largest_pass(pairs) <= tokens]
    return max(fitting, default=1)


def run(args: argparse.Namespace, tasks: list[Task]) -> list[list[Outcome]]:
    """Outcomes of each task, prefopt's first."""
    until = None if args.timeout is None else time.monotonic() + args.timeout

    def left() -> float | None:
        return None if until is None else max(1.0, until - time.monotonic())

    sides = ("prefopt", *(f"trl-{setting}" for setting in args.trl))
    if args.together:
        of_sides = [run_together(tasks, side, timeout=left()) for side in sides]
        return [list(of_task) for of_task in zip(*of_sides, strict=True)]
    return [[run_side(task, side, timeout=left()) for side in sides] for task in tasks]


def main() -> None:
    args = parse()
    peak, dtype = (args.peak, args.precision) if args.peak else measured_peak(args.precision)
    tasks = [task_of(args, name) for name in args.lengths]
    of_tasks = run(args, tasks)
    if args.json:
        figures = {
            name: [asdict(outcome) for outcome in outcomes] for name, outcomes in zip(args.lengths, of_tasks, strict=True)
        }
        args.json.write_text(json.dumps({"model": args.model, "peak_flops": peak, "lengths": figures}, indent=2) + "\n")
    rows = []
    for name, task, outcomes in zip(args.lengths, tasks, of_tasks, strict=True):
        rows += [[name, str(task.batch), f"{unique_tokens(task):.0f}", *row] for row in comparison(task, outcomes, peak)]
    print(
        f"{args.model}{f', LoRA of rank {args.lora}' if args.lora else ''}, {args.steps} steps, the first {args.warm_up} untimed,"
        f" lengths x {args.scale:g}, {dtype}; a matrix product at its peak: {peak / 1e9:,.0f} GFLOP/s\n"
    )
    print(table(("rows", "pairs a step", "unique tokens a pair", *HEADER), rows))
    errors = {outcome.error for outcomes in of_tasks for outcome in outcomes if outcome.error}
    for error in sorted(errors):
        print(f"\n{error}", file=sys.stderr)


if __name__ == "__main__":
    main()
