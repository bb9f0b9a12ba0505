"""Rows -> groups: which shape the rows have, and what each shape means. A row that does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from prefopt.data.feedback import FINISHED_COLUMNS, finished, label_feedback, pair_feedback, ranking_feedback, scores_feedback
from prefopt.data.groups import NO_PROMPT, Feedback, Group, Turn
from prefopt.data.messages import both_turns, is_listed, json_text, listed, to_turns
from prefopt.data.read import Row
from prefopt.data.refusals import Reason, Refusal, check_text
from prefopt.data.transcripts import HH_MARKERS, common_turns, is_hh, split_common_prefix, split_hh

Form = Literal["text", "hh", "messages"]
Turns = tuple[Turn, ...]

PROMPT_COLUMNS = ("prompt", "conversations", "messages", "instruction", "question")
COMPLETION_COLUMNS = ("completion", "response", "output")
RESPONSES_COLUMNS = ("responses", "completions")
FEEDBACK_COLUMNS = ("label", "scores", "ranking", "margin", "probability", "weight", "tie")
OTHER_COLUMNS = ("chosen", "rejected", "input", "history", "system", "tools")
USED_COLUMNS = frozenset(
    (*PROMPT_COLUMNS, *COMPLETION_COLUMNS, *RESPONSES_COLUMNS, *FEEDBACK_COLUMNS, *FINISHED_COLUMNS, *OTHER_COLUMNS)
)
_INSTRUCTING = ("system", "developer")


def row_shape(row: Mapping[str, Any]) -> str:
    """The shape (one of `ROW_SHAPES` but "auto") that the names of the fields of `row` have, "" where none has them."""
    keys = {key for key, value in row.items() if value is not None}
    if keys >= {"chosen", "rejected"}:
        return "pair" if keys & set(PROMPT_COLUMNS) else "transcripts"
    if keys & set(RESPONSES_COLUMNS) and keys & {"scores", "ranking"}:
        return "ranking" if "ranking" in keys else "scores"
    conversation = bool(keys & {"messages", "conversations"})
    completed = bool(keys & set(COMPLETION_COLUMNS)) and bool(keys & set(PROMPT_COLUMNS))
    if conversation or completed:
        return "label" if "label" in keys else "demonstration"
    return ""


def _pair(row: Row, source: str) -> Group:
    names = ("chosen", "rejected")
    values = [_needed(row, name) for name in names]
    return _answered(row, source, names, values, pair_feedback(row))


def _transcripts(row: Row, source: str) -> Group:
    chosen, rejected = _needed(row, "chosen"), _needed(row, "rejected")
    feedback = pair_feedback(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and not (is_hh(chosen) or is_hh(rejected)):
        prompt, *rests = split_common_prefix(check_text(chosen, "chosen"), check_text(rejected, "rejected"))
        _check_blank(chosen, rejected)
        if not prompt.strip():
            reason = Reason.IDENTICAL_RESPONSES if chosen == rejected else Reason.PROMPTS_DIFFER
            raise Refusal(reason, "chosen, rejected", (chosen[:30], rejected[:30]), "two texts that begin with the same prompt")
        responses = tuple((Turn("assistant", rest),) for rest in rests)
        return _group(row, source, (Turn("user", prompt),), responses, feedback, "text")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _hh_transcripts(row, source, chosen, rejected, feedback)
    first, second = both_turns(chosen, rejected, ("chosen", "rejected"))
    cut = common_turns(first, second)
    if cut == 0:
        found = (_outline(first), _outline(second))
        raise Refusal(Reason.PROMPTS_DIFFER, "chosen, rejected", found, "conversations that part at a turn of the assistant")
    return _group(row, source, first[:cut], (first[cut:], second[cut:]), feedback, "messages")


def _hh_transcripts(row: Row, source: str, chosen: str, rejected: str, feedback: Feedback) -> Group:
    prompts, responses = [], []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not is_hh(text):
            raise Refusal(
                Reason.PROMPTS_DIFFER, name, text, 'a transcript that begins with "\\n\\nHuman:", as the other one does'
            )
        *before, last = split_hh(check_text(text, name))
        if last.role != "assistant":
            raise Refusal(Reason.NO_ASSISTANT_TURN, name, last.content, 'a last turn that begins with "\\n\\nAssistant:"')
        prompts.append(tuple(before))
        responses.append((last,))
    if prompts[0] != prompts[1]:
        turns = zip(*prompts, strict=False)
        place = next((index for index, (a, b) in enumerate(turns) if a != b), min(map(len, prompts)))
        found = tuple(prompt[place].content[:30] if place < len(prompt) else "(no turn)" for prompt in prompts)
        expected = f"the same turns before the last reply; they part at turn {place + 1}"
        raise Refusal(Reason.PROMPTS_DIFFER, "chosen, rejected", found, expected)
    return _group(row, source, prompts[0], tuple(responses), feedback, "hh")


def _label(row: Row, source: str) -> Group:
    feedback = label_feedback(row)
    name = _present(row, COMPLETION_COLUMNS)
    if name:
        return _answered(row, source, (name,), [row[name]], feedback)
    field, turns = _conversation(row)
    _check_last(turns, field)
    return _group(row, source, turns[:-1], (turns[-1:],), feedback, "messages", (field,))


def _scores(row: Row, source: str) -> Group:
    names, values = _responses(row)
    return _answered(row, source, names, values, scores_feedback(row, len(values)))


def _ranking(row: Row, source: str) -> Group:
    names, values = _responses(row)
    return _answered(row, source, names, values, ranking_feedback(row, len(values)))


def _demonstration(row: Row, source: str) -> Group:
    """Every assistant turn from the first answer on is demonstrated; the turns before it are the prompt."""
    feedback = Feedback("demonstration", weight=pair_feedback(row).weight)
    name = _present(row, COMPLETION_COLUMNS)
    if name:
        return _answered(row, source, (name,), [row[name]], feedback)
    field, turns = _conversation(row)
    _check_last(turns, field)
    asked = next((index for index, turn in enumerate(turns) if turn.role in ("user", "tool")), 0)
    cut = next(index for index, turn in enumerate(turns) if turn.role == "assistant" and index >= asked)
    return _group(row, source, turns[:cut], (turns[cut:],), feedback, "messages", (field,))


READERS: dict[str, Callable[[Row, str], Group]] = {
    "pair": _pair,
    "transcripts": _transcripts,
    "label": _label,
    "scores": _scores,
    "ranking": _ranking,
    "demonstration": _demonstration,
}


def _present(row: Row, names: Iterable[str]) -> str:
    return next((name for name in names if row.get(name) is not None), "")


def _needed(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise Refusal(Reason.MISSING_FIELD, name, sorted(map(str, row)), f'a field "{name}"')
    return row[name]


def _responses(row: Row) -> tuple[tuple[str, ...], list[Any]]:
    name = _present(row, RESPONSES_COLUMNS)
    values = list(listed(_needed(row, name or "responses"), name))
    if len(values) < 2:
        raise Refusal(Reason.WRONG_TYPE, name, values, "at least two responses")
    return tuple(f"{name}[{index}]" for index in range(len(values))), values


def _conversation(row: Row) -> tuple[str, Turns]:
    name = _present(row, ("messages", "conversations"))
    if not name:
        raise Refusal(Reason.MISSING_FIELD, "messages", sorted(map(str, row)), '"messages", or a prompt and a completion')
    return name, to_turns(row[name], name)


def _prompt(row: Row) -> tuple[Turns, Form]:
    """The prompt that a row states."""
    name = _present(row, PROMPT_COLUMNS)
    if not name:
        raise Refusal(
            Reason.MISSING_FIELD, "prompt", sorted(map(str, row)), f'a field "prompt" (or {", ".join(PROMPT_COLUMNS[1:])})'
        )
    value = row[name]
    listed_text = name in ("messages", "conversations")
    if not isinstance(value, str) or listed_text:
        return to_turns(value, name), "messages"
    if is_hh(value):
        turns = split_hh(check_text(value, name))
        return (turns[:-1] if turns[-1] == Turn("assistant", "") else turns), "hh"
    if name == "instruction":
        return _instruction(row, value)
    return (Turn("user", check_text(value, name)),), "text"


def _instruction(row: Row, instruction: str) -> tuple[Turns, Form]:
    """Alpaca's fields: `input` follows the instruction on a line of its own, `history` holds earlier (question, answer)."""
    parts = [(name, row[name]) for name in ("instruction", "input") if row.get(name) not in (None, "")]
    for name, value in parts:
        if not isinstance(value, str):
            raise Refusal(Reason.WRONG_TYPE, name, value, "text")
    earlier: list[Turn] = []
    for index, exchange in enumerate(listed(row.get("history") or (), "history")):
        if not is_listed(exchange) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise Refusal(Reason.WRONG_TYPE, f"history[{index}]", exchange, "[question, answer]")
        earlier += [Turn("user", check_text(exchange[0], "history")), Turn("assistant", check_text(exchange[1], "history"))]
    text = "\n".join(check_text(value, name) for name, value in parts) if parts else instruction
    return (*earlier, Turn("user", text)), "messages" if earlier else "text"


def _answered(row: Row, source: str, names: tuple[str, ...], values: Sequence[Any], feedback: Feedback) -> Group:
    """The group of a row that states its prompt, and responses `values` that may repeat it."""
    prompt, form = _prompt(row)
    if form == "text" and any(not isinstance(value, str) for value in values):
        form = "messages"
    parts = [_response(prompt, form, value, name) for name, value in zip(names, values, strict=True)]
    prompts = {full for full, _ in parts}
    if len(prompts) > 1:
        found = tuple(_outline(full) for full, _ in parts)
        raise Refusal(Reason.PROMPTS_DIFFER, ", ".join(names), found, "the same turns before each response")
    return _group(row, source, parts[0][0], tuple(response for _, response in parts), feedback, form, names)


def _response(prompt: Turns, form: Form, value: Any, name: str) -> tuple[Turns, Turns]:
    """`(prompt, response)`; the prompt gains a system turn where the response repeats the prompt behind one."""
    if isinstance(value, str):
        check_text(value, name)
        if form == "hh":
            turns = split_hh(value if is_hh(value) else HH_MARKERS["assistant"] + value)
        elif is_hh(value):
            raise Refusal(Reason.PROMPTS_DIFFER, name, value, "a response; drop the prompt's field to read whole transcripts")
        else:
            return prompt, (Turn("assistant", value),)
    else:
        turns = to_turns(value, name)
    if turns and turns[0].role == "assistant":
        repeats = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
        return prompt, turns[len(prompt) :] if repeats else turns
    heads = 0 if turns[: len(prompt)] == prompt else sum(1 for turn in turns[:1] if turn.role in ("system", "developer"))
    end = heads + len(prompt)
    if turns and turns[heads:end] != prompt:
        raise Refusal(Reason.PROMPTS_DIFFER, name, _outline(turns), "the turns of the prompt, then the response")
    return turns[:end] or prompt, turns[end:]


def _group(
    row: Row,
    source: str,
    prompt: Turns,
    responses: tuple[Turns, ...],
    feedback: Feedback,
    form: Form,
    names: tuple[str, ...] = ("chosen", "rejected"),
) -> Group:
    """The group, with the row's system text, tools and cut responses, once its prompt and responses are found to be usable."""
    system = row.get("system")
    if system not in (None, ""):
        if not isinstance(system, str):
            raise Refusal(Reason.WRONG_TYPE, "system", system, "text")
        if prompt and prompt[0].role in ("system", "developer"):
            raise Refusal(Reason.WRONG_TYPE, "system", system, "one system text: in this field or in the messages, not both")
        prompt, form = (Turn("system", check_text(system, "system")), *prompt), "messages"
    bare = form == "text" and prompt == NO_PROMPT
    if not bare and not any(turn.content.strip() or turn.tool_calls for turn in prompt if turn.role not in _INSTRUCTING):
        raise Refusal(Reason.EMPTY_PROMPT, "prompt", tuple(turn.content for turn in prompt), "a prompt with text")
    for name, response in zip(names, responses, strict=True):
        _check_last(response, name)
        if response[0].role != "assistant":
            raise Refusal(
                Reason.NO_ASSISTANT_TURN, name, _outline(response), "a response that begins with the assistant's turn"
            )
        if not (response[-1].content.strip() or response[-1].tool_calls):
            raise Refusal(Reason.EMPTY_RESPONSE, name, response[-1].content, "a response with text")
    if len(responses) > 1 and all(response == responses[0] for response in responses[1:]):
        raise Refusal(Reason.IDENTICAL_RESPONSES, ", ".join(names[:2]), responses[0][-1].content, "responses that differ")
    return Group(prompt, responses, feedback, form, source, json_text(row.get("tools"), "tools"), finished(row, names))


def _check_last(turns: Turns, field: str) -> None:
    if not turns or turns[-1].role != "assistant":
        raise Refusal(Reason.NO_ASSISTANT_TURN, field, _outline(turns), "a last turn by the assistant")


def _check_blank(chosen: str, rejected: str) -> None:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Refusal(Reason.EMPTY_RESPONSE, name, text, "a prompt and a response")


def _outline(turns: Turns) -> str:
    return " ".join(turn.role for turn in turns) or "no turns"
