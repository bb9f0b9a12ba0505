"""Responses under the prompts of other groups: what the KL term of KTO is estimated from (arXiv 2402.01306)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prefopt.core.errors import DataError
from prefopt.data.encode import TokenGroup

_STREAM = 2**31 + 1  # apart from the epochs' orders and the held-out draw of the same seed


def mismatched(groups: Sequence[TokenGroup], *, seed: int) -> list[TokenGroup]:
    """The responses of each group, in the order of `groups`, under the prompt of another group with another prompt.

    Which group gives its prompt to which is drawn with `seed`. Every group gives its prompt once; where one prompt is
    that of more than half of the groups, the others give theirs equally often, up to one. `source` names both rows.
    Takes O(n log n) for n groups. DataError where all prompts have the same token ids.
    """
    if not groups:
        return []
    givers = _givers([group.prompt_ids.tobytes() for group in groups], seed)
    pairs = zip(groups, (groups[giver] for giver in givers), strict=True)
    return [
        replace(own, prompt_ids=other.prompt_ids, source=f"{own.source} under the prompt of {other.source}")
        for own, other in pairs
    ]


def _givers(prompts: Sequence[bytes], seed: int) -> NDArray[np.int64]:
    """For each place the place whose prompt it gets.

    Places lie in blocks of equal prompts, the largest block of m places first. Each gets the prompt m places further
    on, round the end: no block is longer than m, and none is reached from itself while 2 m <= n. With a larger m the
    places behind the first block are taken in turn by it, and take theirs from it.
    """
    count = len(prompts)
    shuffled = np.random.default_rng((seed, _STREAM)).permutation(count)
    sizes = Counter(prompts)
    (frequent, most), *others = sizes.most_common()
    if not others:
        raise DataError(
            f"all {count} rows have the same prompt, and a response under another prompt is needed to estimate the KL",
            todo="Use rows with different prompts, or loss.name=apo_zero_unpaired, which needs no KL.",
        )
    blocks: dict[bytes, list[int]] = {frequent: []}
    for place in shuffled.tolist():
        blocks.setdefault(prompts[place], []).append(place)
    lined_up = np.array([place for block in blocks.values() for place in block], dtype=np.int64)
    at = np.arange(count)
    rest = count - most
    giving = (at + most) % count if most <= rest else np.where(at < most, most + at % rest, at - most)
    givers = np.empty(count, dtype=np.int64)
    givers[lined_up] = lined_up[giving]
    return givers
