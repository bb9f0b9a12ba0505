"""`prefopt plan` against what `prefopt train` really took: predicted and measured peak of the process over 12 settings.

    python benchmarks/plan.py                  # about 20 minutes on two cores
    python benchmarks/plan.py --only "stories15M, LoRA"

Both sides are commands of their own. The measured peak is the largest resident memory of a run of three steps without a
reference cache, as the system counts it. Rows: HH helpful-base.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SMALL = [f"model.name={SHARED / 'models' / 'stories15M'}", "data.template=plain"]
LARGE = ["model.name=smollm2-135m-instruct"]
SETTINGS: dict[str, list[str]] = {
    "stories15M, 512 tokens": [*SMALL, "train.micro_batch_tokens=512"],
    "stories15M, 2,048 tokens": [*SMALL, "train.micro_batch_tokens=2048"],
    "stories15M, 4,096 tokens": [*SMALL, "train.micro_batch_tokens=4096"],
    "stories15M, recomputed activations": [*SMALL, "train.micro_batch_tokens=4096", "train.activation_checkpointing=full"],
    "stories15M, LoRA": [*SMALL, "train.micro_batch_tokens=2048", "model.lora.r=16"],
    "stories15M, live reference": [*SMALL, "train.micro_batch_tokens=2048", "reference.kind=live"],
    "stories15M, reward model": [*SMALL, "train.micro_batch_tokens=4096", "loss.name=reward"],
    "SmolLM2-135M, 512 tokens": [*LARGE, "train.micro_batch_tokens=512"],
    "SmolLM2-135M, 1,024 tokens": [*LARGE, "train.micro_batch_tokens=1024"],
    "SmolLM2-135M, 2,048 tokens": [*LARGE, "train.micro_batch_tokens=2048"],
    "SmolLM2-135M, recomputed activations": [*LARGE, "train.micro_batch_tokens=2048", "train.activation_checkpointing=full"],
    "SmolLM2-135M, LoRA": [*LARGE, "train.micro_batch_tokens=1024", "model.lora.r=16"],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="also write the planned parts and the measured peaks, in bytes, to this file")
    return parser.parse_args()


def peak_of(command: list[str], environment: dict[str, str]) -> int:
    """Largest resident memory of a command, in bytes."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    args = parse()
    found = []
    print("| setting | planned, GiB | measured, GiB | planned / measured |\n| --- | --- | --- | --- |")
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            rows = [f"data.train={SHARED / 'data' / 'hh-rlhf' / 'helpful-base-test.jsonl.gz'}", "data.max_rows=100"]
            rows += ["data.max_prompt_tokens=128", "data.max_response_tokens=128"]
            words = [*SETTINGS[name], *rows, "train.max_steps=3", "train.groups_per_step=16", f"train.output_dir={folder}/run"]
            program = [sys.executable, "-m", "prefopt"]
            environment = {**os.environ, "PREFOPT_CACHE": f"{folder}/cache"}
            if "smollm2" in SETTINGS[name][0]:  # the model itself is converted once and kept
                environment["PREFOPT_CACHE"] = os.environ.get("PREFOPT_CACHE", str(Path.home() / ".cache" / "prefopt"))
                words += [] if "live" in name else [f"reference.cache_dir={folder}/reference"]
            plan = json.loads(
                subprocess.run([*program, "plan", *words, "--json"], env=environment, capture_output=True, check=True).stdout
            )
            planned, measured = plan["peak_bytes"], peak_of([*program, "train", *words], environment)
            found.append({"setting": name, "planned": plan, "measured_peak_bytes": measured})
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
        print(f"| {name} | {planned / 2**30:.2f} | {measured / 2**30:.2f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
