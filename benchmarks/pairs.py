"""prefopt beside TRL's DPOTrainer: the same pairs in the same order, the same model, optimizer and numerics.

    python benchmarks/pairs.py --steps 20            # HH helpful-base, SmolLM2-135M-Instruct, both TRL settings
    python benchmarks/pairs.py --steps 20 --data ../shared/data/ultrafeedback/train_clean.jsonl --max-tokens 1024
    python benchmarks/pairs.py --steps 20 --trl precomputed

Each side is a process of its own, so that its peak memory is its own. Pairs per second are those of the training
steps after the first; the reference pass is timed apart. The loss of every step is compared: equal work. Compute is
bf16 with fp32 masters where the machine multiplies bf16 in hardware, else fp32, on both sides. MFU is over unique tokens
for both sides (prefopt.train.flops), against a large matrix product measured just before.
On a CPU, TRL's head scores every position; on CUDA it has a fused kernel that scores completions only. On CUDA TRL takes
flash attention and liger's layers where they are installed, and as many pairs a pass as --trl-batch says and fit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sides import HEADER, SHARED, TRL_SIDES, Task, as_row, comparison, measured_peak, run_side, table, unique_tokens

HH = SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default=str(HH))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="pairs of one step")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--trl-batch", type=int, default=4, help="pairs of one forward pass of TRL; the rest is accumulated")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="rows whose prompt and longer response exceed this are left out"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="prefopt's budget; 0: the device's own")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--trl", nargs="*", default=list(TRL_SIDES), choices=TRL_SIDES)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of prefopt")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args()


def select_rows(data: str, model: str, wanted: int, max_tokens: int) -> list[dict[str, Any]]:
    """The first pairs that fit and whose text TRL and prefopt cut into the same tokens."""
    from prefopt.core.progress import set_quiet
    from prefopt.data.encode import encode_groups
    from prefopt.data.groups import GroupSet
    from prefopt.data.load import load_groups
    from prefopt.data.transcripts import join_hh
    from prefopt.model.load import load_tokenizer

    set_quiet(True)
    tokenizer = load_tokenizer(model)
    groups = load_groups(data, max_rows=8 * wanted)
    encoded = encode_groups(GroupSet(groups.groups), tokenizer, template="plain")
    texts = {group.source: group for group in groups.groups}
    rows = []
    for tokens in encoded.groups:
        if len(tokens.prompt_ids) + max(map(len, tokens.response_ids)) > max_tokens:
            continue
        group = texts[tokens.source]
        prompt = join_hh(group.prompt) + "\n\nAssistant:" if group.form == "hh" else group.prompt[0].content
        space = " " if group.form == "hh" else ""
        responses = [space + response[-1].content for response in group.responses]
        joined = [tokenizer(prompt + text + tokenizer.eos_token)["input_ids"] for text in responses]
        ours = [[*tokens.prompt_ids.tolist(), *ids.tolist()] for ids in tokens.response_ids]
        if joined == ours and tokenizer(prompt)["input_ids"] == tokens.prompt_ids.tolist():
            rows.append(as_row(tokens, [prompt, *responses]))
    if len(rows) < wanted:
        raise SystemExit(f"{data}: only {len(rows)} of {wanted} pairs fit {max_tokens} tokens")
    return rows[:wanted]


def main() -> None:
    args = parse()
    task = Task(
        model=args.model,
        rows=select_rows(args.data, args.model, args.steps * args.batch, args.max_tokens),
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        beta=args.beta,
        precision=args.precision,
        micro_batch_tokens=args.micro_batch_tokens,
        options=tuple(args.set),
        trl_batch=args.trl_batch,
    )
    peak, dtype = measured_peak(args.precision)
    outcomes = [run_side(task, side) for side in ("prefopt", *(f"trl-{setting}" for setting in args.trl))]
    print(
        f"{len(task.rows)} pairs of {unique_tokens(task):.0f} unique tokens on average, {task.batch} a step, {task.steps} steps,"
        f" {dtype}; a matrix product at its peak: {peak / 1e9:,.0f} GFLOP/s\n"
    )
    print(table(HEADER, comparison(task, outcomes, peak)))
    for outcome in outcomes:
        said = " ".join(f"{loss:.4f}" for loss in outcome.losses) if not outcome.error else outcome.error
        print(f"\nlosses, {outcome.side}: {said}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        figures = [asdict(outcome) for outcome in outcomes]
        args.json.write_text(json.dumps({"settings": settings, "peak_flops": peak, "sides": figures}, indent=2) + "\n")
    if any(outcome.error for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
