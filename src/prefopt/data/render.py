"""Turns -> text with marked pieces: through the model's chat template, or as plain text.

A `Piece` is a stretch of text that is tokenised on its own. Text inside a turn that happens to spell one of the
tokenizer's special tokens is marked literal, so that it cannot end a turn or open a new one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt.core.errors import ConfigError, ModelError
from prefopt.data.groups import Turn
from prefopt.data.skeleton import Skeletons, kinds, only_copies

# Private-use characters that stand for special-token text while the template runs.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class UnusableTemplate(Exception):
    """A row that the template cannot render; becomes a BadRow."""

    def __init__(self, reason: str, found: str, expected: str) -> None:
        super().__init__(reason)
        self.reason, self.found, self.expected = reason, found[:120], expected


@dataclass(frozen=True, slots=True)
class Piece:
    """Text in `parts` (text, literal), whether it is scored, whether it continues earlier text.

    `wants_prefix`: the tokenizer's beginning-of-text token goes in front. `end_of_turn` is the token that ends a turn.
    """

    parts: tuple[tuple[str, bool], ...]
    end_of_turn: int
    scored: bool = False
    continues: bool = True
    wants_prefix: bool = False

    @property
    def has_literal(self) -> bool:
        return any(literal for _, literal in self.parts)


class Renderer(Protocol):
    """Renders prompts and responses for one tokenizer."""

    end_of_turn: int
    is_plain: bool

    def prompt(self, turns: Sequence[Turn], tools: str) -> Piece:
        """The prompt up to the place where the assistant starts to write."""
        ...

    def response(self, prompt: Sequence[Turn], turns: Sequence[Turn], tools: str) -> list[Piece]:
        """What follows the prompt: assistant turns scored, anything else not."""
        ...

    def without_end(self, piece: Piece) -> Piece:
        """The last piece of a response that was cut: nothing follows its text."""
        ...


class SpecialText:
    """Marks special-token text in contents before rendering and splits it off afterwards."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.tokens = sorted(
            {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens),
            key=len,
            reverse=True,
        )
        self.pattern = re.compile("|".join(re.escape(token) for token in self.tokens)) if self.tokens else None
        self.beginnings = {token[0] for token in self.tokens}

    def mark(self, content: str) -> str:
        if self.pattern is None:
            return content
        for letter in self.beginnings:
            if letter in content:
                break
        else:
            return content
        return self.pattern.sub(lambda found: f"{_OPEN}{self.tokens.index(found.group())}{_CLOSE}", content)

    def split(self, text: str) -> tuple[tuple[str, bool], ...]:
        if _OPEN not in text:
            return ((text, False),) if text else ()
        parts: list[tuple[str, bool]] = []
        start = 0
        for found in _MARK.finditer(text):
            parts.append((text[start : found.start()], False))
            parts.append((self.tokens[int(found.group(1))], True))
            start = found.end()
        parts.append((text[start:], False))
        return tuple(part for part in parts if part[0])


class _Opening(NamedTuple):
    """A prompt as text. `kinds`: of its turns, where a skeleton knows all of them."""

    turns: Sequence[Turn]
    tools: str
    text: str
    kinds: tuple[object, ...] | None


class ChatRenderer:
    """Through a chat template. The response is what the template writes after the rendered prompt."""

    is_plain = False

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.skeletons = Skeletons() if only_copies(template) else None
        self.special = SpecialText(tokenizer)
        self._opened: _Opening | None = None
        self.closing = self._find_closing()
        self.end_of_turn = self._find_end_of_turn()

    def prompt(self, turns: Sequence[Turn], tools: str) -> Piece:
        return Piece(self.special.split(self._opening(turns, tools).text), self.end_of_turn, continues=False)

    def response(self, prompt: Sequence[Turn], turns: Sequence[Turn], tools: str) -> list[Piece]:
        _check_end(turns, self.end_of_turn)
        opened = self._opening(prompt, tools)
        behind = self._behind(opened, turns[0]) if len(turns) == 1 else None
        if behind is not None:
            return [Piece(self.special.split(behind), self.end_of_turn, scored=True)]
        whole = self._render((*prompt, *turns), tools)
        pieces: list[Piece] = []
        opening = _beginning(opened.text, whole)
        position = len(opening)
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, after = (*prompt, *turns[:index]), (*prompt, *turns[: index + 1])
            start = len(_beginning(self._render(before, tools, generate=True), whole) if index else opening)
            end = len(_beginning(self._render(after, tools), whole) if index < len(turns) - 1 else whole)
            if start > position:
                pieces.append(Piece(self.special.split(whole[position:start]), self.end_of_turn))
            pieces.append(Piece(self.special.split(whole[start:end]), self.end_of_turn, scored=True))
            position = end
        return pieces

    def _opening(self, prompt: Sequence[Turn], tools: str) -> _Opening:
        """The prompt with what opens the assistant's turn. It is the same for all responses of a group."""
        if self._opened is None or self._opened.turns != prompt or self._opened.tools != tools:
            contents = [self.special.mark(turn.content) for turn in prompt]
            text = self._render_marked(prompt, contents, tools, generate=True)
            self._opened = _Opening(
                prompt, tools, text, None if any(turn.tool_calls for turn in prompt) else kinds(prompt, contents)
            )
        return self._opened

    def _behind(self, opened: _Opening, turn: Turn) -> str | None:
        """What the template writes for `turn` behind an opening, where that can be known without rendering it."""
        if self.skeletons is None or opened.kinds is None or turn.tool_calls:
            return None
        prompt, tools = opened.turns, opened.tools
        return self.skeletons.behind(
            opened.kinds,
            turn,
            self.special.mark(turn.content),
            tools,
            lambda holes: self._rendered(prompt, holes, tools, generate=True),
            lambda holes: self._rendered((*prompt, turn), holes, tools, generate=False),
        )

    def without_end(self, piece: Piece) -> Piece:
        """Without the end-of-turn token, and without what this template writes around it."""
        *before, (text, literal) = piece.parts or (("", False),)
        if literal:
            return piece
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        if end in text:
            text = text[: text.rindex(end)].removesuffix(self.closing.partition(end)[0])
        else:
            text = text.removesuffix(self.closing)
        return replace(piece, parts=(*before, (text, False)) if text else tuple(before))

    def _render(self, turns: Sequence[Turn], tools: str, *, generate: bool = False) -> str:
        return self._render_marked(turns, [self.special.mark(turn.content) for turn in turns], tools, generate=generate)

    def _render_marked(self, turns: Sequence[Turn], contents: Sequence[str], tools: str, *, generate: bool) -> str:
        if self.skeletons is None or any(turn.tool_calls for turn in turns):
            return self._rendered(turns, contents, tools, generate=generate)
        return self.skeletons.filled(
            turns, contents, (tools, generate), lambda holes: self._rendered(turns, holes, tools, generate=generate)
        )

    def _rendered(self, turns: Sequence[Turn], contents: Sequence[str], tools: str, *, generate: bool) -> str:
        from jinja2 import TemplateError

        messages = [self._message(turn, content) for turn, content in zip(turns, contents, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=json.loads(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UnusableTemplate("template refuses the turns", f"{error}", "turns that the chat template accepts") from error
        return str(text)

    def _message(self, turn: Turn, content: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.tool_calls:
            message["tool_calls"] = json.loads(turn.tool_calls)
        return message

    def _find_closing(self) -> str:
        """What the template writes after an assistant's content at the end of a conversation."""
        probe = "prefopt-probe"
        try:
            text = self._render((Turn("user", "a"), Turn("assistant", probe)), "")
        except UnusableTemplate as error:
            raise ModelError(
                f"The chat template cannot render a user and an assistant turn ({error.found})",
                todo="Give a working template with data.template=FILE.jinja.",
            ) from error
        return text[text.rindex(probe) + len(probe) :]

    def _find_end_of_turn(self) -> int:
        """The first special token of the closing, else end-of-sequence."""
        tail = self.tokenizer(self.closing, add_special_tokens=False)["input_ids"]
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return next((int(token) for token in tail if token in special), _end_of_sequence(self.tokenizer))


def _beginning(text: str, whole: str) -> str:
    """`text`, which `whole` has to begin with."""
    if not whole.startswith(text):
        raise UnusableTemplate(
            "template does not extend the prompt",
            repr(text[-60:]),
            "a chat template that only appends when turns are added",
        )
    return text


class PlainRenderer:
    """Without a template: strings as they are, conversations as `\\n\\nHuman:` / `\\n\\nAssistant:` text."""

    is_plain = True

    def __init__(self, tokenizer: Any, *, conversation: bool) -> None:
        self.conversation = conversation
        self.special = SpecialText(tokenizer)
        self.end_of_turn = _end_of_sequence(tokenizer)

    def prompt(self, turns: Sequence[Turn], tools: str) -> Piece:
        text = "".join(self._written(turn) for turn in turns)
        if self.conversation:
            text += "\n\nAssistant:"
        return Piece(self.special.split(text), self.end_of_turn, continues=False, wants_prefix=True)

    def response(self, prompt: Sequence[Turn], turns: Sequence[Turn], tools: str) -> list[Piece]:
        _check_end(turns, self.end_of_turn)
        pieces = []
        for number, turn in enumerate(turns):
            text = self._written(turn)
            if turn.role == "assistant" and self.conversation:
                label = "\n\nAssistant:"
                if number > 0:
                    pieces.append(Piece(self.special.split(label), self.end_of_turn))
                text = text.removeprefix(label)
            pieces.append(Piece(self.special.split(text), self.end_of_turn, scored=turn.role == "assistant"))
        return pieces

    def without_end(self, piece: Piece) -> Piece:
        """Plain text has no end of its own: the end-of-turn token is added to what is finished."""
        return piece

    def _written(self, turn: Turn) -> str:
        content = self.special.mark(turn.content)
        if not self.conversation:
            return content
        name = {"user": "Human", "assistant": "Assistant"}.get(turn.role, turn.role.capitalize())
        return f"\n\n{name}: {content}"


NO_TOKEN = -1  # no token of the tokenizer ends a turn


def _end_of_sequence(tokenizer: Any) -> int:
    return NO_TOKEN if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _check_end(turns: Sequence[Turn], end_of_turn: int) -> None:
    """Refuse a response that is not the assistant's, or that no token could end."""
    if not turns or turns[-1].role != "assistant":
        found = turns[-1].role if turns else "nothing"
        raise UnusableTemplate("no assistant turn", found, "a response that ends with the assistant")
    if end_of_turn == NO_TOKEN:
        raise UnusableTemplate(
            "no end-of-turn",
            "no token that ends a turn",
            "a template that writes one, or a tokenizer with an end-of-sequence token",
        )


def make_renderer(tokenizer: Any, *, template: str, form: str) -> Renderer:
    """The renderer for rows of `form` (text, hh, messages) under `template` (auto, chat, plain, or a .jinja file).

    Raises ModelError where chat rows meet a tokenizer without a template, ConfigError for a template that is no file.
    """
    own = getattr(tokenizer, "chat_template", None)
    if template not in ("auto", "chat", "plain"):
        path = Path(template)
        if not path.is_file():
            raise ConfigError(
                f'data.template: "{template}" is not a file', todo="Use auto, chat, plain, or the path of a .jinja file."
            )
        return ChatRenderer(tokenizer, path.read_text(encoding="utf-8"))
    if template == "plain" or (template == "auto" and not own and form != "messages"):
        return PlainRenderer(tokenizer, conversation=form != "text")
    if not own:
        raise ModelError(
            "The rows are chat messages and the model's tokenizer has no chat template",
            todo="Give one with data.template=FILE.jinja, or data.template=plain to write Human/Assistant text.",
        )
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    return ChatRenderer(tokenizer, own)
