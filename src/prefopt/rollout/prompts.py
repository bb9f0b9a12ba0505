"""Prompts to sample from, read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.core.errors import DataError
from prefopt.data.groups import Turn
from prefopt.data.messages import listed, to_turns
from prefopt.data.read import read_rows
from prefopt.data.refusals import Reason, Refusal, check_text
from prefopt.data.transcripts import is_hh, join_hh, split_hh

Given = str | list[dict[str, str]]  # a prompt as its row has it: text or a message list
_FIELDS = "prompt (text or message list), turns (the first is used) or messages (up to the last user turn)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, as the turns that the model sees. `form` and `source` are those of `prefopt.data.groups.Group`."""

    turns: tuple[Turn, ...]
    form: Literal["text", "hh", "messages"] = "text"
    source: str = ""

    @property
    def given(self) -> Given:
        """The prompt as rows write it: a string for the forms text and hh, else a message list."""
        if self.form == "text":
            return self.turns[0].content
        if self.form == "hh":
            return join_hh(self.turns) + "\n\nAssistant:"
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @property
    def text(self) -> str:
        """The prompt as one text for people."""
        return prompt_text(self.given)


def prompt_text(given: Given) -> str:
    """One text for people: a lone turn as it is, a conversation as `role: content` paragraphs."""
    if isinstance(given, str):
        return given
    if len(given) == 1:
        return given[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in given)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file of rows (see `prefopt.data.read.read_rows`) or a .txt file (one a line), in their order.

    A row holds `prompt` (text or message list), `turns` (the first is used) or `messages` (up to the last user turn).
    DataError names the first row that cannot be read or has no prompt, and a file without any.
    """
    path = Path(path)
    if path.suffix == ".txt":
        prompts = [as_prompt(line, source=source) for source, line in _lines(path)]
        if not prompts:
            raise DataError(f"{path}: holds no prompts", todo="Write one prompt a line.")
        return prompts
    raw = read_rows(path)
    if raw.bad:
        raise DataError(str(raw.bad[0]), todo=f"Mend or remove this row; a row has {_FIELDS}.")
    return [_of_row(row, source) for row, source in zip(raw.rows, raw.sources, strict=True)]


def as_prompt(value: Any, *, source: str = "") -> Prompt:
    """The Prompt of a text or a message list; a Prompt is given back. DataError where it is neither, or asks nothing.

    A text that begins with `\\n\\nHuman:` is read as a conversation.
    """
    if isinstance(value, Prompt):
        return value
    try:
        return _read(value, source)
    except Refusal as refusal:
        raise DataError(str(refusal.bad_row(source or "prompt")), todo=f"A row has {_FIELDS}.") from None


def _read(value: Any, source: str) -> Prompt:
    if isinstance(value, str):
        check_text(value, "prompt")
        turns = split_hh(value) if is_hh(value) else (Turn("user", value),)
        if is_hh(value) and turns[-1].role == "assistant" and not turns[-1].content.strip():
            turns = turns[:-1]
        form: Literal["text", "hh", "messages"] = "hh" if is_hh(value) else "text"
    else:
        turns, form = to_turns(value, "prompt"), "messages"
    if not any(turn.content.strip() for turn in turns):
        raise Refusal(Reason.EMPTY_PROMPT, "prompt", value, "a prompt with some text")
    if turns[-1].role == "assistant":
        raise Refusal(Reason.WRONG_TYPE, "prompt", value, "a last turn that is not the assistant's")
    return Prompt(turns, form, source)


def _of_row(row: Mapping[str, Any], source: str) -> Prompt:
    try:
        return as_prompt(_asked(row), source=source)
    except Refusal as refusal:
        raise DataError(str(refusal.bad_row(source)), todo=f"A row has {_FIELDS}.") from None


def _asked(row: Mapping[str, Any]) -> Any:
    """The part of `row` that is its prompt."""
    if row.get("prompt") is not None:
        return row["prompt"]
    if row.get("turns") is not None:
        turns = listed(row["turns"], "turns")
        if not turns:
            raise Refusal(Reason.EMPTY_PROMPT, "turns", turns, "at least one turn")
        return turns[0] if isinstance(turns[0], str) else [turns[0]]
    if row.get("messages") is None:
        raise Refusal(Reason.MISSING_FIELD, "prompt", sorted(map(str, row)), "prompt, turns or messages")
    messages = listed(row["messages"], "messages")
    users = [at for at, turn in enumerate(to_turns(messages, "messages")) if turn.role == "user"]
    if not users:
        raise Refusal(Reason.EMPTY_PROMPT, "messages", messages, "a turn of the user")
    return messages[: users[-1] + 1]


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", todo="A .txt file of prompts is UTF-8, one prompt a line."
        ) from error
    return [(f"{path.name}:{at}", line.strip()) for at, line in enumerate(text.split("\n"), start=1) if line.strip()]
