"""The one data type: a prompt, K responses to it, and what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from prefopt.core.losses.facts import Kind

ROLES = ("system", "user", "assistant", "tool", "developer")


class Turn(NamedTuple):
    """One message of a conversation. `tool_calls` is the JSON text of an assistant's calls, "" without any."""

    role: str
    content: str
    tool_calls: str = ""


NO_PROMPT = (Turn("user", ""),)  # a prompt that is written as "": responses are plain text that follows nothing


@dataclass(frozen=True, slots=True)
class Feedback:
    """What is known about the responses of a group.

    pair: responses are (chosen, rejected), with an optional margin, probability that chosen is better, and weight; with
    `tie` neither is better. label: one response, desirable or not. ranking: 1 is best, one rank a response. scores:
    higher is better.
    """

    kind: Kind
    label: bool | None = None
    margin: float | None = None
    probability: float | None = None
    weight: float = 1.0
    ranking: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and K responses.

    `form` says how the row was written, which decides how it is rendered without a chat template: "text" (one user
    turn that is a plain string, responses that are plain strings), "hh" (`\\n\\nHuman:` transcripts), "messages".
    `source` names the row in errors: `file:line`. `tools` is the JSON text of tool schemas, "" without any. `finished`
    says of each response whether it came to its end or was cut at a token limit; () where all did.
    """

    prompt: tuple[Turn, ...]
    responses: tuple[tuple[Turn, ...], ...]
    feedback: Feedback
    form: Literal["text", "hh", "messages"] = "messages"
    source: str = ""
    tools: str = ""
    finished: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was refused: where, why (one of a fixed list of reasons), and what was found in which field."""

    source: str
    reason: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason} ({self.field}: found {self.found}, expected {self.expected})"


@dataclass(frozen=True, slots=True)
class GroupSet:
    """All groups of one source, with what was refused on the way. `shape` is the detected shape of the rows.

    `groups`: a tuple of few, else `prefopt.data.group_store.StoredGroups`, whose texts are not in memory.
    """

    groups: Sequence[Group]
    bad: tuple[BadRow, ...] = ()
    shape: str = ""
    rows: int = 0
    name: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
