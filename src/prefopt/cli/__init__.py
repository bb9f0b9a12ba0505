"""The command line: one verb a task. Heavy imports are inside the commands, so that help answers at once."""

from __future__ import annotations

from prefopt.cli.app import main

__all__ = ["main"]
