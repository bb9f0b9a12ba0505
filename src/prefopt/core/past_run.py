"""What a run was configured with."""

from __future__ import annotations

from pathlib import Path

from prefopt.core.config import RunConfig
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder


def run_config(name: str) -> RunConfig | None:
    """The configuration of the run in the folder `name`; None where `name` is no run folder."""
    folder = RunFolder(Path(name))
    values = folder.read("config.json") if (folder.path / "events.jsonl").exists() else None
    return None if values is None else resolve_config(values, source=str(folder.path / "config.json"))
