"""Tiny real runs of every kind of objective, trained in seconds, for reports of what training really writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.core.run_folder import RunFolder
from prefopt.pipeline import train_run
from train.tiny_runs import GOOD, POOR, SUBJECTS, preference_rows, tiny_config, write_rows

KINDS = ("pair", "label", "ranking", "demonstration", "reward", "mix")


def rows_of(kind: str, count: int = 40) -> list[dict[str, Any]]:
    """Rows that suit a run of `kind`, made of the tiny model's vocabulary."""
    pairs = preference_rows(count)
    match kind:
        case "label":
            sides = [(row, number % 3 > 0) for number, row in enumerate(pairs)]
            return [
                {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
                for row, good in sides
            ]
        case "ranking":
            return [
                {
                    "prompt": f"What of {SUBJECTS[number % 8]} at {number}?",
                    "responses": [
                        f"It {POOR[number % 5]} {number}",
                        f"It {GOOD[number % 5]} {number}",
                        f"It {GOOD[(number + 2) % 5]}",
                    ],
                    "scores": [0.1, 0.9, 0.4 + number / 1000],
                }
                for number in range(count)
            ]
        case "demonstration":
            return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return pairs


LOSS_OF: dict[str, dict[str, Any]] = {
    "pair": {"name": "dpo"},
    "label": {"name": "kto"},
    "ranking": {"name": "plackett_luce"},
    "demonstration": {"name": "sft"},
    "reward": {"name": "reward"},
    "mix": {"dpo": 1.0, "sft": 0.2},
}


def trained(folder: Path, kind: str, *, loss: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunFolder:
    """A run of twelve steps on rows of `kind`, evaluated before the first step and every four."""
    rows = write_rows(folder / f"{kind}.jsonl", rows_of(kind))
    train = {"output_dir": str(folder / "run"), "max_steps": 12, "eval_every_steps": 4, "lr": 3e-3}
    data = {"train": str(rows), "eval_rows": 12}
    options = {"loss": loss or LOSS_OF[kind], "data": data, "train": train, "reference": {"cache_dir": None}}
    for name, more in sections.items():
        options[name] = {**options.get(name, {}), **more}
    return train_run(tiny_config(folder, **options))
