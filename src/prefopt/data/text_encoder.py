"""Pieces of text -> token ids: in batches, each distinct text once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from prefopt.data.render import Piece
from prefopt.data.tokens import Ids
from prefopt.data.words import WordEncoder, word_encoder

_TEXTS_FOR_WORDS = 64  # fewer are tokenised sooner than a memory of words is made
_NONE = np.zeros(0, dtype=np.int32)

Key = tuple[str, bool, bool]  # a part of a text, whether it is literal, whether it is anchored
Known = dict[Key, Ids]


class TextEncoder:
    """Tokenises pieces of text in batches. Special-token text that is marked literal is spelled out, not obeyed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        with_special = tokenizer("", add_special_tokens=True)["input_ids"]
        self.prefix_ids = [
            token for token in with_special if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id
        ]
        self._words: WordEncoder | None = None
        self._words_sought = False
        newline, word, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "hello", "\nhello"))
        # SentencePiece puts a space before the first word of a text; a newline in front keeps it away from a continuation.
        self.anchor = newline if both != newline + word and both[: len(newline)] == newline else []

    def encode(self, pieces: Iterable[Piece]) -> Known:
        """Ids of every part of `pieces`."""
        keys = dict.fromkeys(chain.from_iterable(map(self._keys, pieces)))
        known: Known = {}
        for literal in (False, True):
            chosen = [key for key in keys if key[1] is literal]
            if chosen:
                texts = [("\n" if anchored else "") + text for text, _, anchored in chosen]
                found = self._encode(texts, literal=literal)
                known |= {key: ids[len(self.anchor) :] if key[2] else ids for key, ids in zip(chosen, found, strict=True)}
        return known

    def _encode(self, texts: list[str], *, literal: bool) -> list[Ids]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and not literal and not self._words_sought and len(texts) >= _TEXTS_FOR_WORDS:
            self._words = word_encoder(backend, self._words_of)
            self._words_sought = True
        if self._words is not None and not literal:
            return self._words.encode(texts)
        return [np.array(ids, dtype=np.int32) for ids in self._whole_texts(texts, literal=literal)]

    def _words_of(self, texts: list[str]) -> list[list[int]]:
        """`_whole_texts` without what is not needed of it: where in a text each token is."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding or backend.encode_special_tokens:  # of a call before
            return self._whole_texts(texts)
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _whole_texts(self, texts: list[str], *, literal: bool = False) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=literal, verbose=False
        )["input_ids"]
        return found

    def prompt(self, piece: Piece, known: Known) -> Ids:
        """Ids of a prompt, with the beginning-of-text token where the tokenizer adds one and the text has none."""
        ids = self._ids(piece, known)
        return np.concatenate((np.array(self.prefix_ids, dtype=np.int32), ids)) if piece.wants_prefix else ids.copy()

    def continuation(self, piece: Piece, known: Known) -> Ids:
        """Ids of a piece of a response, not to be written to."""
        return self._ids(piece, known)

    def _keys(self, piece: Piece) -> list[Key]:
        if not self.anchor:
            return [(text, literal, False) for text, literal in piece.parts]
        return [(text, literal, piece.continues or index > 0) for index, (text, literal) in enumerate(piece.parts)]

    def _ids(self, piece: Piece, known: Known) -> Ids:
        keys = self._keys(piece)
        return known[keys[0]] if len(keys) == 1 else np.concatenate((_NONE, *(known[key] for key in keys)))
