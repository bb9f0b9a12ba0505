"""Groups -> token ids, with the prompt as an exact prefix and the loss on assistant tokens only.

Prompt and response are tokenised apart, at the boundary that the chat template (or the plain text) draws: that is
what a model sees when it generates, and it makes the prompt the same token list for every response of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

import numpy as np

from prefopt.core.errors import DataError, ModelError
from prefopt.data.groups import NO_PROMPT, BadRow, Group, GroupSet, Turn
from prefopt.data.refusals import Reason
from prefopt.data.render import Piece, Renderer, UnusableTemplate, make_renderer
from prefopt.data.text_encoder import Known, TextEncoder
from prefopt.data.tokens import Flags as Flags
from prefopt.data.tokens import Ids as Ids
from prefopt.data.tokens import TokenGroup as TokenGroup
from prefopt.data.tokens import TokenSet as TokenSet

TrainOn = Literal["all", "last"]

ROWS_TOGETHER = 512  # texts of so many rows are tokenised at once, and no more of them are held


def encode_groups(groups: GroupSet, tokenizer: Any, *, template: str = "auto", train_on: TrainOn = "all") -> TokenSet:
    """Token ids of every group, at full length, in memory.

    `template`: auto, chat, plain, or the path of a .jinja file. `train_on`: whether all assistant turns of a response
    carry loss or its last one only. Raises ModelError where chat rows meet a model without a template. Rows that the
    template cannot render become BadRows.
    """
    encoding = Encoding(tokenizer, template=template, train_on=train_on)
    encoded = tuple(group for _, group in encoding.of(groups.groups))
    return TokenSet(groups=encoded, bad=tuple(encoding.bad), special_text=tuple(encoding.special_text))


class Encoding:
    """Token ids of groups one after another, as in `encode_groups`; what is held meanwhile does not grow with the rows.

    `bad` (what the template cannot render, and what has no tokens) and `special_text` are those of the groups so far.
    """

    def __init__(self, tokenizer: Any, *, template: str = "auto", train_on: TrainOn = "all") -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.train_on = train_on
        self.encoder = TextEncoder(tokenizer)
        self.bad: list[BadRow] = []
        self.special_text: list[str] = []
        self._renderers: dict[str, Renderer] = {}

    def of(self, groups: Iterable[Group]) -> Iterator[tuple[int, TokenGroup]]:
        """(place in `groups`, token ids) of every group that is not refused."""
        numbered = enumerate(groups)
        while together := list(islice(numbered, ROWS_TOGETHER)):
            chunk = [(place, group, pieces) for place, group in together if (pieces := self._rendered(group)) is not None]
            texts = chain.from_iterable((prompt, *chain.from_iterable(responses)) for _, _, (prompt, responses) in chunk)
            known = self.encoder.encode(texts)
            for place, group, (prompt, responses) in chunk:
                made = self._tokenised(group, prompt, responses, known)
                if made is not None:
                    yield place, made

    def _rendered(self, group: Group) -> tuple[Piece, list[list[Piece]]] | None:
        """Prompt and responses as text; None, and a BadRow, where that cannot be."""
        if group.form not in self._renderers:
            self._renderers[group.form] = make_renderer(self.tokenizer, template=self.template, form=group.form)
        renderer = self._renderers[group.form]
        if group.prompt == NO_PROMPT and not renderer.is_plain:
            expected = "a prompt with text; the chat template has no place for none"
            self.bad.append(BadRow(group.source, Reason.EMPTY_PROMPT, "prompt", '""', expected))
            return None
        try:
            prompt = renderer.prompt(group.prompt, group.tools)
            responses = [renderer.response(group.prompt, turns, group.tools) for turns in group.responses]
        except UnusableTemplate as error:
            self.bad.append(BadRow(group.source, error.reason, "messages", error.found, error.expected))
            return None
        for response, done in zip(responses, _finished(group), strict=True):
            if not done:
                response[-1] = renderer.without_end(response[-1])
        return prompt, responses

    def _tokenised(self, group: Group, prompt: Piece, responses: list[list[Piece]], known: Known) -> TokenGroup | None:
        """Ids and loss flags of a group; None, and a BadRow, where it has no prompt or a response without loss."""
        prompt_ids = self.encoder.prompt(prompt, known)
        if not len(prompt_ids):
            expected = "a prompt or a beginning-of-text token"
            self.bad.append(BadRow(group.source, "empty prompt", "prompt", "no tokens", expected))
            return None
        finished = _finished(group)
        built = [
            _join(response, self.encoder, known, finished=done, train_on=self.train_on)
            for response, done in zip(responses, finished, strict=True)
        ]
        if not all(np.count_nonzero(flags) for _, flags in built):
            found, expected = "no tokens of the assistant", "an unfinished response with text"
            self.bad.append(BadRow(group.source, Reason.EMPTY_RESPONSE, "responses", found, expected))
            return None
        if prompt.has_literal or any(piece.has_literal for response in responses for piece in response):
            self.special_text.append(group.source)
        return TokenGroup(
            prompt_ids=prompt_ids,
            response_ids=tuple(ids for ids, _ in built),
            scored=tuple(flags for _, flags in built),
            feedback=group.feedback,
            source=group.source,
            finished=finished,
        )


def _finished(group: Group) -> tuple[bool, ...]:
    return group.finished or (True,) * len(group.responses)


def _join(
    pieces: Sequence[Piece], encoder: TextEncoder, known: Known, *, finished: bool, train_on: TrainOn
) -> tuple[Ids, Flags]:
    """Ids and loss flags of a response: loss on each assistant turn up to and with its end-of-turn token.

    That token ends a response that is `finished`, and only that.
    """
    if len(pieces) == 1 and pieces[0].scored and finished:
        return _to_the_end(encoder.continuation(pieces[0], known), pieces[0].end_of_turn)
    ids: list[Ids] = []
    flags: list[Flags] = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        piece_ids = encoder.continuation(piece, known)
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


def _to_the_end(ids: Ids, end_of_turn: int) -> tuple[Ids, Flags]:
    """`_join` of what most responses are: one finished turn."""
    if len(ids) > 1 and ids[-2] == end_of_turn != ids[-1]:  # a newline behind it, as many templates have
        ids = ids[:-1]
    elif not len(ids) or ids[-1] != end_of_turn:
        ends = np.flatnonzero(ids == end_of_turn)
        ids = ids[: ends[-1] + 1] if len(ends) else np.append(ids, np.int32(end_of_turn))
    return ids.copy(), np.ones(len(ids), dtype=np.bool_)


def prompt_ids(prompt: tuple[Turn, ...], tokenizer: Any, *, template: str = "auto", form: str = "text", tools: str = "") -> Ids:
    """Token ids of one prompt, ready for generation."""
    renderer = make_renderer(tokenizer, template=template, form=form)
    encoder, piece = TextEncoder(tokenizer), renderer.prompt(prompt, tools)
    ids = encoder.prompt(piece, encoder.encode([piece]))
    if not len(ids):
        raise DataError("The prompt has no tokens", todo="Give a prompt, or a tokenizer with a beginning-of-text token.")
    return ids


def end_of_turn_ids(tokenizer: Any, *, template: str = "auto") -> tuple[int, ...]:
    """Tokens at which generation stops: the end of turn of the template in use, and the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ModelError("The tokenizer has no end-of-sequence token", todo="Set tokenizer.eos_token and save the tokenizer.")
    ids = (make_renderer(tokenizer, template=template, form="text").end_of_turn, int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))
