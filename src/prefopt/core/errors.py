"""Errors that say what is wrong, what was found and what to do. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrefoptError(Exception):
    """Base of every error that a user can mend.

    `what` is one sentence on what is wrong, with what was found; `todo` is one sentence on the way out.
    `exit_code` is what the command line exits with: the table is in docs/cli.md.
    """

    exit_code = 1

    def __init__(self, what: str, *, todo: str = "") -> None:
        self.what = what
        self.todo = todo
        super().__init__(f"{what}\n  {todo}" if todo else what)


class ConfigError(PrefoptError):
    """A key, a value or a combination of values that cannot be run."""

    exit_code = 2


class DataError(PrefoptError):
    """A file or a row that cannot be read or trained on."""

    exit_code = 3


class ModelError(PrefoptError):
    """A model or tokenizer that cannot be loaded, or does not fit the rows."""

    exit_code = 4


class TrainingError(PrefoptError):
    """A run that was stopped before it could go wrong silently: a non-finite loss, a reference that does not match."""

    exit_code = 5


class StorageError(PrefoptError):
    """A folder that cannot be written, a full disk, an incomplete checkpoint."""

    exit_code = 6


class Interrupted(PrefoptError):
    """The user stopped the run; the step was finished and saved."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """`'; did you mean "x"?'` for the known name closest to `name`, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"? ' if close else ""
