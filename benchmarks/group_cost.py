"""What the shared prompt saves for K responses: one group of K against K separate rows, the same loss and numerics.

    python benchmarks/group_cost.py                       # K = 4, prompt of 1,000 tokens, responses of 100

Texts are HH conversations joined to the wanted lengths. Both sides train with plackett_luce through one Training each; the
second computes every response in a row of its own, prompt repeated, as a model does that cannot share. Steps alternate
in one process, and the log-probs of both sides are compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from prefopt.core.progress import set_quiet
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import Feedback, GroupSet
from prefopt.model.load import load_model
from prefopt.pipeline import Prepared, start_training
from prefopt.train.loop import Training

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--response", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def group_of(args: argparse.Namespace, tokenizer: object) -> TokenGroup:
    """One group of real text at exactly the wanted lengths."""
    with gzip.open(SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["chosen"] for _, line in zip(range(60), file, strict=False))
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)  # type: ignore[operator]
    cuts = [args.prompt + number * args.response for number in range(args.k + 1)]
    responses = tuple(ids[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
    return TokenGroup(
        prompt_ids=ids[: args.prompt],
        response_ids=responses,
        scored=tuple(np.ones(len(response), dtype=bool) for response in responses),
        feedback=Feedback("ranking", ranking=tuple(range(1, args.k + 1))),
        source="hh",
        finished=(True,) * args.k,
    )


def training(args: argparse.Namespace, folder: Path, *, shared: bool) -> tuple[Training, TokenGroup]:
    config = resolve_config(
        {
            "model": {"name": args.model},
            "loss": {"name": "plackett_luce"},
            "reference": {"cache_dir": str(folder / "reference")},
            "train": {"output_dir": str(folder / "run"), "micro_batch_tokens": 8192, "max_steps": 100},
        }
    )
    policy = load_model(args.model, for_training=True)
    group = group_of(args, policy.tokenizer)
    if not shared:
        policy.__dict__["sharing"] = False
    rows = Prepared(GroupSet(()), TokenSet((group,)), TokenSet(()), {})
    return start_training(config, policy, rows), group


def main() -> None:
    args = parse()
    set_quiet(True)
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: training(args, Path(folder), shared=name == "shared") for name in ("shared", "separate")}
        logps = {name: side.evaluate([group]).logp for name, (side, group) in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats + 1):
            for name, (side, group) in sides.items():
                started = time.monotonic()
                side.train_step([group])
                seconds[name].append(time.monotonic() - started)
    tokens = {name: side.policy.computed_tokens(group) for name, (side, group) in sides.items()}
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"K = {args.k}, prompt {args.prompt}, responses of {args.response} tokens, {args.repeats} steps each, {args.model}")
    print(f"tokens computed: {tokens['shared']} against {tokens['separate']} ({tokens['shared'] / tokens['separate']:.1%})")
    print(
        f"seconds a step: {median['shared']:.2f} against {median['separate']:.2f} ({median['shared'] / median['separate']:.1%})"
    )
    print(f"largest difference of a response's log-prob: {np.abs(logps['shared'] - logps['separate']).max():.2g} nats")


if __name__ == "__main__":
    main()
