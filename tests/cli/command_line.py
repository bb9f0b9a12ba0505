"""The command `prefopt` within this process: what it prints and its exit code, through the entry point that users call."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from prefopt.cli.app import main


@dataclass(frozen=True)
class Done:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str


def prefopt(*words: object) -> Done:
    """Run `prefopt WORDS`."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prefopt", *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Done(code, out.getvalue(), err.getvalue())
