"""How well scores order the responses to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback, Group
from prefopt.evaluate.intervals import Interval, wilson


def ranking_accuracy(scores: Sequence[NDArray[Any]], groups: Sequence[TokenGroup]) -> Interval | None:
    """Share of ordered pairs of responses that `scores` (one array a group) order as the feedback does; ties count half.

    For pairs it is plain accuracy: how often the chosen response scores higher. A group of K responses counts once,
    with its share of up to K (K - 1) / 2 pairs, because these are not independent observations. None where no feedback
    prefers any response.
    """
    found = (share_ordered(values, group) for values, group in zip(scores, groups, strict=True))
    shares = [share for share in found if share is not None]
    return wilson(min(sum(shares), len(shares)), len(shares)) if shares else None


def share_ordered(values: NDArray[Any], group: TokenGroup | Group) -> float | None:
    """Share of a group's preferred pairs whose better response has the higher of `values`, ties half; None without any."""
    responses = len(group.response_ids if isinstance(group, TokenGroup) else group.responses)
    if len(values) != responses:
        raise ValueError(f"{group.source}: {len(values)} scores for {responses} responses")
    pairs = preferred_pairs(group.feedback)
    if not pairs:
        return None
    better, worse = np.array(pairs).T
    difference = np.asarray(values, dtype=np.float64)[better] - np.asarray(values, dtype=np.float64)[worse]
    return float(((difference > 0) + (difference == 0) / 2).mean())


def preferred_pairs(feedback: Feedback) -> list[tuple[int, int]]:
    """(better, worse) places of all responses of a group that its feedback tells apart."""
    if feedback.kind == "pair":
        return [] if feedback.tie else [(0, 1)]
    values = feedback.scores if feedback.kind == "scores" else tuple(-rank for rank in feedback.ranking)
    return [
        (one, other) if values[one] > values[other] else (other, one)
        for one, other in combinations(range(len(values)), 2)
        if values[one] != values[other]
    ]
