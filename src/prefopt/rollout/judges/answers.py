"""Answers on disk, by the content of what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefopt.core.files import cache_root, check_writable, digest, write_text

Request = dict[str, Any]  # all that an answer depends on: model, question, sampling options. JSON, and no secrets


class AnswerStore:
    """A file for each answer, written whole as it arrives: a killed run has all that arrived, and asks for nothing twice.

    A file that is broken, or is about another request, counts as absent.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.folder = root or cache_root() / "answers"

    def check(self) -> None:
        """StorageError where nothing can be written; asked before the first answer is paid for."""
        check_writable(self.folder)

    def get(self, request: Request) -> dict[str, Any] | None:
        """What was kept for `request`, or None."""
        try:
            kept = json.loads(self._path(request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("request") != request or not isinstance(kept.get("answer"), dict):
            return None
        return dict(kept["answer"])

    def put(self, request: Request, answer: dict[str, Any]) -> None:
        """Keep `answer`."""
        write_text(self._path(request), json.dumps({"request": request, "answer": answer}) + "\n")

    def _path(self, request: Request) -> Path:
        key = key_of(request)
        return self.folder / key[:2] / f"{key}.json"


def key_of(request: Request) -> str:
    """The name of `request`: 32 hexadecimal digits."""
    return digest(json.dumps(request, sort_keys=True))
