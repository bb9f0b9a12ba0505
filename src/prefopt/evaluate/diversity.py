"""How varied texts are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

Grams = Counter[tuple[str, ...]]
_ORDER = 4


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of `texts` together, in [0, 1]; 0 where there are none (Li et al. 2016).

    Words and punctuation marks count, without case; an n-gram does not cross texts. More or longer texts lower it by
    themselves, so compare only sets of texts of like size.
    """
    if n < 1:
        raise ValueError(f"n-grams of {n} words")
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = _grams(_words(text), n)
        seen.update(grams)
        total += grams.total()
    return len(seen) / total if total else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text with all others as its references, in [0, 1]; 1 where all are equal (arXiv 1802.01886).

    Low is varied. `texts` answer one prompt; ValueError for fewer than two. Words are those of `distinct_n`. BLEU is that of
    sacrebleu's sentence_bleu: the geometric mean of the clipped n-gram precisions for n = 1 to 4, or to the number of words
    where these are fewer; the k-th order without a match counts 1 / (2^k * n-grams) ("exponential" smoothing, Chen and
    Cherry 2014, method 3); 0 where no word matches; a brevity penalty by the reference of the nearest length, of two the shorter.
    A text without words has BLEU 1 where another has none either, else 0. More texts raise it by themselves: compare only
    equal numbers of them.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other, found {len(texts)}")
    words = [_words(text) for text in texts]
    lengths = Counter(map(len, words))
    matched_by_order = [_matched(words, n) for n in range(1, _ORDER + 1)]
    total = 0.0
    for at, own in enumerate(words):
        others = lengths - Counter([len(own)])
        total += _bleu([matched[at] for matched in matched_by_order], len(own), others)
    return total / len(words)


def _matched(words: Sequence[Sequence[str]], n: int) -> list[int]:
    """For each text how many of its n-grams are in the others, each at most as often as in the one with most of it."""
    grams = [_grams(own, n) for own in words]
    first: Grams = Counter()
    second: Grams = Counter()  # the next highest count, which is that of the others for the text with the highest
    for one in grams:
        for gram, count in one.items():
            if count > first[gram]:
                first[gram], second[gram] = count, first[gram]
            else:
                second[gram] = max(second[gram], count)
    return [
        sum(min(count, second[gram] if count == first[gram] else first[gram]) for gram, count in one.items()) for one in grams
    ]


def _bleu(matched: Sequence[int], length: int, others: Mapping[int, int]) -> float:
    """BLEU of a text of `length` words, of which `matched[n - 1]` n-grams match; `others` holds the lengths of references."""
    if not length or not matched[0]:
        return float(not length and 0 in others)
    logs, missed = [], 0
    for n, count in enumerate(matched[:length], start=1):
        missed += not count
        logs.append(math.log((count or 0.5**missed) / (length - n + 1)))
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1 - nearest / length) + sum(logs) / len(logs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(words[at:] for at in range(n)), strict=False))
