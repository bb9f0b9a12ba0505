"""What the feedback of the rows is like: kinds, ties, balance of labels, responses to a prompt, responses that were cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from prefopt.data.encode import TokenGroup, TokenSet
from prefopt.data.projections import has_tied_scores


def feedback_summary(tokens: TokenSet) -> dict[str, Any]:
    """The section `feedback` of the audit, over the groups with token ids.

    `ties`, `labels` and `tied_scores` are None where no row is of their kind. Prompts are the same where their token ids
    are; `share` is that of tied pairs, of desirable rows, of rows with two equal scores.
    """
    groups = tokens.groups
    of_prompts: Counter[bytes] = Counter()
    for group in groups:
        of_prompts[group.prompt_ids.tobytes()] += len(group.response_ids)
    return {
        "kinds": dict(Counter(group.feedback.kind for group in groups)),
        "prompts": len(of_prompts),
        "responses_per_group": _spread([len(group.response_ids) for group in groups]),
        "responses_per_prompt": _spread(of_prompts.values()),
        "unfinished": sum(not done for group in groups for done in group.finished),
        "ties": _ties([group for group in groups if group.feedback.kind == "pair"]),
        "labels": _labels([group for group in groups if group.feedback.kind == "label"]),
        "tied_scores": _tied_scores([group for group in groups if group.feedback.kind == "scores"]),
    }


def _spread(counts: Collection[int]) -> dict[str, Any] | None:
    return {"min": min(counts), "mean": sum(counts) / len(counts), "max": max(counts)} if counts else None


def _ties(pairs: list[TokenGroup]) -> dict[str, Any] | None:
    tied = sum(group.feedback.tie for group in pairs)
    return {"pairs": len(pairs), "tied": tied, "share": tied / len(pairs)} if pairs else None


def _labels(rows: list[TokenGroup]) -> dict[str, Any] | None:
    good = sum(bool(group.feedback.label) for group in rows)
    return {"desirable": good, "undesirable": len(rows) - good, "share": good / len(rows)} if rows else None


def _tied_scores(rows: list[TokenGroup]) -> dict[str, Any] | None:
    tied = sum(has_tied_scores(group.feedback) for group in rows)
    level = sum(len(set(group.feedback.scores)) == 1 for group in rows)
    return {"rows": len(rows), "tied": tied, "all_equal": level, "share": tied / len(rows)} if rows else None


def feedback_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as plain text, at most 5 lines."""
    lines = []
    if per_prompt := summary["responses_per_prompt"]:
        low, high = per_prompt["min"], per_prompt["max"]
        if low == high:
            each = f"{low} response{'' if low == 1 else 's'} each"
        else:
            each = f"{low} to {high} responses each, {per_prompt['mean']:.2f} on average"
        lines.append(f"{summary['prompts']:>7}  different prompts, with {each}")
    if labels := summary["labels"]:
        share = 100 * labels["share"]
        lines.append(f"{labels['desirable']:>7}  rows are desirable ({share:.1f} %), {labels['undesirable']} are not")
    if (ties := summary["ties"]) and ties["tied"]:
        lines.append(f"{ties['tied']:>7}  pairs are ties ({100 * ties['share']:.1f} %)")
    if scores := summary["tied_scores"]:
        share = 100 * scores["share"]
        lines.append(f"{scores['tied']:>7}  rows have equal scores ({share:.1f} %); in {scores['all_equal']} all are equal")
    if summary["unfinished"]:
        lines.append(f"{summary['unfinished']:>7}  responses were cut and get no end-of-turn token")
    return lines
