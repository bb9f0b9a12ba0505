"""prefopt beside TRL's DPOTrainer: the same pairs in the same order, the same model, optimizer and numerics.

    python benchmarks/pairs.py                       # HH helpful-base, SmolLM2-135M-Instruct, both TRL settings
    python benchmarks/pairs.py --steps 20 --trl precomputed

Each side is a process of its own, so that its peak memory is its own. Pairs per second are those of the training
steps after the first; the reference pass is timed apart. Losses of every step are printed: equal work. Compute is
bf16 with fp32 masters where the machine multiplies bf16 in hardware, else fp32, on both sides.
On a CPU, TRL's head scores every position; on CUDA it has a fused kernel that scores completions only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
HH = DATA / "hh-rlhf" / "helpful-base-test.jsonl.gz"


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
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="prefopt's budget")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--trl", nargs="*", default=["live", "precomputed"], choices=("live", "precomputed"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def select_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """The first pairs that fit, as plain strings, with the ids that both sides must see."""
    from prefopt.core.progress import set_quiet
    from prefopt.data.encode import encode_groups
    from prefopt.data.groups import GroupSet
    from prefopt.data.shapes import load_groups
    from prefopt.data.transcripts import join_hh
    from prefopt.model.load import load_tokenizer

    set_quiet(True)
    wanted = args.steps * args.batch
    groups = load_groups(args.data, max_rows=4 * wanted)
    encoded = encode_groups(GroupSet(groups.groups), load_tokenizer(args.model), template="plain")
    texts = {group.source: group for group in groups.groups}
    rows = []
    for tokens in encoded.groups:
        if len(tokens.prompt_ids) + max(map(len, tokens.response_ids)) > args.max_tokens:
            continue
        group = texts[tokens.source]
        hh = group.form == "hh"
        prompt = join_hh(group.prompt) + "\n\nAssistant:" if hh else group.prompt[0].content
        chosen, rejected = ((" " if hh else "") + response[-1].content for response in group.responses)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tokens": tokens.unique_tokens})
    if len(rows) < wanted:
        raise SystemExit(f"{args.data}: only {len(rows)} of {wanted} pairs fit {args.max_tokens} tokens")
    return rows[:wanted]


def run_prefopt(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from prefopt.core.progress import set_quiet
    from prefopt.core.resolve import resolve_config
    from prefopt.data.encode import TokenSet, encode_groups
    from prefopt.data.shapes import load_groups
    from prefopt.model.load import load_model
    from prefopt.pipeline import Prepared, start_training

    set_quiet(True)
    with tempfile.TemporaryDirectory() as folder:
        config = resolve_config(
            {
                "loss": {"name": "dpo", "beta": args.beta},
                "reference": {"cache_dir": folder},
                "train": {
                    "groups_per_step": args.batch,
                    "micro_batch_tokens": args.micro_batch_tokens,
                    "lr": args.lr,
                    "schedule": "constant",
                    "warmup_fraction": 0.0,
                    "precision": args.precision,
                    "max_steps": args.steps,
                },
            }
        )
        model = load_model(args.model, precision=args.precision, for_training=True)
        assert model.sharing
        groups = load_groups([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
        tokens = encode_groups(groups, model.tokenizer, template="plain")
        started = time.monotonic()
        training = start_training(config, model, Prepared(groups, tokens, TokenSet(()), {}))
        reference_seconds = time.monotonic() - started
        losses, seconds = [], []
        for step in range(args.steps):
            record = training.train_step(tokens.groups[step * args.batch : (step + 1) * args.batch])
            losses.append(record.metrics()["loss"])
            seconds.append(record.seconds)
    return {"losses": losses, "seconds": seconds, "reference_seconds": reference_seconds, "dtype": str(model.dtype)}


def trl_config(args: argparse.Namespace, folder: str, *, bf16: bool, precomputed: bool) -> Any:
    """TRL's settings for the same work: its fastest ones on a CPU."""
    import torch
    from trl import DPOConfig

    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=args.batch // args.trl_batch,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        beta=args.beta,
        bf16=bf16,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precomputed,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def run_trl(args: argparse.Namespace, rows: list[dict[str, Any]], *, precomputed: bool) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOTrainer

    from prefopt.model.load import load_tokenizer, model_folder
    from prefopt.model.precision import compute_dtype, pick_device

    transformers.utils.logging.set_verbosity_error()

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *arguments: Any, **options: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self.seconds.append(time.monotonic() - self.started)

    dtype, _ = compute_dtype(args.precision, pick_device())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(args.model), dtype=torch.float32, attn_implementation="sdpa"
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = trl_config(args, folder, bf16=dtype == torch.bfloat16, precomputed=precomputed)
        started = time.monotonic()
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]),
            processing_class=load_tokenizer(args.model),
            callbacks=[clock],
        )
        prepare_seconds = time.monotonic() - started
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": losses,
        "seconds": clock.seconds,
        "reference_seconds": prepare_seconds if precomputed else 0.0,
        "dtype": str(dtype),
    }


def measure_side(args: argparse.Namespace) -> None:
    rows = json.loads(args.rows.read_text())
    side = args.side
    result = run_prefopt(args, rows) if side == "prefopt" else run_trl(args, rows, precomputed=side == "trl-precomputed")
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    steady = result["seconds"][1:] or result["seconds"]
    result["pairs_per_second"] = args.batch * len(steady) / sum(steady)
    print("RESULT " + json.dumps(result))


def run_side(args: argparse.Namespace, side: str, rows: Path) -> dict[str, Any]:
    print(f"running {side} ...", flush=True)
    command = [sys.executable, __file__, "--side", side, "--rows", str(rows), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    if done.returncode == -9:
        print(f"{side} was killed for memory; try a smaller --trl-batch")
        return {}
    raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    args = parse()
    if args.side:
        measure_side(args)
        return
    rows = select_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows))
        sides = ["prefopt", *(f"trl-{setting}" for setting in args.trl)]
        results = {side: found for side in sides if (found := run_side(args, side, path))}
    ours = results["prefopt"]
    mean_tokens = sum(row["tokens"] for row in rows) / len(rows)
    print(
        f"\n{len(rows)} pairs of {mean_tokens:.0f} unique tokens on average, {args.batch} a step, {args.steps} steps, {ours['dtype']}\n"
    )
    print(f"{'':<18}{'pairs/s':>9}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}{'reference s':>13}   losses")
    for side, result in results.items():
        speed = ours["pairs_per_second"] / result["pairs_per_second"]
        memory = ours["peak_gib"] / result["peak_gib"]
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:6])
        print(
            f"{side:<18}{result['pairs_per_second']:>9.3f}{speed:>7.2f}x{result['peak_gib']:>10.2f}{memory:>8.2f}"
            f"{result['reference_seconds']:>13.1f}   {losses}"
        )
    worst = max(abs(a - b) for side in results for a, b in zip(ours["losses"], results[side]["losses"], strict=True))
    print(f"\nlargest difference of a step's loss between the sides: {worst:.2e}")
    if args.json:
        args.json.write_text(
            json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
