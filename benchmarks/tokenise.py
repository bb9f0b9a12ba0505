"""Preparing preference rows: from a file to token ids on disk, prefopt against TRL 1.16, on the same rows in the same run.

    python benchmarks/tokenise.py                    # 5,000 rows, about a minute on two cores
    python benchmarks/tokenise.py --rows 100000      # as many rows as HH-RLHF has

Every side is a process of its own. TRL's is the preparation of its DPOTrainer (prompt extraction, chat template, tokenising)
with `dataset_num_proc` unset and 2, after `load_dataset("json")`. Rows: the pairs of HH helpful-base as conversations, made
distinct by a number in the first turn. Imports and the tokenizer are not counted.
The ids of both sides are compared row by row: prefopt ends a response with its end-of-turn token, TRL with what the
template writes behind that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SIDES = {"prefopt": "prefopt", "trl-1": "TRL, one process", "trl-2": "TRL, dataset_num_proc=2"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=1, help="runs of every side; the fastest counts")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int) -> None:
    """Conversations of the pairs of HH helpful-base that part at the last turn, over and over, each with its number."""
    from prefopt.data.load import load_groups

    groups = load_groups(SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz").groups
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            group = groups[number % len(groups)]
            turns = [{"role": turn.role, "content": turn.content} for turn in group.prompt]
            turns[0]["content"] = f"{number}: {turns[0]['content']}"
            answers = [{"role": "assistant", "content": response[-1].content} for response in group.responses]
            file.write(json.dumps({"chosen": [*turns, answers[0]], "rejected": [*turns, answers[1]]}) + "\n")


def prepare_prefopt(rows: Path, tokenizer: Any) -> Any:
    from prefopt.data.load import load_groups
    from prefopt.data.token_cache import cached_encoding

    return cached_encoding(load_groups(rows), tokenizer, root=rows.parent / "tokens").groups


def prepare_trl(rows: Path, tokenizer: Any, processes: int | None) -> Any:
    """What `DPOTrainer.__init__` does with its training rows."""
    from types import SimpleNamespace

    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    dataset = load_dataset("json", data_files=str(rows), split="train")
    args = DPOConfig(output_dir=str(rows.parent / "trl"), dataset_num_proc=processes, max_length=None, bf16=False, use_cpu=True)
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, "train")


def run_side(side: str, folder: Path, model: str) -> None:
    """Prepare the rows once and write seconds, memory and ids into `folder`."""
    from prefopt.core.progress import set_quiet
    from prefopt.model.load import load_tokenizer

    set_quiet(True)
    tokenizer = load_tokenizer(model)
    imported = (
        ("prefopt.data.load", "prefopt.data.token_cache") if side == "prefopt" else ("datasets", "trl.trainer.dpo_trainer")
    )
    for module in imported:
        importlib.import_module(module)
    print("ready", flush=True)
    time.sleep(0.5)  # the memory before is looked at
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    rows = folder / "rows.jsonl"
    made = (
        prepare_prefopt(rows, tokenizer)
        if side == "prefopt"
        else prepare_trl(rows, tokenizer, {"trl-1": None, "trl-2": 2}[side])
    )
    seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
    print("done", flush=True)
    if side == "prefopt":
        parts = ((group.prompt_ids, *group.response_ids) for group in made)
    else:
        parts = (tuple(np.array(row[name], np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in made)
    ids = [part for row in parts for part in row]
    np.savez(folder / f"{side}.npz", ids=np.concatenate(ids), lengths=np.array([len(part) for part in ids]))
    (folder / f"{side}.json").write_text(json.dumps({"seconds": seconds, "cpu": cpu, "rows": len(made)}))


def watched(words: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """(memory before, largest memory) in bytes of a command and its children, between its lines "ready" and "done"."""
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    before = peak = 0
    while process.poll() is None:
        time.sleep(0.1)
        if "ready\n" in lines and "done\n" not in lines:
            now = memory_of(process.pid)
            before = before or now
            peak = max(peak, now)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return before, peak


def memory_of(number: int) -> int:
    """Memory of a process and its children in bytes; pages that they share are counted once."""
    import psutil

    total = 0
    for child in (psutil.Process(number), *psutil.Process(number).children(recursive=True)):
        try:
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def read_ids(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        ids, lengths = stored["ids"], stored["lengths"]
    return np.split(ids, np.cumsum(lengths)[:-1])


def compare(ours: list[np.ndarray], theirs: list[np.ndarray]) -> str:
    """How the ids of two sides differ, in a sentence."""
    if len(ours) != len(theirs):
        return f"{len(ours) // 3} rows against {len(theirs) // 3}"
    prompts = sum(np.array_equal(ours[place], theirs[place]) for place in range(0, len(ours), 3))
    begin = ends = 0
    for place in range(len(ours)):
        if place % 3:
            mine, other = ours[place], theirs[place]
            begin += np.array_equal(mine, other[: len(mine)])
            ends += np.array_equal(mine, other)
    responses = 2 * len(ours) // 3
    return f"{prompts} of {len(ours) // 3} prompts equal; {begin} of {responses} responses equal up to the end of turn, {ends} to the end"


def main() -> None:
    args = parse()
    if args.side:
        run_side(args.side, args.folder, args.model)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.rows)
        size = (folder / "rows.jsonl").stat().st_size / 2**20
        best: dict[str, dict[str, float]] = {}
        for number in range(args.repeats):
            for side in SIDES:
                environment = {**os.environ, "HF_DATASETS_CACHE": f"{name}/datasets-{side}-{number}", "HF_HUB_OFFLINE": "1"}
                for file in (folder / "tokens").glob("*"):
                    file.unlink()
                words = [sys.executable, __file__, "--side", side, "--folder", name, "--model", args.model]
                before, peak = watched(words, environment)
                found = {**json.loads((folder / f"{side}.json").read_text()), "before": before, "peak": peak}
                if side not in best or found["seconds"] < best[side]["seconds"]:
                    best[side] = found
        ours = read_ids(folder / "prefopt.npz")
        print(f"{args.rows} pairs, {size:.0f} MiB of text, {sum(map(len, ours)) / args.rows:.0f} tokens a pair, {args.model}\n")
        columns = ["side", "seconds", "CPU seconds", "rows/s", "times TRL's time", "memory before, MiB", "memory added, MiB"]
        print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
        for side, title in SIDES.items():
            seconds, cpu, before, peak = (best[side][name] for name in ("seconds", "cpu", "before", "peak"))
            values = [
                title,
                f"{seconds:.2f}",
                f"{cpu:.2f}",
                f"{args.rows / seconds:.0f}",
                f"{seconds / best['trl-1']['seconds']:.3f}",
            ]
            print("| " + " | ".join([*values, f"{before / 2**20:.0f}", f"{(peak - before) / 2**20:.0f}"]) + " |")
        for side in ("trl-1", "trl-2"):
            print(f"\nprefopt is {best[side]['seconds'] / best['prefopt']['seconds']:.1f} times as fast as {SIDES[side]}")
        print(f"\n{compare(ours, read_ids(folder / 'trl-1.npz'))}")


if __name__ == "__main__":
    main()
