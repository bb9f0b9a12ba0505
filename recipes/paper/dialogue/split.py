"""Rows of the dialogue task in three parts that share no prompt: for the policy, for the judge, held out.

    python recipes/paper/dialogue/split.py helpful-base-test.jsonl.gz --output runs/paper/dialogue/data
    python recipes/paper/dialogue/split.py helpful-base-test.jsonl.gz --output runs/paper/dialogue-quick/data --quick

Preference rows of any shape go in; HH-RLHF's helpful-base is the paper's. Written are policy.jsonl (pairs to learn from),
judge.jsonl (pairs of the reward model that judges, and that no policy has seen), held_out.jsonl (pairs whose chosen response
the policies are compared with), and the prompts of the first and the last part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.core.files import check_writable, whole_file
from prefopt.data.groups import Group
from prefopt.data.load import load_groups
from prefopt.rollout.prompts import Prompt

SHARES = {"policy": 0.45, "judge": 0.45, "held_out": 0.1}
MOST_IN_PROMPT = 1000  # characters: two cores are few
MOST_IN_RESPONSE = 300  # short enough that none is cut: a reward model would learn which ones were
PROMPTS = 1300
QUICK_ROWS = 120


def split(source: str, *, most: int | None, seed: int = 0) -> dict[str, list[Group]]:
    """Pairs of `source` by part, at most `most` together, drawn with `seed`; a prompt is in one part only.

    DataError where a part would be empty.
    """
    groups = [group for group in load_groups(source).groups if group.feedback.kind == "pair" and not group.feedback.tie]
    short = [
        group
        for group in groups
        if sum(len(turn.content) for turn in group.prompt) <= MOST_IN_PROMPT
        and all(len(response[-1].content) <= MOST_IN_RESPONSE for response in group.responses)
    ]
    by_prompt: dict[Any, list[Group]] = {}
    for group in short:
        by_prompt.setdefault(group.prompt, []).append(group)
    prompts = list(by_prompt)
    order = np.random.default_rng(seed).permutation(len(prompts))[:most]
    ends = np.cumsum([round(share * len(order)) for share in SHARES.values()])
    parts = np.split(order, ends[:-1])
    found = {
        name: [group for place in part.tolist() for group in by_prompt[prompts[place]]]
        for name, part in zip(SHARES, parts, strict=True)
    }
    if not all(found.values()):
        raise DataError(f"{source}: {len(short)} short pairs are too few for three parts", todo="Give more rows.")
    return found


def row_of(group: Group) -> dict[str, Any]:
    """A pair as {prompt, chosen, rejected}, in the form that it was written in."""
    prompt = Prompt(group.prompt, group.form).given
    texts = [response[-1].content for response in group.responses]
    if group.form != "messages":
        return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
    return {"prompt": prompt} | {
        name: [{"role": "assistant", "content": text}] for name, text in zip(("chosen", "rejected"), texts, strict=True)
    }


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="preference rows, a file or a Hub dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--most", type=int, default=PROMPTS, help="prompts of all parts together, at most; %(default)s")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} prompts")
    args = parser.parse_args()
    check_writable(args.output)
    parts = split(args.rows, most=QUICK_ROWS if args.quick else args.most)
    for name, groups in parts.items():
        rows = [row_of(group) for group in groups]
        write(args.output / f"{name}.jsonl", rows)
        if name != "judge":
            distinct = {json.dumps(row["prompt"]): row["prompt"] for row in rows}
            write(args.output / f"prompts_{name}.jsonl", ({"prompt": prompt} for prompt in distinct.values()))
    print(f"{args.output}: " + ", ".join(f"{len(groups)} pairs {name}" for name, groups in parts.items()))


if __name__ == "__main__":
    main()
