"""What benchmarks that compare two trainers share: one task for both, each side in a process of its own, and the table.

A side is prefopt, trl-live or trl-precomputed. Both get the same rows in the same order, the same model, optimizer and
numerics; the losses of every step say whether their work was equal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TRL_SIDES = ("live", "precomputed")
_KILLED = "killed for memory"


@dataclass(frozen=True)
class Task:
    """A short training run.

    `model`: a shape of benchmarks/shapes.py with `overrides`, or what prefopt loads. `rows`: token ids of prompt and
    responses, and their texts where TRL shall tokenise them itself. `options`: further key=value settings of prefopt.
    `micro_batch_tokens`: prefopt's budget, 0 for the device's own. `trl_batch`: pairs of one forward pass of TRL, the rest
    of a step is accumulated; `trl_checkpointing`: TRL recomputes activations. The first `warm_up` steps are not timed.
    """

    model: str
    rows: list[dict[str, Any]]
    steps: int
    batch: int = 8
    lr: float = 1e-6
    beta: float = 0.1
    precision: str = "auto"
    micro_batch_tokens: int = 0
    options: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    trl_batch: int = 4
    trl_checkpointing: bool = False
    warm_up: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.trl_batch:
            raise ValueError(f"steps of {self.batch} pairs cannot be made of passes of {self.trl_batch}")

    def with_smaller_passes(self) -> Task | None:
        """The same task with at most half as many pairs in a pass of TRL; None where a pass has one pair already."""
        sizes = [size for size in range(1, self.trl_batch // 2 + 1) if self.batch % size == 0]
        return replace(self, trl_batch=sizes[-1]) if sizes else None


@dataclass(frozen=True)
class Outcome:
    """What a side reports. Times in seconds, memory in bytes; `error` says why there are no figures.

    `peak_bytes`: on a CPU the largest resident memory of the process, on a GPU the largest allocated in the training steps.
    """

    side: str
    error: str = ""
    losses: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    reference_seconds: float = 0.0
    dtype: str = ""
    peak_bytes: int = 0
    note: str = ""

    def pairs_per_second(self, task: Task) -> float:
        timed = self.seconds[task.warm_up :] or self.seconds
        return task.batch * len(timed) / sum(timed)

    def flops_per_second(self, task: Task) -> float:
        """Useful operations a second over the timed steps over unique tokens, for either side (see prefopt.train.flops)."""
        timed = self.seconds[task.warm_up :] or self.seconds
        return task_flops(task, first_step=task.steps - len(timed)) / sum(timed)


def as_row(group: Any, text: Sequence[str] | None = None) -> dict[str, Any]:
    """A TokenGroup as a row of a task."""
    row = {"prompt": group.prompt_ids.tolist(), "responses": [ids.tolist() for ids in group.response_ids]}
    return row if text is None else {**row, "text": list(text)}


def groups_of(rows: Iterable[dict[str, Any]]) -> list[Any]:
    """The rows of a task as TokenGroups."""
    from shapes import group_of_ids

    return [group_of_ids(row["prompt"], row["responses"], source=f"row {number + 1}") for number, row in enumerate(rows)]


def config_of(task: Task) -> Any:
    """The transformers configuration of the task's model; no weights are read."""
    from shapes import SHAPES, shape_config

    from prefopt.model.load import model_config

    return shape_config(task.model, task.overrides) if task.model in SHAPES else model_config(task.model)


def task_flops(task: Task, *, first_step: int = 0) -> float:
    """Useful operations of the steps from `first_step` on."""
    from shapes import counted_weights

    from prefopt.train.flops import training_flops

    config = config_of(task)
    weights, adapter = counted_weights(config, task.lora_rank)
    rows = task.rows[first_step * task.batch : task.steps * task.batch]
    return training_flops(config, weights, groups_of(rows), adapter=adapter)


def unique_tokens(task: Task) -> float:
    """Mean unique tokens of a row."""
    return sum(len(row["prompt"]) + sum(map(len, row["responses"])) for row in task.rows) / len(task.rows)


def run_side(task: Task, side: str, *, timeout: float | None = None) -> Outcome:
    """Run one side in a process of its own. Killed for memory, TRL gets smaller forward passes, down to one pair."""
    started = time.monotonic()
    while True:
        left = None if timeout is None else max(1.0, timeout - (time.monotonic() - started))
        outcome = run_together([task], side, timeout=left)[0]
        smaller = task.with_smaller_passes() if outcome.error == _KILLED and side != "prefopt" else None
        if smaller is None:
            return outcome
        task = smaller
        print(f"{side}: {_KILLED}; again with {task.trl_batch} pairs a forward pass", file=sys.stderr, flush=True)


def run_together(tasks: Sequence[Task], side: str, *, timeout: float | None = None) -> list[Outcome]:
    """Run one side of several tasks in one process: saves starts where memory is counted by the device, as on a GPU.

    What was done before a crash or before `timeout` (seconds) is kept.
    """
    print(f"running {side} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.json"
        path.write_text(json.dumps([asdict(task) for task in tasks]))
        out, said = Path(folder) / "out", Path(folder) / "said"
        command = [sys.executable, str(Path(__file__).with_name("one_side.py")), str(path), side]
        with out.open("w") as stdout, said.open("w") as stderr:
            try:
                status = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=timeout).returncode
                why = _KILLED if status == -9 else ""
            except subprocess.TimeoutExpired:
                why = f"not done after {timeout:.0f} s"
        results = [line.removeprefix("RESULT ") for line in out.read_text().splitlines() if line.startswith("RESULT ")]
        why = why or said.read_text().strip()[-3000:] or "ended without a result"
    outcomes = []
    for line in results:
        values: dict[str, Any] = json.loads(line)
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        outcomes.append(Outcome(side, **found))
    return outcomes + [Outcome(side, error=why)] * (len(tasks) - len(outcomes))


def measured_peak(precision: str) -> tuple[float, str]:
    """(operations a second of a large square matrix product in the dtype that both sides compute in, that dtype)."""
    command = [sys.executable, str(Path(__file__).with_name("one_side.py")), "--peak", precision]
    flops, dtype = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(flops), dtype


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with columns of even width."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


HEADER = (
    "side",
    "pairs/s",
    "prefopt is",
    "unique tokens/s",
    "MFU",
    "peak GiB",
    "prefopt uses",
    "loss differs by",
    "reference s",
)


def comparison(task: Task, outcomes: Sequence[Outcome], peak: float) -> list[list[str]]:
    """Rows of a table under HEADER, the first outcome being prefopt's; a side without figures says why."""
    ours, rows = outcomes[0], []
    tokens = unique_tokens(task)
    for outcome in outcomes:
        if outcome.error:
            rows.append([outcome.side, outcome.error.splitlines()[-1][:70], *[""] * (len(HEADER) - 2)])
            continue
        speed = outcome.pairs_per_second(task)
        other = outcome is not ours and not ours.error
        rows.append(
            [
                f"{outcome.side}{', ' if outcome.note else ''}{outcome.note}",
                f"{speed:.3g}",
                f"{ours.pairs_per_second(task) / speed:.2f} x" if other else "",
                f"{speed * tokens:,.0f}",
                f"{outcome.flops_per_second(task) / peak:.1%}",
                f"{outcome.peak_bytes / 2**30:.2f}",
                f"{ours.peak_bytes / outcome.peak_bytes:.0%}" if other else "",
                f"{loss_difference(ours, outcome):.1e}" if other else "",
                f"{outcome.reference_seconds:.1f}" if outcome.reference_seconds else "",
            ]
        )
    return rows


def loss_difference(first: Outcome, second: Outcome) -> float:
    """Largest difference of a step's loss."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))
