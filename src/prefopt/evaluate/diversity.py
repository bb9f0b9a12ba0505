"""How varied texts are."""

from __future__ import annotations

import re
from collections.abc import Sequence


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
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        grams = list(zip(*(words[at:] for at in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0
