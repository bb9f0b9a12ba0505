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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from prefopt.data.tokens import Ids

_MARK = "▁"  # SentencePiece's space
_WORDS_KEPT = 2**18
_WORDS_TOGETHER = 256
_CHARACTERS_KEPT = 48  # longer words do not come again
EncodeTexts = Callable[[list[str]], list[list[int]]]
Looked = tuple[list[str], list[bytes | None]]  # words of a stretch of text, ids of each that is known

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
    `space` is what the tokenizer is given in front of a word that is not the first, so that it has its space.
    """

    split: Callable[[str], list[str]]
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
        self.first: dict[str, bytes] = {}  # what is between stretches, and words at the start of one -> int32 ids
        self.later: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the arrays are read-only."""
        for known in (self.first, self.later):
            if len(known) > _WORDS_KEPT:
                known.clear()
        # Words are looked up as soon as they are cut: few of them are alive at a time, and those lie in the processor's cache.
        first, later, split = self.first.get, self.later.get, self.cuts.split
        made: list[bytes] = []
        counts: list[int] = []  # of stretches, for each text
        left: dict[int, Looked] = {}  # stretches that have unknown words
        for text in texts:
            before = len(made)
            for stretch in self.between.split(text):
                if stretch:
                    words = split(stretch)
                    ids = [first(words[0]), *map(later, words[1:])]
                    if None in ids:
                        left[len(made)] = words, ids
                        made.append(b"")
                    else:
                        made.append(b"".join(ids))  # type: ignore[arg-type]
            counts.append(len(made) - before)
        for place, stretch_ids in zip(left, self._learned(left.values()), strict=True):
            made[place] = stretch_ids
        in_order = iter(made)
        return [np.frombuffer(b"".join(islice(in_order, count)), dtype=np.int32) for count in counts]

    def _learned(self, stretches: Iterable[Looked]) -> list[bytes]:
        """Ids of stretches with unknown words, which are remembered."""
        starts, ends = self.cuts.starts, self.cuts.ends
        new_first, new_later = _unknown(stretches)
        first_ids, later_ids = self._encoded(
            filter(ends, new_first), (word for word in new_later if starts(word) and ends(word))
        )
        self.first |= first_ids
        self.later |= later_ids
        # What is unknown then holds spaces that do not part the words around them.
        parted = [self._filled(words, ids) for words, ids in stretches]
        more_first, more_later = self._encoded(*_unknown(parted))
        self.first |= more_first
        self.later |= more_later
        made = [b"".join(self._ids(words) if None in ids else ids) for words, ids in parted]  # type: ignore[arg-type]
        self._forget(self.first, first_ids, more_first)
        self._forget(self.later, later_ids, more_later)
        return made

    def _ids(self, words: list[str]) -> list[bytes | None]:
        """Ids of the words of a stretch; None for those that are not known."""
        return [self.first.get(words[0]), *map(self.later.get, words[1:])]

    def _filled(self, words: list[str], ids: list[bytes | None]) -> Looked:
        """A stretch with what is known by now: all its words, or they are put together where no cut is made."""
        for place in _nones(ids):
            ids[place] = self.later.get(words[place]) if place else self.first.get(words[0])
        if None not in ids:
            return words, ids
        words = self._parted(words)
        return words, self._ids(words)

    def _forget(self, known: dict[str, bytes], new: Iterable[str], put_together: Iterable[str]) -> None:
        """Drop long words, and those with which a word of `split` could be mistaken: only others have a space within."""
        long = [word for word in new if len(word) > _CHARACTERS_KEPT]
        for word in (*long, *(word for word in put_together if " " not in word or len(word) > _CHARACTERS_KEPT)):
            known.pop(word, None)

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


def _nones(ids: list[bytes | None]) -> Iterator[int]:
    place = -1
    for _ in range(ids.count(None)):
        place = ids.index(None, place + 1)
        yield place


def _unknown(stretches: Iterable[Looked]) -> tuple[set[str], set[str]]:
    """Words without ids: those at the start of a stretch, and the others."""
    first: set[str] = set()
    later: set[str] = set()
    for words, ids in stretches:
        for place in _nones(ids):
            (later if place else first).add(words[place])
    return first, later


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
        return Cuts(_at_last_spaces, starts, lambda _: True, " ")
    # A digit leaves the space before it to the white space before that: no cut between the two. The only white space at the
    # end of a word that `_but_of_digits` has seen the next one of is a space.
    return Cuts(_but_of_digits, starts, lambda word: word[-1:] == " " or not word[-1:].isspace(), " ")


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
        starts=lambda word: bool(word) and not word.startswith(added),
        ends=lambda word: bool(word) and not word.endswith(joining),
        space="",
    )
