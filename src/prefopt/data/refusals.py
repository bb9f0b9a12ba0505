"""Why a row is refused: the fixed list of reasons, and the exception that carries one from a field to its row."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from prefopt.data.groups import BadRow

_SHOWN_CHARACTERS = 80


class Reason(StrEnum):
    """Every reason for which a row can be refused; `EXPLANATIONS` says what each means."""

    MISSING_FIELD = "missing field"
    WRONG_TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    IDENTICAL_RESPONSES = "identical responses"
    PROMPTS_DIFFER = "prompts differ"
    UNKNOWN_ROLE = "unknown role"
    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not JSON"
    NOT_AN_OBJECT = "not an object"
    NO_ASSISTANT_TURN = "no assistant turn"
    NO_END_OF_TURN = "no end-of-turn"
    BAD_LABEL = "bad label"
    BAD_SCORES = "bad scores"
    TIED_SCORES = "tied scores"


EXPLANATIONS: dict[Reason, str] = {
    Reason.MISSING_FIELD: "a field that the shape needs is absent or null",
    Reason.WRONG_TYPE: "a field holds another kind of value than the shape needs",
    Reason.EMPTY_PROMPT: "the prompt has no text besides white space",
    Reason.EMPTY_RESPONSE: "a response has no text besides white space, so there is nothing to learn",
    Reason.IDENTICAL_RESPONSES: "all responses are the same, so there is no preference",
    Reason.PROMPTS_DIFFER: "the responses do not continue the same prompt, so they cannot be compared",
    Reason.UNKNOWN_ROLE: "a message is by a role that is not system, developer, user, assistant or tool",
    Reason.NOT_UTF8: "bytes that are not UTF-8, or half of a surrogate pair",
    Reason.NOT_JSON: "the line is not JSON",
    Reason.NOT_AN_OBJECT: "the row is not a set of named fields, or has not the columns of its header",
    Reason.NO_ASSISTANT_TURN: "a response has to begin and end with a turn of the assistant",
    Reason.NO_END_OF_TURN: "the chat template does not end the response with an end-of-turn token",
    Reason.BAD_LABEL: "label or tie is not true or false",
    Reason.BAD_SCORES: "scores, ranking, margin, weight or probability is not a usable number or list of numbers",
    Reason.TIED_SCORES: "two responses have the same rank",
}


class Refusal(Exception):
    """A row cannot be used: `field` holds `found` where `expected` was needed. `bad_row` adds where the row is."""

    def __init__(self, reason: Reason, field: str, found: Any, expected: str) -> None:
        self.reason = reason
        self.field = field
        self.found = shown(found)
        self.expected = expected
        super().__init__(f"{reason}: {field}")

    def bad_row(self, source: str) -> BadRow:
        """The BadRow of this refusal for the row at `source` (`file:line`)."""
        return BadRow(source, self.reason, self.field, self.found, self.expected)


def shown(value: Any) -> str:
    """`repr(value)`, at most 80 characters, cut with an ellipsis."""
    if isinstance(value, (str, bytes)):
        value = value[: _SHOWN_CHARACTERS + 1]
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def check_text(text: str, field: str) -> str:
    """`text`, refused where it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 10)
        raise Refusal(Reason.NOT_UTF8, field, text[start : error.end + 10], "text that can be written as UTF-8") from None
    return text
