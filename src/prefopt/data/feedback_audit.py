"""What the feedback of the rows is like: kinds, ties, balance of labels, responses to a prompt, responses that were cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from prefopt.data.groups import Feedback
from prefopt.data.projections import has_tied_scores
from prefopt.data.tokens import Counts, TokenSet, feedbacks_of, lengths_of, prompt_digests, unfinished_responses


def feedback_summary(tokens: TokenSet) -> dict[str, Any]:
    """The section `feedback` of the audit, over the groups with token ids.

    `ties`, `labels` and `tied_scores` are None where no row is of their kind. Prompts are the same where their token ids
    are; `share` is that of tied pairs, of desirable rows, of rows with two equal scores.
    """
    feedbacks, responses = feedbacks_of(tokens.groups), lengths_of(tokens.groups).responses_G
    _, number_G = np.unique(np.array(prompt_digests(tokens.groups), dtype="S16"), return_inverse=True)
    of_prompts = np.bincount(number_G, responses).astype(np.int64) if len(responses) else responses
    return {
        "kinds": dict(Counter(feedback.kind for feedback in feedbacks)),
        "prompts": len(of_prompts),
        "responses_per_group": _spread(responses),
        "responses_per_prompt": _spread(of_prompts),
        "unfinished": unfinished_responses(tokens.groups),
        "ties": _ties([feedback for feedback in feedbacks if feedback.kind == "pair"]),
        "labels": _labels([feedback for feedback in feedbacks if feedback.kind == "label"]),
        "tied_scores": _tied_scores([feedback for feedback in feedbacks if feedback.kind == "scores"]),
    }


def _spread(counts: Counts) -> dict[str, Any] | None:
    if not len(counts):
        return None
    return {"min": int(counts.min()), "mean": int(counts.sum()) / len(counts), "max": int(counts.max())}


def _ties(pairs: list[Feedback]) -> dict[str, Any] | None:
    tied = sum(feedback.tie for feedback in pairs)
    return {"pairs": len(pairs), "tied": tied, "share": tied / len(pairs)} if pairs else None


def _labels(rows: list[Feedback]) -> dict[str, Any] | None:
    good = sum(bool(feedback.label) for feedback in rows)
    return {"desirable": good, "undesirable": len(rows) - good, "share": good / len(rows)} if rows else None


def _tied_scores(rows: list[Feedback]) -> dict[str, Any] | None:
    tied = sum(has_tied_scores(feedback) for feedback in rows)
    level = sum(len(set(feedback.scores)) == 1 for feedback in rows)
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
