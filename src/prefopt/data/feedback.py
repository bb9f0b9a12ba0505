"""What a row says of its responses: labels, scores, rankings, margins, ties, weights, and which were cut.

Text of a number or of true and false counts as the value, for tables whose cells are text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.groups import Feedback
from prefopt.data.messages import listed
from prefopt.data.refusals import Reason, Refusal

_OF_PAIRS = ("margin", "probability", "weight", "tie")
_PLAIN_PAIR = Feedback("pair")
FINISHED_COLUMNS = ("finished", "chosen_finished", "rejected_finished")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def pair_feedback(row: Mapping[str, Any]) -> Feedback:
    """Chosen over rejected, or a `tie`, with the row's `margin`, `probability` (0 to 1) and `weight` (at least 0)."""
    if row.keys().isdisjoint(_OF_PAIRS):
        return _PLAIN_PAIR
    weight = _optional(row, "weight", low=0.0)
    tie = row.get("tie")
    return Feedback(
        "pair",
        margin=_optional(row, "margin"),
        probability=_optional(row, "probability", low=0.0, high=1.0),
        weight=1.0 if weight is None else weight,
        tie=tie is not None and _truth(tie, "tie", Reason.BAD_LABEL),
    )


def label_feedback(row: Mapping[str, Any]) -> Feedback:
    """Desirable (true, 1) or undesirable (false, 0)."""
    value = row.get("label")
    if value is None:
        raise Refusal(Reason.MISSING_FIELD, "label", sorted(map(str, row)), 'a field "label"')
    return Feedback("label", label=_truth(value, "label", Reason.BAD_LABEL), weight=pair_feedback(row).weight)


def scores_feedback(row: Mapping[str, Any], responses: int) -> Feedback:
    """One finite score a response; higher is better. Equal scores are kept: what a tie means is the loss's business."""
    values = _list_for_each(row, "scores", responses)
    scores = tuple(number(value, f"scores[{index}]") for index, value in enumerate(values))
    return Feedback("scores", scores=scores, weight=pair_feedback(row).weight)


def ranking_feedback(row: Mapping[str, Any], responses: int) -> Feedback:
    """One rank a response, 1 is best: each of 1 to K once."""
    ranks = _list_for_each(row, "ranking", responses)
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise Refusal(Reason.BAD_SCORES, "ranking", ranks, "whole numbers, 1 for the best response")
    if len(set(ranks)) < len(ranks):
        raise Refusal(Reason.TIED_SCORES, "ranking", ranks, f"each rank of 1 to {responses} once")
    if sorted(ranks) != list(range(1, responses + 1)):
        raise Refusal(Reason.BAD_SCORES, "ranking", ranks, f"each rank of 1 to {responses} once")
    return Feedback("ranking", ranking=tuple(ranks), weight=pair_feedback(row).weight)


def finished(row: Mapping[str, Any], names: Sequence[str]) -> tuple[bool, ...]:
    """Whether each response came to its end; () where all did. `names` are the fields that the responses came from.

    Pairs have the columns `chosen_finished` and `rejected_finished`, several responses a list `finished`, a single one
    the value `finished`. A column that is absent says that its responses are finished.
    """
    if row.keys().isdisjoint(FINISHED_COLUMNS):
        return ()
    if tuple(names) == ("chosen", "rejected"):
        columns = [f"{name}_finished" for name in names]
        values = [row.get(column) for column in columns]
    elif len(names) == 1 or row.get("finished") is None:
        columns, values = ["finished"], [row.get("finished")]
    else:
        values = list(listed(row["finished"], "finished"))
        if len(values) != len(names):
            raise Refusal(Reason.WRONG_TYPE, "finished", values, f"{len(names)} of them, one a response")
        columns = [f"finished[{index}]" for index in range(len(values))]
    found = [value is None or _truth(value, column, Reason.WRONG_TYPE) for column, value in zip(columns, values, strict=True)]
    return () if all(found) else tuple(found)


def _truth(value: Any, field: str, reason: Reason) -> bool:
    truth = _TRUTHS.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None
    if truth is None:
        raise Refusal(reason, field, value, "true or false, 1 or 0")
    return truth


def _list_for_each(row: Mapping[str, Any], name: str, responses: int) -> list[Any]:
    value = row.get(name)
    if value is None:
        raise Refusal(Reason.MISSING_FIELD, name, sorted(map(str, row)), f'a field "{name}"')
    try:
        values = list(listed(value, name))
    except Refusal as refusal:
        raise Refusal(Reason.BAD_SCORES, name, value, refusal.expected) from None
    if len(values) != responses:
        raise Refusal(Reason.BAD_SCORES, name, values, f"{responses} of them, one a response")
    return values


def _optional(row: Mapping[str, Any], name: str, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    return None if row.get(name) is None else number(row[name], name, low=low, high=high)


def number(value: Any, field: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float from `low` to `high`; refused otherwise."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        within = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        raise Refusal(Reason.BAD_SCORES, field, value, f"a finite number{within}")
    return found
