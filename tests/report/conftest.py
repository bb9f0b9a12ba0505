"""Fixtures of the report's tests: a whole synthetic run, and runs that have events and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.run_folder import RunFolder
from report.synthetic_run import synthetic_config, write_events, write_run


@pytest.fixture
def full_run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "helpful")


@pytest.fixture
def events_run(tmp_path: Path) -> Callable[[list[dict[str, Any]]], RunFolder]:
    """Makes a run that has events and a config and nothing else."""

    def make(events: list[dict[str, Any]]) -> RunFolder:
        run = RunFolder(tmp_path / "bare")
        write_events(run, events)
        run.write("config.json", synthetic_config())
        return run

    return make
