"""What follows from feedback: which response is better than which, and rows with the best response alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from prefopt.data.groups import BadRow, Feedback
from prefopt.data.tokens import Ids, Lengths, TokenGroup, TokenRows, TokenSet, feedbacks_of, pick


def best_first(feedback: Feedback, responses: int) -> tuple[int, ...]:
    """Places of the `responses`, from best to worst; equally good ones in their order in the row."""
    worth = feedback.scores or tuple(-rank for rank in feedback.ranking) or (0.0,) * responses
    return tuple(sorted(range(responses), key=lambda place: -worth[place]))


def has_tied_scores(feedback: Feedback) -> bool:
    """Whether two responses have the same score."""
    return len(set(feedback.scores)) < len(feedback.scores)


def demonstrations(tokens: TokenSet) -> TokenSet:
    """The best response of every group as a demonstration with the weight of its row.

    That is chosen, rank 1, the highest score (the first of equal ones), the response of a desirable label. Rows that
    name no response as good, undesirable ones and tied pairs, become BadRows.
    """
    kept: list[int] = []
    bad = list(tokens.bad)
    for place, feedback in enumerate(feedbacks_of(tokens.groups)):
        if feedback.kind == "label" and not feedback.label:
            reason, expected = "undesirable row has nothing to imitate", "a desirable response"
            bad.append(BadRow(tokens.groups[place].source, reason, "label", "false", expected))
        elif feedback.tie:
            reason, expected = "tied pair has no better response to imitate", "a response that is better"
            bad.append(BadRow(tokens.groups[place].source, reason, "tie", "true", expected))
        else:
            kept.append(place)
    usable = pick(tokens.groups, kept)
    groups = BestRows(usable) if isinstance(usable, TokenRows) else tuple(map(_best, usable))
    return replace(tokens, groups=groups, bad=tuple(bad))


class BestRows(TokenRows):
    """The best response of each of `rows` as a demonstration."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def group(self, place: int) -> TokenGroup:
        return _best(self.rows.group(place))

    def prompt(self, place: int) -> Ids:
        return self.rows.prompt(place)

    def lengths(self) -> Lengths:
        whole = self.rows.lengths()
        first_G = np.cumsum(whole.responses_G) - whole.responses_G
        counts = zip(self.rows.feedbacks, whole.responses_G.tolist(), strict=True)
        best_G = np.fromiter((best_first(feedback, count)[0] for feedback, count in counts), dtype=np.int64)
        return Lengths(whole.prompt_G, whole.response_S[first_G + best_G], np.ones_like(whole.responses_G))

    @cached_property
    def feedbacks(self) -> Sequence[Feedback]:
        return [_demonstrated(feedback) for feedback in self.rows.feedbacks]


def _demonstrated(feedback: Feedback) -> Feedback:
    return Feedback("demonstration", weight=feedback.weight)


def _best(group: TokenGroup) -> TokenGroup:
    best = best_first(group.feedback, len(group.response_ids))[0]
    return replace(
        group,
        response_ids=(group.response_ids[best],),
        scored=(group.scored[best],),
        finished=group.finished[best : best + 1],
        feedback=_demonstrated(group.feedback),
    )
