"""Groups -> token ids, with the prompt as an exact prefix and the loss on assistant tokens only.

Prompt and response are tokenised apart, at the boundary that the chat template (or the plain text) draws: that is
what a model sees when it generates, and it makes the prompt the same token list for every response of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prefopt.core.config import DataConfig
from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.data.groups import NO_PROMPT, BadRow, Feedback, Group, GroupSet, Turn
from prefopt.data.refusals import Reason
from prefopt.data.render import Piece, Renderer, UnusableTemplate, make_renderer

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
TrainOn = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A group as token ids: one prompt, K responses, and which response tokens carry loss (`scored`).

    `finished[k]` says whether response k ends with the end-of-turn token (what was cut at a token limit does not).
    """

    prompt_ids: Ids
    response_ids: tuple[Ids, ...]
    scored: tuple[Flags, ...]
    feedback: Feedback
    source: str = ""
    finished: tuple[bool, ...] = ()
    mismatched: TokenGroup | None = None

    @property
    def unique_tokens(self) -> int:
        """Tokens computed when the prompt is shared: prompt once, plus every response."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


@dataclass(frozen=True)
class TokenSet:
    """Token groups of one source, what was refused on the way, and which rows needed special care."""

    groups: tuple[TokenGroup, ...]
    bad: tuple[BadRow, ...] = ()
    special_text: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()


def encode_groups(groups: GroupSet, tokenizer: Any, *, template: str = "auto", train_on: TrainOn = "all") -> TokenSet:
    """Token ids of every group, at full length.

    `template`: auto, chat, plain, or the path of a .jinja file. `train_on`: whether all assistant turns of a response
    carry loss or its last one only. Raises ModelError where chat rows meet a model without a template. Rows that the
    template cannot render become BadRows.
    """
    encoder = TextEncoder(tokenizer)
    rendered: list[tuple[Group, Piece, list[list[Piece]]]] = []
    bad: list[BadRow] = []
    renderers: dict[str, Renderer] = {}
    for group in groups.groups:
        if group.form not in renderers:
            renderers[group.form] = make_renderer(tokenizer, template=template, form=group.form)
        renderer = renderers[group.form]
        if group.prompt == NO_PROMPT and not renderer.is_plain:
            expected = "a prompt with text; the chat template has no place for none"
            bad.append(BadRow(group.source, Reason.EMPTY_PROMPT, "prompt", '""', expected))
            continue
        try:
            prompt = renderer.prompt(group.prompt, group.tools)
            responses = [renderer.response(group.prompt, turns, group.tools) for turns in group.responses]
        except UnusableTemplate as error:
            bad.append(BadRow(group.source, error.reason, "messages", error.found, error.expected))
            continue
        for response, done in zip(responses, _finished(group), strict=True):
            if not done:
                response[-1] = renderer.without_end(response[-1])
        rendered.append((group, prompt, responses))
    encoder.learn(piece for _, prompt, responses in rendered for piece in (prompt, *(p for r in responses for p in r)))
    encoded = []
    special = []
    for group, prompt, responses in rendered:
        prompt_ids = encoder.prompt(prompt)
        if not len(prompt_ids):
            bad.append(BadRow(group.source, "empty prompt", "prompt", "no tokens", "a prompt or a beginning-of-text token"))
            continue
        finished = _finished(group)
        built = [
            _join(response, encoder, finished=done, train_on=train_on)
            for response, done in zip(responses, finished, strict=True)
        ]
        if not all(flags.any() for _, flags in built):
            expected = "an unfinished response with text"
            bad.append(BadRow(group.source, Reason.EMPTY_RESPONSE, "responses", "no tokens of the assistant", expected))
            continue
        if prompt.has_literal or any(piece.has_literal for response in responses for piece in response):
            special.append(group.source)
        encoded.append(
            TokenGroup(
                prompt_ids=prompt_ids,
                response_ids=tuple(ids for ids, _ in built),
                scored=tuple(flags for _, flags in built),
                feedback=group.feedback,
                source=group.source,
                finished=finished,
            )
        )
    return TokenSet(groups=tuple(encoded), bad=tuple(bad), special_text=tuple(special))


def _finished(group: Group) -> tuple[bool, ...]:
    return group.finished or (True,) * len(group.responses)


def _join(pieces: Sequence[Piece], encoder: TextEncoder, *, finished: bool, train_on: TrainOn) -> tuple[Ids, Flags]:
    """Ids and loss flags of a response: loss on each assistant turn up to and with its end-of-turn token.

    That token ends a response that is `finished`, and only that.
    """
    ids: list[Ids] = []
    flags: list[Flags] = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        piece_ids = encoder.continuation(piece)
        piece_flags = np.full(len(piece_ids), piece.scored and (last or train_on == "all"))
        ends = np.flatnonzero((piece_ids == piece.end_of_turn) & piece.scored)
        if last and finished:
            whole = ends[-1] + 1 if len(ends) else len(piece_ids)
            piece_ids, piece_flags = piece_ids[:whole], piece_flags[:whole]
            if not len(ends):
                piece_ids = np.append(piece_ids, np.int32(piece.end_of_turn))
                piece_flags = np.append(piece_flags, True)
        elif len(ends):
            piece_flags[ends[-1] + 1 :] = False
        ids.append(piece_ids)
        flags.append(piece_flags)
    return np.concatenate(ids).astype(np.int32), np.concatenate(flags)


class TextEncoder:
    """Tokenises pieces of text in batches. Special-token text that is marked literal is spelled out, not obeyed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        with_special = tokenizer("", add_special_tokens=True)["input_ids"]
        self.prefix_ids = [
            token for token in with_special if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id
        ]
        self.known: dict[tuple[str, bool, bool], list[int]] = {}
        newline, word, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "hello", "\nhello"))
        # SentencePiece puts a space before the first word of a text; a newline in front keeps it away from a continuation.
        self.anchor = newline if both != newline + word and both[: len(newline)] == newline else []

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Tokenise every part of `pieces` that is not known yet, in one batch."""
        wanted = {
            (text, literal, self._anchored(piece, index))
            for piece in pieces
            for index, (text, literal) in enumerate(piece.parts)
        }
        for literal in (False, True):
            keys = sorted(key for key in wanted - self.known.keys() if key[1] is literal)
            if keys:
                texts = [("\n" if anchored else "") + text for text, _, anchored in keys]
                encoded = self.tokenizer(
                    texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=literal, verbose=False
                )["input_ids"]
                for key, ids in zip(keys, encoded, strict=True):
                    self.known[key] = ids[len(self.anchor) :] if key[2] else ids

    def prompt(self, piece: Piece) -> Ids:
        """Ids of a prompt, with the beginning-of-text token where the tokenizer adds one and the text has none."""
        ids = self._ids(piece)
        return np.array(self.prefix_ids + ids if piece.wants_prefix else ids, dtype=np.int32)

    def continuation(self, piece: Piece) -> Ids:
        """Ids of a piece of a response."""
        return np.array(self._ids(piece), dtype=np.int32)

    def _anchored(self, piece: Piece, index: int) -> bool:
        return bool(self.anchor) and (piece.continues or index > 0)

    def _ids(self, piece: Piece) -> list[int]:
        keys = [(text, literal, self._anchored(piece, index)) for index, (text, literal) in enumerate(piece.parts)]
        if any(key not in self.known for key in keys):
            self.learn([piece])
        return [token for key in keys for token in self.known[key]]


def prompt_ids(prompt: tuple[Turn, ...], tokenizer: Any, *, template: str = "auto", form: str = "text", tools: str = "") -> Ids:
    """Token ids of one prompt, ready for generation."""
    renderer = make_renderer(tokenizer, template=template, form=form)
    ids = TextEncoder(tokenizer).prompt(renderer.prompt(prompt, tools))
    if not len(ids):
        raise DataError("The prompt has no tokens", todo="Give a prompt, or a tokenizer with a beginning-of-text token.")
    return ids


def end_of_turn_ids(tokenizer: Any, *, template: str = "auto") -> tuple[int, ...]:
    """Tokens at which generation stops: the end of turn of the template in use, and the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ModelError("The tokenizer has no end-of-sequence token", todo="Set tokenizer.eos_token and save the tokenizer.")
    ids = (make_renderer(tokenizer, template=template, form="text").end_of_turn, int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))


def token_budget(data: DataConfig, context_tokens: int) -> tuple[int, int]:
    """(prompt, response) budgets in tokens; ConfigError where together they exceed the model's context."""
    half = context_tokens // 2
    prompt = data.max_prompt_tokens or min(1024, half)
    response = data.max_response_tokens or min(1024, context_tokens - min(prompt, half))
    if prompt + response > context_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens={prompt} and data.max_response_tokens={response} exceed the model's context of"
            f" {context_tokens} tokens",
            todo=f"Lower them so that their sum is at most {context_tokens}.",
        )
    return prompt, response


def fit_budget(tokens: TokenSet, budget: tuple[int, int], *, on_overlong: str) -> TokenSet:
    """Apply the (prompt, response) `budget` in tokens: `drop` refuses a row over a budget, `truncate` cuts it, `error` raises DataError.

    A cut prompt keeps its end, a cut response its start (and then has no end-of-turn token, because it did not end).
    A pair whose responses become identical, and a response left without scored tokens, are refused.
    """
    max_prompt_tokens, max_response_tokens = budget
    kept: list[TokenGroup] = []
    bad = list(tokens.bad)
    truncated: list[str] = []
    for group in tokens.groups:
        longest = max(len(ids) for ids in group.response_ids)
        over_prompt = len(group.prompt_ids) > max_prompt_tokens
        if not over_prompt and longest <= max_response_tokens:
            kept.append(group)
            continue
        field, found, limit = (
            ("prompt", len(group.prompt_ids), max_prompt_tokens) if over_prompt else ("response", longest, max_response_tokens)
        )
        row = BadRow(group.source, f"{field} over the token budget", field, f"{found} tokens", f"at most {limit}")
        if on_overlong == "error":
            raise DataError(str(row), todo=f"Raise data.max_{field}_tokens, or set data.on_overlong=drop or truncate.")
        if on_overlong == "drop":
            bad.append(row)
            continue
        cut = _truncate(group, max_prompt_tokens, max_response_tokens)
        reason = _unusable(cut)
        if reason:
            bad.append(BadRow(group.source, reason, "responses", f"{found} tokens", f"a difference within {limit} tokens"))
        else:
            kept.append(cut)
            truncated.append(group.source)
    return replace(tokens, groups=tuple(kept), bad=tuple(bad), truncated=tuple(truncated))


def _truncate(group: TokenGroup, max_prompt_tokens: int, max_response_tokens: int) -> TokenGroup:
    return replace(
        group,
        prompt_ids=group.prompt_ids[-max_prompt_tokens:],
        response_ids=tuple(ids[:max_response_tokens] for ids in group.response_ids),
        scored=tuple(flags[:max_response_tokens] for flags in group.scored),
        finished=tuple(
            done and len(ids) <= max_response_tokens for done, ids in zip(group.finished, group.response_ids, strict=True)
        ),
    )


def _unusable(group: TokenGroup) -> str:
    if any(not flags.any() for flags in group.scored):
        return "no scored token after truncation"
    if group.feedback.kind == "pair" and np.array_equal(group.response_ids[0], group.response_ids[1]):
        return "identical after truncation"
    return ""
