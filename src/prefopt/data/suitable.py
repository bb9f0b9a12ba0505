"""Rows that a loss can learn from: what it does not learn from is refused by name or, where all rows lack it, as an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefopt.core.checks import accepted_kinds, losses_for
from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError
from prefopt.core.losses.facts import LossFacts
from prefopt.core.losses.table import Part
from prefopt.data.groups import BadRow, Feedback
from prefopt.data.projections import demonstrations, has_tied_scores
from prefopt.data.refusals import Reason
from prefopt.data.tokens import TokenGroup, TokenSet, feedbacks_of, pick


def suitable(tokens: TokenSet, config: RunConfig, *, name: str = "data") -> TokenSet:
    """The groups of `tokens` that the configured loss learns from, as it learns from them. `name` is theirs in errors.

    Ties and tied scores that a loss has no place for become BadRows. DataError where the rows are of another kind, where
    a column that the loss needs is missing, where row weights would be ignored, or where there is nothing to compare.
    """
    parts, title = config.loss.parts, config.loss.title
    kinds = accepted_kinds(config)
    feedbacks = feedbacks_of(tokens.groups)
    wrong = next((place for place, feedback in enumerate(feedbacks) if feedback.kind not in kinds), None)
    if wrong is not None:
        kind = feedbacks[wrong].kind
        raise DataError(
            f'{tokens.groups[wrong].source}: the loss "{title}" learns from {" or ".join(kinds)} rows, and this is a {kind} row',
            todo=f"Losses for {kind} rows: {losses_for(kind)}." + (_MAKE_PAIRS if kind in ("scores", "ranking") else ""),
        )
    if all(part.facts.unit == "token" for part in parts):
        return demonstrations(tokens)
    kept: list[int] = []
    bad = list(tokens.bad)
    for place, feedback in enumerate(feedbacks):
        reason = _refusal(feedback, config.loss.facts)
        if reason is None:
            kept.append(place)
        else:
            bad.append(replace(reason, source=tokens.groups[place].source))
    groups = pick(tokens.groups, kept) if len(kept) < len(feedbacks) else tokens.groups
    for part in parts:
        _check_columns(groups, part)
        if part.facts.unit == "step":
            _check_distributions(feedbacks_of(groups), part.facts, name)
    return replace(tokens, groups=groups, bad=tuple(bad))


_MAKE_PAIRS = " Pairs of scored samples: prefopt label."


def _check_columns(groups: Sequence[TokenGroup], part: Part) -> None:
    facts = part.facts
    for column in facts.columns:
        missing = [place for place, feedback in enumerate(feedbacks_of(groups)) if getattr(feedback, column) is None]
        if missing:
            raise DataError(
                f'{groups[missing[0]].source}: has no {column}, and the loss "{facts.name}" needs one in every row ({len(missing)} of {len(groups)} have none)',
                todo=f'Add a column "{column}", or use a loss without it, for example dpo.',
            )
    if facts.name == "odpo" and part.knobs["scaling"] == "log":
        negative = [place for place, feedback in enumerate(feedbacks_of(groups)) if (feedback.margin or 0.0) <= 0]
        if negative:
            first = groups[negative[0]]
            raise DataError(
                f"{first.source}: its margin is {first.feedback.margin:g}, and odpo takes the logarithm of margins, which must be above 0 ({len(negative)} of {len(groups)} are not)",
                todo="A margin says by how much chosen is better: swap the responses or remove the row, or set loss.scaling=identity.",
            )


def _check_distributions(feedbacks: Sequence[Feedback], facts: LossFacts, name: str) -> None:
    """Rows of a loss that compares distributions: all of one weight, and of both classes where it compares those."""
    weights = {feedback.weight for feedback in feedbacks}
    if len(weights) > 1:
        raise DataError(
            f'{name}: its rows have weights from {min(weights):g} to {max(weights):g}, and the loss "{facts.name}" compares distributions, in which a row has none',
            todo="Remove the column weight, or use another loss.",
        )
    labels = {feedback.label for feedback in feedbacks if feedback.kind == "label"}
    if len(labels) == 1 and "desirable_S" in facts.inputs:
        found = "desirable" if labels.pop() else "undesirable"
        raise DataError(
            f'{name}: all {len(feedbacks)} rows are {found}, and the loss "{facts.name}" compares desirable responses with undesirable ones',
            todo="Add rows of the other label, or use kto or bco, which learn from either.",
        )


def _refusal(feedback: Feedback, parts: tuple[LossFacts, ...]) -> BadRow | None:
    """Why no row that is known by `feedback` can be learnt from; whose row that is, is left open."""
    comparing = [facts for facts in parts if facts.unit != "token"]  # imitation passes over what it cannot imitate
    strict = [facts.name for facts in comparing if not facts.learns_from_ties]
    if feedback.tie and strict:
        reason = f"a tie, which {' + '.join(strict)} cannot learn from"
        return BadRow("", reason, "tie", "true", "a response that is better, or the loss rao_kupper or davidson")
    scores = feedback.scores
    if has_tied_scores(feedback) and any(facts.strict_order for facts in parts):
        return BadRow("", Reason.TIED_SCORES, "scores", str(scores), "scores that all differ, or the loss all_pairs")
    if scores and len(set(scores)) == 1:
        return BadRow("", "all scores equal", "scores", str(scores), "a response that is better than another")
    return None


def unused_columns(feedbacks: Sequence[Feedback], config: RunConfig) -> list[str]:
    """Lines about columns of the rows that the configured loss does not look at."""
    inputs = {name for facts in config.loss.facts for name in facts.inputs}
    lines = []
    for column, used_by, users in (
        ("margin", {"margin_G", "offset_G"}, "odpo and reward"),
        ("probability", {"probability_G"}, "soft_dpo"),
    ):
        if not inputs & used_by and any(getattr(feedback, column) is not None for feedback in feedbacks):
            lines.append(f"the column {column} is not used by {config.loss.title}; {users} would")
    return lines
