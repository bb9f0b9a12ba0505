"""The run folder: the database of a run, and the only thing that reports and listings read.

config.json       the resolved configuration
env.json          versions, device, precision, command
audit.json        what `prefopt check` found in the rows
events.jsonl      what happened, appended (prefopt.core.events)
evaluation.json   results of `prefopt evaluate`
samples.jsonl     policy and reference on the same prompts
comparisons/      every comparison that a judge made, a file for each opponent and judge
checkpoints/      step-000123/ in Hugging Face's layout, with a manifest written last
report.html       written by `prefopt report`
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prefopt.core.errors import StorageError
from prefopt.core.events import Event, EventLog, read_events
from prefopt.core.files import read_json, whole_file, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and contents of one run. Opening a folder never changes it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def log(self) -> EventLog:
        """The appender of this run's events."""
        return EventLog(self.events_path)

    def events(self) -> list[Event]:
        """The run's history; see `read_events`."""
        return read_events(self.events_path)

    def write(self, name: str, value: Any) -> None:
        """Write `value` as JSON to the file `name`."""
        write_json(self.path / name, value)

    def read(self, name: str) -> Any | None:
        """The value of the JSON file `name`, or None where the run has no such file."""
        path = self.path / name
        return read_json(path) if path.exists() else None

    def write_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Replace `samples.jsonl`: rows with prompt, policy, reference and their rewards."""
        with whole_file(self.path / "samples.jsonl") as partial, open(partial, "w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def samples(self) -> list[dict[str, Any]]:
        """Rows of `samples.jsonl`; empty where there is none."""
        path = self.path / "samples.jsonl"
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except json.JSONDecodeError as error:
            raise StorageError(
                f"{path}: is not JSON lines ({error})", todo="Remove it and run `prefopt evaluate` again."
            ) from error

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoint folders that were written to the end, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [folder for folder in self.checkpoints.glob("step-*") if checkpoint_is_complete(folder)]
        return sorted(found, key=lambda folder: folder.name)


def open_run(path: Path) -> RunFolder:
    """The run at `path`; StorageError where the folder holds no run."""
    if not (path / "config.json").exists():
        raise StorageError(
            f"{path}: is not a run folder (it has no config.json)",
            todo="Give the train.output_dir of a run; `prefopt runs` lists them.",
        )
    return RunFolder(path)


def checkpoint_is_complete(folder: Path) -> bool:
    """Whether every file that the manifest of `folder` lists is there with its size. The manifest is written last."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def find_runs(root: Path) -> list[RunFolder]:
    """Runs at `root` or up to two folders below it, by name."""
    patterns = ("config.json", "*/config.json", "*/*/config.json")
    folders = {path.parent for pattern in patterns for path in root.glob(pattern)}
    return [RunFolder(folder) for folder in sorted(folders) if (folder / "events.jsonl").exists()]


def environment() -> dict[str, Any]:
    """Versions, platform and command line, for `env.json`."""
    packages = ("prefopt", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
