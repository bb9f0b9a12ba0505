"""Results of the measures that keep a section of their own in evaluation.json, beside those of `prefopt evaluate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prefopt.core.files import check_writable, digest
from prefopt.core.run_folder import RunFolder

FILE = "evaluation.json"
SECTIONS = ("win_rates", "agreements", "accuracies", "calibrations", "temperatures")


def check_results(folder: RunFolder) -> None:
    """StorageError, before anything is measured, where the folder cannot be written or holds results that cannot be read."""
    check_writable(folder.path)
    folder.read(FILE)


def add_result(folder: RunFolder, section: str, keys: Sequence[str], result: Any) -> None:
    """Put `result` under `section`, then under each of `keys`, into evaluation.json; everything else in it stays."""
    whole = folder.read(FILE) or {}
    place = whole.setdefault(section, {})
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = result
    folder.write(FILE, whole)


def kept_results(folder: RunFolder) -> dict[str, Any]:
    """The sections of evaluation.json that `prefopt evaluate` itself does not measure."""
    found = folder.read(FILE) or {}
    return {name: found[name] for name in SECTIONS if name in found}


def file_name(*words: str) -> str:
    """A name for a file about `words`: readable, and different where any of them differs."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(words)).strip("-")
    return f"{readable[-60:].strip('-')}-{digest(*words)[:8]}"
