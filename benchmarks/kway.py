"""K responses to one prompt as one group, as K separate rows, and as K - 1 pairs (the best with each other one).

    python benchmarks/kway.py                                    # K = 2, 4, 8, 16; about 3 minutes on 2 cores
    python benchmarks/kway.py --model smollm2-135m --prompt 1000 --response 100 -k 4

One optimizer step each of plackett_luce, which with two responses is DPO, in one process with one model; the ways alternate.
Separate rows are what a trainer computes that shares no prompt, pairs what one does that knows only pairs. The learning
rate is 0, so that the log-prob of every response must be the same in all three; the largest difference is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from one_side import prove_paths
from shapes import SHAPES, group_of_ids, made_group, random_model
from sides import table

from prefopt.core.progress import set_quiet
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import GroupSet
from prefopt.model.load import load_model
from prefopt.model.precision import pick_device
from prefopt.pipeline import Prepared, start_training
from prefopt.train.loop import Training
from prefopt.train.plan import FIRST_TRIED

WAYS = ("one group", "separate rows", "pairs")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help=f"a shape ({', '.join(SHAPES)}), or a model that prefopt loads")
    parser.add_argument("-k", type=int, nargs="+", default=[2, 4, 8, 16], help="responses to the prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of each response")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="budget; 0: the device's own")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    return parser.parse_args()


def ways_of(group: TokenGroup) -> dict[str, list[TokenGroup]]:
    """The groups that each way trains on."""
    best, *others = group.response_ids
    pairs = [group_of_ids(group.prompt_ids, [best, other], source=f"pair {place + 1}") for place, other in enumerate(others)]
    return {"one group": [group], "separate rows": [group], "pairs": pairs}


def training_on(args: argparse.Namespace, groups: list[TokenGroup], folder: str) -> Training:
    config = resolve_config(
        {
            "model": {"name": args.model},
            "loss": {"name": "plackett_luce"},
            "reference": {"cache_dir": folder},
            "train": {
                "micro_batch_tokens": args.micro_batch_tokens or FIRST_TRIED[pick_device().type],
                "lr": 0.0,
                "precision": args.precision,
                "max_steps": 10**6,
            },
        }
    )
    if args.model in SHAPES:
        policy = random_model(args.model, precision=args.precision)
    else:
        policy = load_model(args.model, precision=args.precision, for_training=True)
    prove_paths(policy, groups)
    assert policy.sharing
    return start_training(config, policy, Prepared(GroupSet(()), TokenSet(tuple(groups)), TokenSet(()), {}))


@contextmanager
def computed(training: Training, way: str) -> Iterator[None]:
    """Within it every response is a padded row of its own for separate rows; otherwise prompts are shared."""
    training.policy.__dict__["sharing"] = way != "separate rows"
    try:
        yield
    finally:
        training.policy.__dict__["sharing"] = True


def seconds_of(training: Training, groups: list[TokenGroup]) -> float:
    started = time.monotonic()
    training.train_step(groups)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started


def responses_of(way: str, logps: np.ndarray) -> np.ndarray:
    """Log-probs of the K responses: every pair repeats the best one."""
    return np.concatenate([logps[:1], logps[1::2]]) if way == "pairs" else logps


def main() -> None:
    args = parse()
    set_quiet(True)
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        prompts = {k: made_group(np.random.default_rng(k), 500, args.prompt, [args.response] * k) for k in args.k}
        everything = [group for made in prompts.values() for groups in ways_of(made).values() for group in groups]
        training = training_on(args, everything, folder)
        for k, made in prompts.items():
            ways = ways_of(made)
            tokens, logps = {}, {}
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for repeat in range(args.repeats + 1):
                for way, groups in ways.items():
                    with computed(training, way):
                        taken = seconds_of(training, groups)
                        if repeat:
                            seconds[way].append(taken)
                            continue
                        tokens[way] = sum(training.policy.computed_tokens(group) for group in groups)
                        logps[way] = responses_of(way, training.evaluate(groups).logp)
            median = {way: statistics.median(values) for way, values in seconds.items()}
            worst = max(float(np.abs(logps[way] - logps["one group"]).max()) for way in WAYS)
            others = [
                cell
                for way in WAYS[1:]
                for cell in (
                    f"{tokens[way]} ({tokens[way] / tokens['one group']:.2f} x)",
                    f"{median[way]:.2f} ({median[way] / median['one group']:.2f} x)",
                )
            ]
            figures.append({"k": k, "tokens": tokens, "seconds": median, "log-probs differ by": worst})
            rows.append([str(k), str(tokens["one group"]), f"{median['one group']:.2f}", *others, f"{worst:.1e}"])
    print(f"{args.model}, prompt of {args.prompt} tokens, responses of {args.response}, median of {args.repeats} steps\n")
    print(
        table(
            ("K", "tokens, group", "s", "tokens, separate rows", "s", "tokens, pairs", "s", "log-probs differ by, nats"),
            rows,
        )
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
