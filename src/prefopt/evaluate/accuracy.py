"""How often a reward, implicit or explicit, orders the responses of preference rows as the rows do, by category.

RewardBench's measure (arXiv 2403.13787) with ties: it counts a pair as won only where chosen scores higher, here equal
scores are half won and listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from prefopt.core.errors import DataError
from prefopt.data.groups import Group
from prefopt.data.read import read_rows
from prefopt.data.tokens import TokenGroup
from prefopt.evaluate.intervals import Interval, wilson
from prefopt.evaluate.ranking import preferred_pairs, share_ordered
from prefopt.evaluate.win_rate import shown

ALL = "all"  # the category of every row where no column is named


def accuracy_section(
    scores: Sequence[NDArray[Any]], groups: Sequence[Group | TokenGroup], categories: Sequence[str] | None = None
) -> dict[str, Any]:
    """Accuracy of `scores` (one array a group, one score a response), overall, in each category, and their macro mean.

    `groups`: Group or TokenGroup. A row counts once, with the share of its preferred pairs that score in order, an equal
    score counting half; "ties" lists rows with such a score. Rows that prefer nothing are counted and left out. Intervals are
    Wilson's; the macro mean's combines them (MOVER, Zou and Donner 2008), so that it has a width where a category is all right.
    DataError where no row prefers anything.
    """
    named = categories if categories is not None else [ALL] * len(groups)
    shares: dict[str, list[float]] = {}
    ties: list[str] = []
    silent = 0
    for values, group, category in zip(scores, groups, named, strict=True):
        share = share_ordered(values, group)
        if share is None:
            silent += 1
            continue
        shares.setdefault(category, []).append(share)
        if any(values[better] == values[worse] for better, worse in preferred_pairs(group.feedback)):
            ties.append(group.source)
    if not shares:
        raise DataError(f"none of {len(groups)} rows prefers a response", todo="Give pairs, rankings or scores.")
    found = {name: _wilson(values) for name, values in sorted(shares.items())}
    section: dict[str, Any] = {
        "rows": len(groups) - silent,
        "accuracy": _wilson([share for values in shares.values() for share in values]),
        "ties": ties,
        "without_preference": silent,
    }
    if categories is not None:
        section |= {"categories": found, "macro": macro_mean(list(found.values()))}
    return section


def macro_mean(shares: Sequence[Interval]) -> Interval:
    """The mean of independent shares, each counting once; `n` is the number of shares.

    low = mean - sqrt(sum of (value - low)^2) / K, high likewise (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    mean = sum(one["value"] for one in shares) / len(shares)
    below, above = (math.sqrt(sum((one["value"] - one[side]) ** 2 for one in shares)) / len(shares) for side in ("low", "high"))
    return {"value": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above), "n": len(shares)}


def categories_of(rows: str, column: str) -> dict[str, str]:
    """The value of `column` in every row of the file `rows`, by the row's place; DataError where no row has it."""
    raw = read_rows(rows)
    found = {source: str(row[column]) for row, source in zip(raw.rows, raw.sources, strict=True) if row.get(column) is not None}
    if not found:
        known = ", ".join(sorted({str(name) for row in raw.rows[:200] for name in row}))
        raise DataError(f'{rows}: no row has a column "{column}"', todo=f"Its columns: {known}.")
    return found


def accuracy_lines(section: Mapping[str, Any]) -> list[str]:
    """The section as plain text, a line for each category."""
    categories: Mapping[str, Interval] = section.get("categories", {})
    width = max(len(name) for name in (*categories, "macro mean", "all rows"))
    lines = [f"{name:<{width}}  {shown(found)} on {found['n']} rows" for name, found in categories.items()]
    if categories:
        lines.append(f"{'macro mean':<{width}}  {shown(section['macro'])} of {len(categories)} categories")
    lines.append(f"{'all rows':<{width}}  {shown(section['accuracy'])} on {section['rows']} rows")
    if ties := section["ties"]:
        lines.append(
            f"equal scores on {len(ties)} rows, which count half: {', '.join(ties[:5])}{' ...' if len(ties) > 5 else ''}"
        )
    if silent := section["without_preference"]:
        lines.append(f"{silent} rows prefer nothing and are left out")
    return lines


def _wilson(shares: Sequence[float]) -> Interval:
    return wilson(min(sum(shares), len(shares)), len(shares))
