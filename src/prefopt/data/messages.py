"""Messages of a row -> turns: OpenAI's and ShareGPT's spelling, content lists, tool calls. Refuses what it cannot keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.groups import ROLES, Turn
from prefopt.data.refusals import Reason, Refusal, check_text

ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",  # its text is the calls
    "observation": "tool",
    "function": "tool",
}
MESSAGE_KEYS = ("role", "content", "from", "value", "tool_calls")


def is_listed(value: Any) -> bool:
    """Whether `value` is a sequence of values, as JSON's arrays are."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Sequence) and not isinstance(value, (str, bytes)))


def listed(value: Any, field: str) -> Sequence[Any]:
    """`value` as a list. JSON text of a list counts as one, for tables whose cells are text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refusal(Reason.WRONG_TYPE, field, value, "a list, or JSON text of one") from None
    if not is_listed(value):
        raise Refusal(Reason.WRONG_TYPE, field, value, "a list")
    sequence: Sequence[Any] = value
    return sequence


def to_turns(value: Any, field: str) -> tuple[Turn, ...]:
    """Turns of a message or a list of messages."""
    if isinstance(value, Mapping):
        return (to_turn(value, field),)
    return _turns(listed(value, field), field, 0)


def both_turns(first: Any, second: Any, fields: tuple[str, str]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """`to_turns` of two conversations, of which what they begin with in common is looked at once."""
    turns = to_turns(first, fields[0])
    if type(first) is not list or type(second) is not list:
        return turns, to_turns(second, fields[1])
    same = 0
    for one, other in zip(first, second, strict=False):
        if one != other or "tool_calls" in one:
            break
        same += 1
    return turns, turns[:same] + _turns(second, fields[1], same)


def _turns(messages: Sequence[Any], field: str, start: int) -> tuple[Turn, ...]:
    """Turns of `messages` from `start` on."""
    return tuple(
        _usual(message) or to_turn(message, f"{field}[{index}]") for index, message in enumerate(messages[start:], start=start)
    )


def _usual(message: Any) -> Turn | None:
    """The turn of a message that is as most are, role and ASCII content and no more; None for any other."""
    if type(message) is dict and len(message) == 2:
        role, content = message.get("role"), message.get("content")
        if type(role) is str and role in ROLES and type(content) is str and content.isascii():
            return Turn(role, content)
    return None


def to_turn(message: Any, field: str) -> Turn:
    """The turn of one message: `role` and `content`, or `from` and `value`."""
    if not isinstance(message, (dict, Mapping)):  # the check of dict alone is many times as fast
        raise Refusal(Reason.WRONG_TYPE, field, message, 'a message: {"role": ..., "content": ...}')
    role_key, content_key = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    name = message.get(role_key)
    if name is None:
        raise Refusal(Reason.MISSING_FIELD, f"{field}.{role_key}", dict(message), 'a message: {"role": ..., "content": ...}')
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise Refusal(Reason.UNKNOWN_ROLE, f"{field}.{role_key}", name, f"one of {', '.join(ROLE_NAMES)}")
    role = ROLE_NAMES[name]
    calls = _tool_calls(message.get("tool_calls"), f"{field}.tool_calls")
    if calls and role != "assistant":
        raise Refusal(Reason.WRONG_TYPE, f"{field}.tool_calls", calls, "tool calls only in messages of the assistant")
    content = message.get(content_key)
    if name == "function_call":
        return Turn(role, "", _function_call(content, f"{field}.{content_key}"))
    if content is None and calls:
        return Turn(role, "", calls)
    return Turn(role, _content(content, f"{field}.{content_key}"), calls)


def _content(content: Any, field: str) -> str:
    """The text of a message's content; parts of type "text" are joined, other parts refused."""
    if content is None:
        raise Refusal(Reason.MISSING_FIELD, field, content, "the text of the message")
    if isinstance(content, str):
        return check_text(content, field)
    if not is_listed(content):
        raise Refusal(Reason.WRONG_TYPE, field, content, 'text, or a list of {"type": "text", "text": ...}')
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise Refusal(Reason.WRONG_TYPE, f"{field}[{index}]", part, 'a part {"type": "text", "text": ...}')
        texts.append(check_text(text, f"{field}[{index}].text"))
    return "".join(texts)


def _tool_calls(value: Any, field: str) -> str:
    if value is None or value == "" or (is_listed(value) and not value):
        return ""
    return json_text(listed(value, field), field)


def _function_call(value: Any, field: str) -> str:
    """ShareGPT's `{"name": ..., "arguments": ...}`, or a list of them, as OpenAI's tool calls."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise Refusal(Reason.WRONG_TYPE, field, value, 'JSON: {"name": ..., "arguments": ...}') from None
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not is_listed(calls) or not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise Refusal(Reason.WRONG_TYPE, field, value, 'JSON: {"name": ..., "arguments": ...}')
    return json_text([{"type": "function", "function": dict(call)} for call in calls], field)


def json_text(value: Any, field: str) -> str:
    """JSON text of `value`. Text that is JSON already is kept as it is; None and "" and an empty list are ""."""
    if value is None or value == "" or (is_listed(value) and not value):
        return ""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            raise Refusal(Reason.WRONG_TYPE, field, value, "JSON") from None
        return check_text(value, field)
    try:
        return check_text(json.dumps(value, ensure_ascii=False), field)
    except (TypeError, ValueError):
        raise Refusal(Reason.WRONG_TYPE, field, value, "a value that can be written as JSON") from None
