"""Sampling against transformers' own generate(): the same model, precision, prompts, limits and number of responses at once.

    python benchmarks/sampling.py                          # SmolLM2-135M, n = 4 and 8, a few minutes on two cores
    python benchmarks/sampling.py --full                   # all prompts of the file, up to 256 new tokens
    python benchmarks/sampling.py --model PATH --prompts koala.jsonl --max-new-tokens 512

Each measurement is a process of its own; the sides alternate, and the fastest of `--repeats` counts. generate() is called
with num_return_sequences=n on left-padded batches of prompts sorted by length, with top_k=0 and the model's other
generation settings set aside, for it would draw from another distribution with them. Tokens behind the end of a
response are not counted. The peak is the largest resident memory of the whole process (on CUDA: allocated memory). A
short greedy run of both sides is compared token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.core.progress import set_quiet
from prefopt.data.encode import end_of_turn_ids
from prefopt.model.load import load_model, load_tokenizer, model_folder
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.rollout.prompts import read_prompts
from prefopt.rollout.sample import sample, tokens_of

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SIDES = ("prefopt", "transformers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", default="mt_bench.jsonl", help="a file of shared/data/prompts")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("-n", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch-size", type=int, default=32, help="responses at once")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.full:
        args.count, args.max_new_tokens = 1000, 256
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: a greedy run on four prompts, which also warms up, then the timed one."""
    set_quiet(True)
    prompts = read_prompts(SHARED / "data" / "prompts" / args.prompts)[: args.count]
    respond = with_prefopt(args) if args.side == "prefopt" else with_transformers(args)
    greedy = respond(prompts[:4], 1, 0.0, min(args.max_new_tokens, 32))
    started, used = time.monotonic(), time.process_time()
    responses = respond(prompts, args.n[0], 1.0, args.max_new_tokens)
    seconds, processor = time.monotonic() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "responses": len(responses),
        "tokens": sum(map(len, responses)),
        "peak": peak,
        "greedy": greedy,
    }


def with_prefopt(args: argparse.Namespace) -> Any:
    model = load_model(args.model, precision=args.precision)

    def respond(prompts: Any, n: int, temperature: float, max_new_tokens: int) -> list[list[int]]:
        rows = sample(model, prompts, n=n, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=args.batch_size)
        return [row.response_ids.tolist() for row in rows]

    return respond


def with_transformers(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer, device = load_tokenizer(args.model), pick_device()
    dtype = compute_dtype(args.precision, device)[0]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_folder(args.model), dtype=dtype, attn_implementation="sdpa")
    model = loaded.to(device).eval()
    model.generation_config = GenerationConfig()
    ends = end_of_turn_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]

    def respond(prompts: Any, n: int, temperature: float, max_new_tokens: int) -> list[list[int]]:
        choice: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        )
        ids = tokens_of(prompts, tokenizer, template="auto")
        order = sorted(range(len(ids)), key=lambda at: -len(ids[at]))
        found: dict[int, list[list[int]]] = {}
        together = max(1, args.batch_size // n)
        for start in range(0, len(order), together):
            batch = order[start : start + together]
            width = max(len(ids[at]) for at in batch)
            tokens = np.stack([np.pad(ids[at], (width - len(ids[at]), 0), constant_values=pad) for at in batch]).astype(
                np.int64
            )
            mask = np.stack([np.arange(width) >= width - len(ids[at]) for at in batch]).astype(np.int64)
            output = model.generate(
                input_ids=torch.from_numpy(tokens).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max_new_tokens,
                num_return_sequences=n,
                eos_token_id=list(ends),
                pad_token_id=pad,
                **choice,
            )
            for place, row in enumerate(output[:, width:].tolist()):
                stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
                found.setdefault(batch[place // n], []).append(row[:stop])
        return [response for at in range(len(ids)) for response in found[at]]

    return respond


def one_side(side: str, n: int) -> dict[str, Any]:
    words = sys.argv[1:]
    command = [sys.executable, __file__, *words, "-n", str(n), "--side", side]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    args = parse()
    if args.side:
        print(json.dumps(measure(args)))
        return
    print(f"{args.model}, {args.prompts}, {args.batch_size} responses at once, up to {args.max_new_tokens} new tokens")
    print("| n | side | responses/s | new tokens/s | processor s per 1,000 tokens | peak, GiB | tokens a response |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for n in args.n:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side in SIDES:
                runs[side].append(one_side(side, n))
        best = {side: min(found, key=lambda run: run["seconds"] / run["tokens"]) for side, found in runs.items()}
        for side, run in best.items():
            rate, processor = (
                run["tokens"] / run["seconds"],
                min(1000 * r["processor_seconds"] / r["tokens"] for r in runs[side]),
            )
            print(
                f"| {n} | {side} | {run['responses'] / run['seconds']:.2f} | {rate:.1f} | {processor:.2f} "
                f"| {run['peak'] / 2**30:.2f} | {run['tokens'] / run['responses']:.0f} |"
            )
        ours, theirs = (best[side]["greedy"] for side in SIDES)
        times = {
            what: min(run[what] / run["tokens"] for run in runs["transformers"])
            / min(run[what] / run["tokens"] for run in runs["prefopt"])
            for what in ("seconds", "processor_seconds")
        }
        print(
            f"\nn = {n}: {times['seconds']:.2f} times as many tokens a second, {times['processor_seconds']:.2f} a processor second"
        )
        equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
        print(f"greedy: {equal} of {len(ours)} responses equal, token for token\n", flush=True)


if __name__ == "__main__":
    main()
