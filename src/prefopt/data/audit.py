"""What the rows are like before anything is trained on them: refusals, repeats, lengths, length bias, leakage."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.core.statistics import wilson
from prefopt.data.encode import TokenSet
from prefopt.data.feedback_audit import feedback_lines, feedback_summary
from prefopt.data.groups import BadRow, GroupSet
from prefopt.data.repeats import EXAMPLES, GroupKeys, contradictions, duplicates, leakage
from prefopt.data.tokens import feedbacks_of, lengths_of

HISTOGRAM_BINS = 24

_BARS = " ▁▂▃▄▅▆▇█"
Lengths = NDArray[np.int64]


def audit(
    groups: GroupSet, tokens: TokenSet, *, budget: tuple[int, int], on_overlong: str, against: GroupSet | None = None
) -> dict[str, Any]:
    """The audit of `groups` as plain values, as saved in `audit.json`.

    `tokens` are the same groups at full length, `budget` is (max_prompt_tokens, max_response_tokens). `groups` in the
    result counts the groups with token ids, before the budget. With `against` (the held-out rows, or the training rows of
    held-out ones) `leakage` counts what is in both, compared character for character.
    """
    keys, leaked = GroupKeys.of(groups.groups), None
    if against is not None:
        others = GroupKeys.of(against.groups)
        leaked = {"against": against.name, **leakage(groups.groups, keys, against.groups, others)}
    return {
        "data": groups.name,
        "shape": groups.shape,
        "rows": groups.rows,
        "groups": len(tokens.groups),
        "refused": _refused(list(dict.fromkeys((*groups.bad, *tokens.bad)))),
        "duplicates": duplicates(groups.groups, keys),
        "contradictions": contradictions(groups.groups, keys),
        "tokens": _token_lengths(tokens),
        "truncation": _truncation(tokens, budget, on_overlong),
        "feedback": feedback_summary(tokens),
        "length_bias": length_bias(*_pair_lengths(tokens, ties=False)),
        "leakage": leaked,
        "special_text": {"rows": len(tokens.special_text), "examples": list(tokens.special_text[:EXAMPLES])},
    }


def _refused(bad: Sequence[BadRow]) -> dict[str, Any]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row in bad:
        by_reason[str(row.reason)].append(str(row))
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    return {reason: {"count": len(rows), "examples": rows[:EXAMPLES]} for reason, rows in ordered}


def _pair_lengths(tokens: TokenSet, *, ties: bool) -> tuple[Lengths, Lengths]:
    """Tokens of chosen and of rejected, for every pair, with or without the tied ones."""
    wanted = [feedback.kind == "pair" and (ties or not feedback.tie) for feedback in feedbacks_of(tokens.groups)]
    table = lengths_of(tokens.groups).of(np.flatnonzero(wanted)).response_S.reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _token_lengths(tokens: TokenSet) -> dict[str, Any]:
    """Statistics of tokens: the prompt, and chosen and rejected of pairs (on common edges) or all responses."""
    if not tokens.groups:
        return {}
    lengths = lengths_of(tokens.groups)
    prompt = lengths.prompt_G
    response = lengths.of(np.flatnonzero([feedback.kind != "pair" for feedback in feedbacks_of(tokens.groups)])).response_S
    chosen, rejected = _pair_lengths(tokens, ties=True)
    found = {"prompt": _statistics(prompt, _edges(prompt))}
    if len(chosen):
        edges = _edges(np.concatenate((chosen, rejected)))
        found |= {"chosen": _statistics(chosen, edges), "rejected": _statistics(rejected, edges)}
    if len(response):
        found["response"] = _statistics(response, _edges(response))
    return found


def _edges(lengths: Lengths) -> Lengths:
    """Edges of bins of equal width, whole numbers; the last bin holds the longest."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = max(1, math.ceil((high - low) / HISTOGRAM_BINS))
    return np.arange(low, high + width, width, dtype=np.int64)


def _statistics(lengths: Lengths, edges: Lengths) -> dict[str, Any]:
    counts, _ = np.histogram(lengths, bins=edges)
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p95": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _truncation(tokens: TokenSet, budget: tuple[int, int], on_overlong: str) -> dict[str, Any]:
    max_prompt, max_response = budget
    lengths = lengths_of(tokens.groups)
    prompts_over, responses_over = lengths.prompt_G > max_prompt, lengths.response_S > max_response
    cut_G = np.bincount(lengths.group_S[responses_over], minlength=len(lengths.responses_G))
    return {
        "max_prompt_tokens": max_prompt,
        "max_response_tokens": max_response,
        "on_overlong": on_overlong,
        "prompts_over": int(prompts_over.sum()),
        "responses_over": int(responses_over.sum()),
        "groups_over": int((prompts_over | (lengths.longest_G > max_response)).sum()),
        "partly_over": int(((cut_G > 0) & (cut_G < lengths.responses_G)).sum()),
    }


def length_bias(chosen: Lengths, rejected: Lengths) -> dict[str, Any] | None:
    """How far length alone tells chosen from rejected, or None without pairs.

    `chosen_longer` is the share of pairs whose chosen response has more tokens (ties count half), with its 95 % Wilson
    interval. `auc` is the area under the ROC curve when each pair is shown in both orders and the difference of lengths
    (first less second) predicts whether the first is the chosen one: 0.5 says that length tells nothing.
    """
    pairs = len(chosen)
    if not pairs:
        return None
    difference = (chosen - rejected).astype(np.int64)
    longer = (float((difference > 0).sum()) + 0.5 * float((difference == 0).sum())) / pairs
    low, high = wilson(longer, pairs)
    swapped = np.sort(-difference)
    below = np.searchsorted(swapped, difference, side="left").sum()
    not_above = np.searchsorted(swapped, difference, side="right").sum()
    auc = float(below + not_above) / (2 * pairs * pairs)
    return {"pairs": pairs, "chosen_longer": longer, "low": low, "high": high, "auc": auc}


def audit_lines(audit: dict[str, Any]) -> list[str]:
    """The audit as plain text of at most 40 lines."""
    refused = audit["refused"]
    lines = [
        f"{audit['data']}: {audit['rows']} rows of shape {audit['shape']}, {audit['groups']} usable groups",
        f"refused rows: {sum(entry['count'] for entry in refused.values())}",
    ]
    lines += _refused_lines(refused)
    abouts = {"duplicates": "rows that repeat an earlier row"}
    if audit["shape"] != "demonstration":
        labelled = audit["shape"] == "label"
        abouts["contradictions"] = "responses labelled both ways" if labelled else "two responses preferred both ways"
    lines += [_counted(audit[key]["count"], about, audit[key]["examples"]) for key, about in abouts.items()]
    lines += feedback_lines(audit["feedback"])
    lines += _length_lines(audit["tokens"])
    lines += _budget_lines(audit["truncation"], audit["groups"])
    lines += _bias_lines(audit["length_bias"])
    leakage = audit["leakage"]
    if leakage is not None:
        lines.append(
            _counted(leakage["prompts"], f"groups with a prompt that is also in {leakage['against']}", leakage["examples"])
        )
        lines.append(
            _counted(leakage["groups"], f"groups that are there with the same responses too ({leakage['against']})", [])
        )
    special = audit["special_text"]
    lines.append(
        _counted(special["rows"], "rows hold the text of a special token; it is read as plain text", special["examples"])
    )
    return lines


def _counted(count: int, about: str, examples: Sequence[str]) -> str:
    return f"{count:>7}  {about}{f' (first: {examples[0]})' if examples else ''}"


def _refused_lines(refused: dict[str, Any]) -> list[str]:
    shown = list(refused.items())[:6]
    lines = []
    for reason, entry in shown:
        example = entry["examples"][0].replace(f": {reason} ", " ", 1)
        lines.append(f"{entry['count']:>7}  {reason}: {example if len(example) <= 150 else example[:149] + '…'}")
    rest = list(refused.values())[6:]
    if rest:
        lines.append(f"{sum(entry['count'] for entry in rest):>7}  for {len(rest)} other reasons (all of them in audit.json)")
    return lines


def _length_lines(tokens: dict[str, Any]) -> list[str]:
    if not tokens:
        return []
    lines = [f"{'tokens':<10}{'min':>7}{'median':>8}{'mean':>9}{'95 %':>8}{'max':>8}  from min to max"]
    for name, entry in tokens.items():
        counts = entry["histogram"]["counts"]
        top = max(counts)
        bars = "".join(_BARS[math.ceil(count / top * (len(_BARS) - 1))] for count in counts)
        numbers = f"{entry['min']:>7}{entry['median']:>8.0f}{entry['mean']:>9.1f}{entry['p95']:>8.0f}{entry['max']:>8}"
        lines.append(f"{name:<10}{numbers}  |{bars}|")
    if "chosen" in tokens:
        edges = tokens["chosen"]["histogram"]["edges"]
        lines.append(
            f"  chosen and rejected are drawn on one axis: {edges[0]} to {edges[-1]} tokens, {edges[1] - edges[0]} a column"
        )
    return lines


def _budget_lines(truncation: dict[str, Any], groups: int) -> list[str]:
    what = {"drop": "are dropped", "truncate": "are cut", "error": "stop the run"}.get(truncation["on_overlong"], "are over")
    share = 100 * truncation["groups_over"] / max(groups, 1)
    prompts, responses = (
        f"prompts over {truncation['max_prompt_tokens']} tokens",
        f"responses over {truncation['max_response_tokens']}",
    )
    lines = [
        _counted(truncation["prompts_over"], prompts, []),
        _counted(truncation["responses_over"], f"{responses} tokens", []),
        _counted(
            truncation["groups_over"],
            f"groups ({share:.1f} %) {what} for it (data.on_overlong={truncation['on_overlong']})",
            [],
        ),
    ]
    if truncation["on_overlong"] == "truncate":
        lines.append(_counted(truncation["partly_over"], "groups with a response that is cut beside one that ends", []))
    return lines


def _bias_lines(bias: dict[str, Any] | None) -> list[str]:
    if bias is None:
        return []
    share, low, high = (100 * bias[key] for key in ("chosen_longer", "low", "high"))
    return [
        f"chosen is longer in {share:.1f} % of pairs ({low:.1f} to {high:.1f}): "
        f"length alone predicts the label with AUC {bias['auc']:.2f} (0.50: not at all)"
    ]
