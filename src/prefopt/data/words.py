"""Tokenising word by word, with a memory of words: the same ids as for the whole text, where that can be known.

Most byte-pair tokenizers cut a text before a space that a word follows, whatever stands around it, and no merge crosses
that cut. What is between two such cuts can then be tokenised on its own, and remembered, because words come again:
looking them up takes a fraction of the time that the tokenizer takes for the text. Which tokenizers are of this kind is
read from their own description (`tokenizer.json`), and any that is not known to be is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import Any

import numpy as np

from prefopt.data.tokens import Ids

_MARK = "▁"  # SentencePiece's space
_WORDS_KEPT = 2**18
_WORDS_TOGETHER = 256
_CHARACTERS_KEPT = 48  # longer words do not come again
EncodeTexts = Callable[[list[str]], list[list[int]]]

_LAST_SPACE = re.compile(" (?=[^ ])")

_PROBES = (
    "Hello world,  it's 12 or 3456\n\nHuman: \tno.  \n yes   3 ",
    " A first space\u00a0and others\u2003there , \n\n\n and at the end \n",
    "caf\u00e9 na\u00efve \u4f60\u597d \u4e16\u754c \U0001f600 \u2581 \u2581 x\u2581 y 1\u00bd \u0663",
)

# What a text is split by before merges are made, as byte-level tokenizers write it. In each a space goes with what follows
# it, other white space before it does not, and nothing reaches over it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LATER = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = frozenset(_CONTRACTIONS + _LATER % digits for digits in ("", "{1,3}"))


@dataclass(frozen=True)
class Cuts:
    """Where a text may be cut: before a space between `before` and `word` where `ends(before)` and `starts(word)`.

    `split` gives the words of a text without the spaces between them; no word holds a space and something else behind it.
    `space` is what the tokenizer is given in front of a word that is not the first, so that it has its space.
    """

    split: Callable[[str], list[str]]
    starts: Callable[[str], bool]
    ends: Callable[[str], bool]
    space: str


class WordEncoder:
    """Tokenises texts with `encode_texts` (texts -> ids of each), which is asked for unknown words only.

    `mark` is the text of a special token and `mark_id` its id: with it between them many words are one text. Words are
    remembered, at most about 2^18 of them.
    """

    def __init__(self, encode_texts: EncodeTexts, cuts: Cuts, mark: str, mark_id: int) -> None:
        self.encode_texts = encode_texts
        self.cuts = cuts
        self.mark, self.mark_id = mark, mark_id
        self.first: dict[str, bytes] = {}  # words at the start of a text -> int32 ids
        self.later: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the arrays are read-only."""
        for known in (self.first, self.later):
            if len(known) > _WORDS_KEPT:
                known.clear()
        made: dict[int, bytes] = {}
        split = {number: self.cuts.split(text) for number, text in enumerate(texts)}
        split = self._looked_up(split, made)
        starts, ends = self.cuts.starts, self.cuts.ends
        new_first, new_later = self._new(split.values())
        first_ids, later_ids = self._encoded(
            filter(ends, new_first), (word for word in new_later if starts(word) and ends(word))
        )
        self.first |= first_ids
        self.later |= later_ids
        # What is left holds spaces that do not part the words around them.
        split = {number: self._parted(words) for number, words in self._looked_up(split, made).items()}
        more_first, more_later = self._encoded(*self._new(split.values()))
        self.first |= more_first
        self.later |= more_later
        self._looked_up(split, made)
        self._forget(self.first, first_ids, more_first)
        self._forget(self.later, later_ids, more_later)
        return [np.frombuffer(made[number], dtype=np.int32) for number in range(len(texts))]

    def _forget(self, known: dict[str, bytes], new: Iterable[str], put_together: Iterable[str]) -> None:
        """Drop long words, and those with which a word of `split` could be mistaken: only others have a space within."""
        long = [word for word in new if len(word) > _CHARACTERS_KEPT]
        for word in (*long, *(word for word in put_together if " " not in word or len(word) > _CHARACTERS_KEPT)):
            known.pop(word, None)

    def _looked_up(self, split: dict[int, list[str]], made: dict[int, bytes]) -> dict[int, list[str]]:
        """Put the ids of the texts whose words are all known into `made`; the others."""
        find = self.later.__getitem__
        left = {}
        for number, words in split.items():
            try:
                made[number] = self.first[words[0]] + b"".join(map(find, words[1:]))
            except KeyError:
                left[number] = words
        return left

    def _new(self, split: Iterable[list[str]]) -> tuple[set[str], set[str]]:
        """Words of `split` that are not known: those at the start of a text, and the others."""
        first: set[str] = set()
        later: set[str] = set()
        for words in split:
            if words[0] not in self.first:
                first.add(words[0])
            later.update(filterfalse(self.later.__contains__, words[1:]))
        return first, later

    def _parted(self, words: list[str]) -> list[str]:
        """`words` with those put together between which no cut is made."""
        starts, ends, known = self.cuts.starts, self.cuts.ends, self.later
        found = words[:1]
        ended = ends(words[0])
        for word in words[1:]:
            if ended and (word in known or starts(word)):
                found.append(word)
                ended = word in known or ends(word)
            else:
                found[-1] += " " + word
                ended = ends(found[-1])
        return found

    def _encoded(self, first: Iterable[str], later: Iterable[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        first, later = sorted(first), sorted(later)
        ids = self.encode_words([*first, *(self.cuts.space + word for word in later)])
        return dict(zip(first, ids, strict=False)), dict(zip(later, ids[len(first) :], strict=True))

    def encode_words(self, words: Sequence[str]) -> list[bytes]:
        """Ids of each text of `words`, many in one text: what stands between special tokens is tokenised on its own."""
        texts: list[list[int]] = []  # places in `words` of those that are put into one text
        batch: list[int] = []
        for place, word in enumerate(words):
            if self.mark in word or not word:
                texts.append([place])
                continue
            batch.append(place)
            if len(batch) == _WORDS_TOGETHER:
                texts.append(batch)
                batch = []
        texts += [batch] if batch else []
        made = [b""] * len(words)
        joined = [self.mark.join(words[place] for place in places) for places in texts]
        encoded = self.encode_texts(joined) if joined else []
        for places, found in zip(texts, encoded, strict=True):
            ids = np.array(found, dtype=np.int32)
            marks = np.flatnonzero(ids == self.mark_id) if len(places) > 1 else np.zeros(0, np.int64)
            for place, piece in zip(places, np.split(ids, marks), strict=True):
                made[place] = piece[1:].tobytes() if place != places[0] else piece.tobytes()
        return made


def word_encoder(backend: Any, encode_texts: EncodeTexts) -> WordEncoder | None:
    """The word encoder of the `tokenizers.Tokenizer` `backend`; None where it may need more of a text than a word."""
    body = json.loads(backend.to_str())
    marks = [token for token in body["added_tokens"] if token["special"] and not token["normalized"]]
    cuts = _byte_level(body) or _sentence_pieces(body)
    if cuts is None or not marks or not _is_plain(body):
        return None
    encoder = WordEncoder(encode_texts, cuts, marks[0]["content"], marks[0]["id"])
    probes = [*_PROBES, *(f"{word}{marks[0]['content']} {word}" for word in _PROBES)]
    same = all(np.array_equal(a, b) for a, b in zip(encoder.encode(probes), encode_texts(probes), strict=True))
    return encoder if same else None


def _is_plain(body: dict[str, Any]) -> bool:
    """Byte pairs merged by rank alone, and added tokens that take no white space with them."""
    model = body["model"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(
            not (token["lstrip"] or token["rstrip"] or token["single_word"] or any(map(str.isspace, token["content"])))
            for token in body["added_tokens"]
        )
    )


def _byte_level(body: dict[str, Any]) -> Cuts | None:
    """GPT-2's way and what came of it: a run of white space gives its last space to the word behind it, if it is a space."""
    if body["normalizer"] not in (None, {"type": "NFC"}):
        return None
    step = body["pre_tokenizer"] or {}
    *before, last = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    kinds = [part["type"] for part in before]
    digits = kinds == ["Digits"]  # each on its own, without a space
    if not (last["use_regex"] if kinds == [] or digits else kinds == ["Split"] and _is_known_split(before[0], last)):
        return None
    added = tuple(token["content"] for token in body["added_tokens"])

    def starts(word: str) -> bool:
        return bool(word) and not (word[0].isspace() or word.startswith(added) or (digits and word[0].isnumeric()))

    return Cuts(_at_last_spaces, starts, lambda _: True, " ")


def _at_last_spaces(text: str) -> list[str]:
    """`text` parted at every space with something else behind it."""
    return _LAST_SPACE.split(text) if "  " in text else text.split(" ")


def _is_known_split(step: dict[str, Any], then: dict[str, Any]) -> bool:
    isolated = step["behavior"] == "Isolated" and not step["invert"] and not then["use_regex"]
    return isolated and step["pattern"].get("Regex") in _PATTERNS


def _sentence_pieces(body: dict[str, Any]) -> Cuts | None:
    """Llama 2's way: a mark for every space and one in front of the text, and no token with a mark behind something else.

    A word that is not the first gets its mark as the first one does. Around an added token there may be one more or less.
    """
    steps = [{"type": "Prepend", "prepend": _MARK}, {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}]
    if body["pre_tokenizer"] is not None or body["normalizer"] != {"type": "Sequence", "normalizers": steps}:
        return None
    model = body["model"]
    added = tuple(token["content"] for token in body["added_tokens"])
    across = any(_MARK in token.lstrip(_MARK) for token in model["vocab"] if token not in set(added))
    if across or _MARK not in model["vocab"] or model.get("ignore_merges"):
        return None
    joining = (" ", _MARK, *added)
    return Cuts(
        split=lambda text: text.split(" "),
        starts=lambda word: bool(word) and not word.startswith(added),
        ends=lambda word: bool(word) and not word.endswith(joining),
        space="",
    )
