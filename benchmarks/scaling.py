"""How preparing and drawing rows grows with their number: seconds and memory a row.

    python benchmarks/scaling.py                     # 1,000 and 10,000 rows, about half a minute on two cores
    python benchmarks/scaling.py --full              # up to a million rows: about 4 GiB of disk, most of an hour
    python benchmarks/scaling.py --sizes 1000 50000

For every size three processes of their own: reading and tokenising into an empty cache, reading and finding the token ids
in the cache, and drawing the groups of 100 steps from the token file alone. Rows: the pairs of HH helpful-base as
conversations, made distinct by a number in the first turn.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenise import write_rows

PHASES = ("make", "cached", "steps")
STEPS, GROUPS_PER_STEP = 100, 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--full", action="store_true", help="1,000 to 1,000,000 rows")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def peak() -> int:
    """Largest resident memory of this process so far, in bytes, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def private() -> int:
    """Memory of this process that is no file's, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def run_phase(phase: str, folder: Path, model: str, rows: int) -> dict[str, float]:
    from prefopt.core.progress import set_quiet
    from prefopt.data.groups import Feedback
    from prefopt.data.load import load_groups
    from prefopt.data.pack import groups_of_step
    from prefopt.data.token_cache import cached_encoding
    from prefopt.data.token_store import read_tokens
    from prefopt.model.load import load_tokenizer

    set_quiet(True)
    found: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = call()
        found[name] = time.perf_counter() - started
        return made

    tokenizer = load_tokenizer(model) if phase != "steps" else None
    before, private_before = peak(), private()
    if phase != "steps":
        groups = timed("read", lambda: load_groups(folder / "rows.jsonl"))
        timed("ids", lambda: cached_encoding(groups, tokenizer, root=folder / "tokens"))
    else:
        (path,) = (folder / "tokens").glob("*.arrow")
        stored, _ = timed("ids", lambda: read_tokens(path, [Feedback("pair")] * rows))

        def draw() -> int:
            drawn = 0
            for step in range(STEPS):
                places = groups_of_step(step, groups=len(stored), groups_per_step=GROUPS_PER_STEP, total_groups=10**9, seed=0)
                drawn += sum(stored[place].unique_tokens for place in places)
            return drawn

        timed("draw", draw)
    return {**found, "peak": peak() - before, "private": private() - private_before}


def measured(phase: str, folder: Path, args: argparse.Namespace, rows: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--model", args.model, "--sizes", str(rows)]
    done = subprocess.run(words, env=dict(os.environ), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    args = parse()
    if args.phase:
        print(json.dumps(run_phase(args.phase, args.folder, args.model, args.sizes[0])))
        return
    columns = ["rows", "read, µs", "tokenise, µs", "ids from the cache, µs", "100 steps, ms", "of which a group, µs"]
    columns += ["memory: reading and tokenising", "memory: 100 steps", "token file"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for rows in [1_000, 10_000, 100_000, 1_000_000] if args.full else args.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", rows)
            make, cached, steps = (measured(phase, folder, args, rows) for phase in PHASES)
            size = sum(file.stat().st_size for file in (folder / "tokens").glob("*.arrow"))
        times = (make["read"], make["ids"], cached["ids"])
        values = [f"{rows:,}", *(f"{1e6 * seconds / rows:.1f}" for seconds in times), f"{1e3 * steps['draw']:.0f}"]
        values.append(f"{1e6 * steps['draw'] / (STEPS * GROUPS_PER_STEP):.1f}")
        values.append(f"{make['peak'] / 2**20:.0f} MiB, {make['peak'] / rows / 1024:.2f} KiB a row")
        values.append(f"{steps['peak'] / 2**20:.0f} MiB, of which {steps['private'] / 2**20:.0f} are no file's")
        values.append(f"{size / 2**20:.1f} MiB, {size / rows / 1024:.2f} KiB a row")
        print("| " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main()
