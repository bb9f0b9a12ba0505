"""What follows from feedback: which response is better than which, and rows with the best response alone."""

from __future__ import annotations

from dataclasses import replace

from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.groups import BadRow, Feedback


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
    kept: list[TokenGroup] = []
    bad = list(tokens.bad)
    for group in tokens.groups:
        refused = _nothing_to_imitate(group)
        if refused is None:
            kept.append(_best(group))
        else:
            bad.append(refused)
    return replace(tokens, groups=tuple(kept), bad=tuple(bad))


def _nothing_to_imitate(group: TokenGroup) -> BadRow | None:
    feedback = group.feedback
    if feedback.kind == "label" and not feedback.label:
        reason, expected = "undesirable row has nothing to imitate", "a desirable response"
        return BadRow(group.source, reason, "label", "false", expected)
    if feedback.tie:
        return BadRow(group.source, "tied pair has no better response to imitate", "tie", "true", "a response that is better")
    return None


def _best(group: TokenGroup) -> TokenGroup:
    best = best_first(group.feedback, len(group.response_ids))[0]
    return replace(
        group,
        response_ids=(group.response_ids[best],),
        scored=(group.scored[best],),
        finished=group.finished[best : best + 1],
        feedback=Feedback("demonstration", weight=group.feedback.weight),
    )
