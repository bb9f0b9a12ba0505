"""An experiment of recipes/paper in its quick form, on a copy of the recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PAPER = Path(__file__).resolve().parents[2] / "recipes" / "paper"


def run_quick_form(experiment: str, folder: Path, **environment: str) -> Path:
    """Run `recipes/paper/EXPERIMENT/run.sh --quick` with the prefopt of the tests; the folder that it wrote."""
    home = folder / "project"
    shutil.copytree(PAPER, home / "recipes" / "paper", dirs_exist_ok=True)
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, words in (("prefopt", "-m prefopt"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (commands / name).chmod(0o755)
    path = {"PATH": f"{commands}:{os.environ['PATH']}"}
    script = home / "recipes" / "paper" / experiment / "run.sh"
    done = subprocess.run(
        ["bash", str(script), "--quick"], env={**os.environ, **environment, **path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return home / "runs" / "paper" / f"{experiment}-quick"
