"""Minimal pairs of BLiMP with a 15 M model: does each loss learn the phenomenon, and which stand flipped labels?

    python benchmarks/minimal_pairs.py                            # clean labels, every loss below, one seed
    python benchmarks/minimal_pairs.py --flip 0.3 --seeds 5 --losses dpo cdpo robust

Rows are `sentence_good` over `sentence_bad` with the prompt "" (the beginning-of-text token alone) and no end token. Accuracy
is exact: the share of held-out pairs whose good sentence has the larger log-prob under the policy itself, whatever the
reference says. The accuracy of the implicit reward, which compares with the reference, stands beside it. Training and
held-out pairs are disjoint rows of one phenomenon, drawn with the seed; flips are drawn with the seed too and never touch
held-out pairs. Every run goes through `prefopt.train_run`. (kto is not among the losses: its KL needs responses under another
prompt, and here there is one.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from prefopt.core.progress import set_quiet
from prefopt.core.resolve import resolve_config
from prefopt.core.statistics import wilson
from prefopt.pipeline import train_run

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # Student's t, two-sided, by count of seeds
KEYS = {"log-prob": "logps/accuracies", "reward": "rewards/accuracies"}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "cdpo": {"name": "cdpo", "beta": 0.1, "label_smoothing": 0.1},
    "robust": {"name": "robust", "beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"name": "ipo", "beta": 0.1, "reduce": "mean"},
    "hinge": {"name": "hinge", "beta": 0.1},
    "exo": {"name": "exo", "beta": 0.1},
    "apo_zero": {"name": "apo_zero", "beta": 0.1},
    "sppo": {"name": "sppo", "beta": 0.1},
    "aot": {"name": "aot", "beta": 0.1},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "cpo": {"name": "cpo", "beta": 0.1},
    "orpo": {"name": "orpo", "beta": 1.0},
    "apo_zero_unpaired": {"name": "apo_zero_unpaired", "beta": 0.1},
    "plackett_luce": {"name": "plackett_luce", "beta": 0.1},
    "dpo + sft": {"dpo": 1.0, "sft": 0.2, "beta": 0.1},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories15M"))
    parser.add_argument("--phenomenon", default="principle_A_c_command", help="a file of BLiMP, without .jsonl")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--flip", type=float, default=0.0, help="share of training labels flipped")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=400, help="training pairs; 200 others are held out")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--beta", type=float, help="instead of that of the table, for every loss")
    parser.add_argument("--json", type=Path, help="append every run to this file")
    return parser.parse_args()


def read_pairs(phenomenon: str) -> list[dict[str, Any]]:
    with tarfile.open(SHARED / "data" / "blimp" / "blimp.tar.gz") as archive:
        member = next(name for name in archive.getnames() if Path(name).name == f"{phenomenon}.jsonl")
        file = archive.extractfile(member)
        assert file is not None
        rows = [json.loads(line) for line in file]
    unfinished = {"chosen_finished": False, "rejected_finished": False}
    return [{"prompt": "", "chosen": row["sentence_good"], "rejected": row["sentence_bad"], **unfinished} for row in rows]


def flipped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def one_run(args: argparse.Namespace, loss: str, seed: int) -> dict[str, Any]:
    """Accuracy before, along the way and at the end."""
    rows = read_pairs(args.phenomenon)
    draw = random.Random(seed)
    draw.shuffle(rows)
    held_out, train = rows[:200], rows[200 : 200 + args.pairs]
    wrong = set(draw.sample(range(len(train)), round(args.flip * len(train))))
    train = [flipped(row) if place in wrong else row for place, row in enumerate(train)]
    section = dict(LOSSES[loss])
    if args.beta:
        section["beta"] = args.beta
    if args.flip and "label_smoothing" in section:
        section["label_smoothing"] = args.flip
    with tempfile.TemporaryDirectory() as folder:
        config = resolve_config(
            {
                "model": {"name": args.model},
                "data": {"template": "plain", "seed": seed, "eval": "(in memory)"},
                "loss": section,
                "train": {
                    "output_dir": str(Path(folder) / "run"),
                    "lr": args.lr,
                    "epochs": args.epochs,
                    "groups_per_step": 32,
                    "micro_batch_tokens": 2048,
                },
            }
        )
        run = train_run(config, train_rows=train, eval_rows=held_out)
        evals = [event for event in run.events() if event["kind"] == "eval"]
    curves = {name: [event[f"eval/{key}"] for event in evals] for name, key in KEYS.items()}
    return {"loss": loss, "seed": seed, "flip": args.flip, "epochs": args.epochs, "pairs": len(train), **curves}


def mean_and_interval(last: list[float]) -> str:
    """Over seeds by Student's t; of one seed, Wilson's over its 200 held-out pairs."""
    value = statistics.mean(last)
    if len(last) > 1:
        half = T_95[len(last)] * statistics.stdev(last) / len(last) ** 0.5
        low, high = value - half, value + half
    else:
        low, high = wilson(value, 200)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    args = parse()
    set_quiet(True)
    print(f"{args.phenomenon}, {args.pairs} training pairs, {args.flip:.0%} flipped, {args.epochs:g} epochs, lr {args.lr:g}")
    print("| loss | before | after | gain, points | by implicit reward | mean along the way | by implicit reward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for loss in args.losses:
        runs = [one_run(args, loss, seed) for seed in range(args.seeds)]
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(run) + "\n" for run in runs)
        means = {key: [statistics.mean(at) for at in zip(*(run[key] for run in runs), strict=True)] for key in KEYS}
        exact, reward = (mean_and_interval([run[key][-1] for run in runs]) for key in KEYS)
        along = [" ".join(f"{value:.3f}" for value in means[key]) for key in KEYS]
        before, *_, after = means["log-prob"]
        gain = f"{100 * (after - before):+.1f}"
        print(f"| {loss} | {before:.3f} | {exact} | {gain} | {reward} | {along[0]} | {along[1]} |", flush=True)


if __name__ == "__main__":
    main()
