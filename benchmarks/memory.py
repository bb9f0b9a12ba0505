"""What memory grows with: the vocabulary, the length of a row, the number of rows, the token budget.

    python benchmarks/memory.py                                   # all four at small sizes, about 5 minutes on 2 cores
    python benchmarks/memory.py --vary sequence --values 1024 4096 16384 32768 --model llama-3.2-1b

Every setting is a process of its own that trains a model with random weights for two steps (loss orpo, so that no pass of
a reference is mixed in). "Beyond the weights" is the peak of the steps without what the program takes before a model is
made and without weights, gradients and AdamW's moments, which are counted exactly; a larger vocabulary makes these larger.
"Planned" is the same part of `prefopt plan`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sides import table

VALUES = {
    "vocabulary": [32768, 65536, 131072, 262144],
    "sequence": [1024, 2048, 4096, 8192],
    "rows": [8, 32, 128],
    "budget": [512, 1024, 2048, 4096],
}
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One run: model, its vocabulary, tokens of a row (a quarter each response, the rest prompt), rows of a step, budget."""

    model: str
    vocabulary: int
    sequence: int
    rows: int
    budget: int
    precision: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """Bytes: the whole peak of the steps, what it holds of weights, gradients and moments, and the rest; the same rest planned."""

    peak: int
    held: int
    beyond: int
    planned: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", default=list(VALUES), choices=list(VALUES))
    parser.add_argument("--values", type=int, nargs="+", help="values of what is varied, instead of the usual ones")
    parser.add_argument("--model", default="mini", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--vocabulary", type=int, default=8192, help="where it is not varied")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row, where not varied")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step, where not varied")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a micro-batch, where not varied")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of prefopt")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well, in bytes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def setting_of(args: argparse.Namespace, name: str, value: int) -> Setting:
    sizes = {"vocabulary": args.vocabulary, "sequence": args.sequence, "rows": args.rows, "budget": args.budget, name: value}
    if name == "sequence":  # a single row, so that nothing but its length grows
        sizes |= {"rows": 1, "budget": value}
    return Setting(model=args.model, precision=args.precision, options=tuple(args.set), **sizes)


def measure(setting: Setting) -> Measured:
    """Train two steps in this process: the second has gradients and moments from the start."""
    import numpy as np
    import torch
    from one_side import prove_paths
    from shapes import made_group, random_model, shape_config

    from prefopt.core.errors import PrefoptError
    from prefopt.core.memory import process_bytes
    from prefopt.core.progress import set_quiet
    from prefopt.core.resolve import resolve_config
    from prefopt.data.encode import TokenSet
    from prefopt.data.groups import GroupSet
    from prefopt.pipeline import Prepared, start_training
    from prefopt.train.plan import Machine, plan_memory

    set_quiet(True)
    random = np.random.default_rng(0)
    response = setting.sequence // 4
    prompt = setting.sequence - 2 * response
    groups = [
        made_group(random, setting.vocabulary, prompt, [response] * 2, source=f"row {row + 1}") for row in range(setting.rows)
    ]
    config = resolve_config(
        {
            "model": {"name": setting.model},
            "loss": {"name": "orpo"},
            "train": {
                "groups_per_step": setting.rows,
                "micro_batch_tokens": setting.budget,
                "precision": setting.precision,
                "max_steps": 2,
            },
        },
        setting.options,
    )
    overrides = {"vocab_size": setting.vocabulary}
    machine = Machine.here(config)
    try:
        plan = plan_memory(config, shape_config(setting.model, overrides), groups, machine, micro_batch_tokens=setting.budget)
        planned = sum(size for name, size in plan.parts.items() if name.startswith(("passes", "gaps")))
    except PrefoptError:  # what is measured needs no plan
        planned = 0
    before = 0 if torch.cuda.is_available() else process_bytes()
    policy = random_model(setting.model, precision=setting.precision, overrides=overrides)
    prove_paths(policy, groups)
    training = start_training(config, policy, Prepared(GroupSet(()), TokenSet(tuple(groups)), TokenSet(()), {}))
    forget_peak()
    for _ in range(2):
        training.train_step(groups)
    peak = peak_since()
    trained = sum(master.nbytes for master in training.optimizer.masters.values())
    own = {id(master) for master in training.optimizer.masters.values()}
    copies = sum(weight.nbytes for weight in policy.model.parameters() if id(weight) not in own)
    held = copies + 2 * trained + training.optimizer.moment_bytes
    return Measured(peak, held, peak - before - held, planned)


def forget_peak() -> None:
    """Let the peak start again from what is held now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux; elsewhere the peak is that of the whole process
    except OSError:
        pass


def peak_since() -> int:
    import torch

    from prefopt.core.memory import peak_bytes

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def in_own_process(setting: Setting) -> Measured | str:
    """The figures of a setting, or one line that says why there are none."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return Measured(**json.loads(line.removeprefix("RESULT ")))
    if done.returncode == -9:
        return "killed for memory"
    return (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1][:100]


def row_of(name: str, setting: Setting, found: Measured | str, first: Measured | None) -> list[str]:
    labels = [name, *(f"{getattr(setting, column):,}" for column in VALUES)]
    if isinstance(found, str):
        return [*labels, found, "", "", "", ""]
    change = "" if first is None else f"{found.beyond / first.beyond - 1:+.0%}"
    sizes = [f"{size / GIB:.2f}" for size in (found.peak, found.held, found.beyond)]
    return [*labels, *sizes, change, f"{found.planned / GIB:.2f}" if found.planned else ""]


def main() -> None:
    args = parse()
    if args.one:
        given: dict[str, Any] = json.loads(args.one)
        print("RESULT " + json.dumps(asdict(measure(Setting(**{**given, "options": tuple(given["options"])})))))
        return
    rows, figures = [], []
    for name in args.vary:
        first: Measured | None = None
        for value in args.values or VALUES[name]:
            setting = setting_of(args, name, value)
            print(f"running {name} {value} ...", file=sys.stderr, flush=True)
            result = in_own_process(setting)
            rows.append(row_of(name, setting, result, first))
            first = first or (result if isinstance(result, Measured) else None)
            found = {"error": result} if isinstance(result, str) else asdict(result)
            figures.append({"varied": name, "setting": asdict(setting), **found})
    header = ("varied", *VALUES, "peak GiB", "weights, gradients, moments", "beyond them", "against the first", "planned")
    print(f"{args.model}, {args.precision}; sizes in GiB\n\n{table(header, rows)}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
