"""Tokenising word by word, with a memory of words: the same ids as for the whole text, where that can be known.

Most byte-pair tokenizers cut a text before a space that a word follows, whatever stands around it, and no merge crosses
that cut. Nor does one cross an added token, such as the end of a turn. What is between two such cuts can then be tokenised
on its own, and remembered, because words come again: looking them up takes a fraction of the time that the tokenizer takes
for the text. Which tokenizers are of this kind is read from their own description (`tokenizer.json`), and any that is not
known to be is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from prefopt.data.tokens import Ids
from prefopt.data.word_table import (
    WhereCut,
    Word,
    WordTable,
    at_every_space,
    at_last_spaces,
    at_last_spaces_but_of_digits,
    stretch_bytes,
)

_MARK = "▁"  # SentencePiece's space
_WORDS_KEPT = 2**18
_WORDS_TOGETHER = 256
_TEXTS_FIRST = 64  # that an empty table learns from, before many texts ask it for the same words
_WORDS_FIRST = 512
_CHARACTERS_KEPT = 48  # longer words do not come again
EncodeTexts = Callable[[list[str]], list[list[int]]]

_LAST_SPACE = re.compile(" (?=[^ ])")
_LAST_SPACE_BUT_OF_DIGITS = re.compile(r"(?<!\s) (?=[^ ])| (?=[!-/:-~])")

PROBES = (
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
    `where` finds the same places in bytes, or fewer where those of one word would have to be read to know. `space` is what
    the tokenizer is given in front of a word that is not the first, so that it has its space.
    """

    split: Callable[[str], list[str]]
    where: WhereCut
    starts: Callable[[str], bool]
    ends: Callable[[str], bool]
    space: str


class WordEncoder:
    """Tokenises texts with `encode_texts` (texts -> ids of each), which is asked for unknown words only.

    `mark` is the text of a special token and `mark_id` its id: with it between them many words are one text. `added` are
    the tokens at which a text is parted before anything else. Words are remembered, at most about 2^18 of them.
    """

    def __init__(self, encode_texts: EncodeTexts, cuts: Cuts, mark: str, mark_id: int, added: Sequence[str]) -> None:
        self.encode_texts = encode_texts
        self.cuts = cuts
        self.mark, self.mark_id = mark, mark_id
        one = f"(?:{'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})"
        self.between = re.compile(rf"({one}(?:\n?{one})*(?:\n\Z)?)")  # the end of a turn and the beginning of the next: one
        self.known: dict[str, bytes] = {}  # what the tokenizer was given for a word -> int32 ids
        self.table = WordTable()  # the short ones of them, beside which a text can be cut

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the arrays are read-only."""
        if max(len(self.known), self.table.count) > _WORDS_KEPT:
            self.known.clear()
            self.table.clear()
        first = _TEXTS_FIRST if self.table.count < _WORDS_FIRST else 0
        return [*self._together(texts[:first]), *self._together(texts[first:])]

    def _together(self, texts: Sequence[str]) -> list[Ids]:
        stretches: list[str] = []
        parts: list[bytes] = []
        counts = [0]  # of stretches, up to each text
        codes = self.table.codes
        for text in texts:
            for place, stretch in enumerate(self.between.split(text)):
                if not stretch:
                    continue
                if not place % 2:
                    parts.append(stretch_bytes(stretch))
                else:
                    if stretch not in codes:
                        self.table.add_code(stretch, self.encode_words([stretch])[0])
                    parts.append(codes[stretch])
                stretches.append(stretch)
            counts.append(len(stretches))
        if not parts:
            return [np.zeros(0, dtype=np.int32)] * len(texts)
        found = self.table.found(parts, self.cuts.where)
        words = self._of_words(found.unknown())
        uncut = sorted({int(found.stretch[number]) for number, ids in words.items() if ids is None})
        row, ends = self.table.joined(found, words, self._of_stretches({number: stretches[number] for number in uncut}))
        row.flags.writeable = False
        bounds = np.concatenate((np.zeros(1, dtype=np.int64), ends))[counts]
        return [row[start:end] for start, end in pairwise(bounds.tolist())]

    def _of_words(self, words: Sequence[Word]) -> dict[int, bytes | None]:
        """Ids of words by their numbers; None where a text may have no cut beside one."""
        starts, ends, space = self.cuts.starts, self.cuts.ends, self.cuts.space
        given = {
            word.number: (word.text if word.is_first else space + word.text)
            if ends(word.text) and (word.is_first or starts(word.text))
            else None
            for word in words
        }
        ids = self._ids(text for text in given.values() if text is not None)
        for is_first in (True, False):
            kept = {word.text for word in words if word.is_first is is_first and given[word.number] is not None}
            self.table.add({text: ids[text if is_first else space + text] for text in kept}, is_first=is_first)
        return {number: None if text is None else ids[text] for number, text in given.items()}

    def _of_stretches(self, stretches: Mapping[int, str]) -> dict[int, bytes]:
        """Ids of stretches, where words with no cut between them are put together."""
        space = self.cuts.space
        parted = [self._parted(stretch) for stretch in stretches.values()]
        given = [[first, *(space + word for word in others)] for first, *others in parted]
        ids = self._ids(chain.from_iterable(given))
        return {number: b"".join(map(ids.__getitem__, texts)) for number, texts in zip(stretches, given, strict=True)}

    def _parted(self, stretch: str) -> list[str]:
        """The words of a stretch, put together where there is no cut between them."""
        starts, ends = self.cuts.starts, self.cuts.ends
        first, *words = self.cuts.split(stretch)
        found = [first]
        for word in words:
            if ends(found[-1]) and starts(word):
                found.append(word)
            else:
                found[-1] += " " + word
        return found

    def _ids(self, texts: Iterable[str]) -> dict[str, bytes]:
        """Ids of each of `texts`. What is not known is tokenised, and kept if it may come again."""
        wanted = sorted(set(texts))
        new = [text for text in wanted if text not in self.known]
        made = dict(zip(new, self.encode_words(new), strict=True))
        found = made | {text: self.known[text] for text in wanted if text not in made}
        self.known |= {text: ids for text, ids in made.items() if len(text) <= _CHARACTERS_KEPT}
        return found

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
            marks = np.flatnonzero(ids == self.mark_id).tolist() if len(places) > 1 else []
            data = ids.tobytes()
            for place, begin, end in zip(places, [0, *(mark + 1 for mark in marks)], [*marks, len(ids)], strict=True):
                made[place] = data[4 * begin : 4 * end]
        return made


def word_encoder(backend: Any, encode_texts: EncodeTexts) -> WordEncoder | None:
    """The word encoder of the `tokenizers.Tokenizer` `backend`; None where it may need more of a text than a word."""
    body = json.loads(backend.to_str())
    marks = [token for token in body["added_tokens"] if token["special"] and not token["normalized"]]
    cuts = _byte_level(body) or _sentence_pieces(body)
    if cuts is None or not marks or not _is_plain(body):
        return None
    added = [token["content"] for token in body["added_tokens"] if not token["normalized"]]
    encoder = WordEncoder(encode_texts, cuts, marks[0]["content"], marks[0]["id"], added)
    probes = [*PROBES, *(f"{word}{marks[0]['content']} {word}" for word in PROBES)]
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
        return bool(word) and not (word[0].isspace() or word.startswith(added))

    if not digits:
        return Cuts(_at_last_spaces, at_last_spaces, starts, lambda _: True, " ")
    # A digit leaves the space before it to the white space before that: no cut between the two. The only white space at the
    # end of a word that `_but_of_digits` has seen the next one of is a space.
    return Cuts(
        split=_but_of_digits,
        where=at_last_spaces_but_of_digits,
        starts=starts,
        ends=lambda word: word[-1:] == " " or not word[-1:].isspace(),
        space=" ",
    )


def _at_last_spaces(text: str) -> list[str]:
    """`text` parted at every space with something else behind it, and at one that ends it."""
    if "  " not in text:
        return text.split(" ")
    if "   " in text:
        return _LAST_SPACE.split(text)
    first, *others = text.split("  ")  # most double spaces follow a sentence; this takes half the time of the expression
    words = first.split(" ")
    for other in others:
        words[-1] += " "
        words += other.split(" ")
    return words


def _but_of_digits(text: str) -> list[str]:
    """`_at_last_spaces`, but not behind white space where a digit may follow."""
    return _LAST_SPACE_BUT_OF_DIGITS.split(text) if "  " in text else text.split(" ")


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
        where=at_every_space,
        starts=lambda word: bool(word) and not word.startswith(added),
        ends=lambda word: bool(word) and not word.endswith(joining),
        space="",
    )
