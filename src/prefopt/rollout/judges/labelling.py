"""Sampled responses -> preference rows, by a judge that is asked about every pair in both orders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from prefopt.core.errors import ConfigError
from prefopt.rollout.judges.templates import check_takes_principles
from prefopt.rollout.judges.verdict import Judge, Verdict, mirrored, sees_order, winner_of
from prefopt.rollout.label import as_prompt_is, usable_responses
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given

Orders = Literal["agree", "mean"]
ORDERS: tuple[Orders, ...] = ("agree", "mean")
UNREADABLE = "unreadable answer"
DISAGREE = "orders disagree"


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Preference rows, and what gave none, by reason.

    `pairs` were judged; each is in `rows` or counted in `skipped` as "tie" (both orders), "orders disagree" or "unreadable
    answer". "empty response" counts responses, "fewer than two responses" prompts, "identical responses" pairs that were
    not judged. `first_won` of `decided` verdicts went to the response that was shown first: half, for a judge without a
    taste for a place; both are 0 where the judge sees no order.
    """

    rows: list[dict[str, Any]]
    skipped: dict[str, int]
    pairs: int
    first_won: int = 0
    decided: int = 0
    by_principle: dict[str, int] = field(default_factory=dict)


class _Pair(NamedTuple):
    prompt: Given
    one: str
    other: str
    finished: tuple[bool, bool]
    principle: Principle | None


def label_with_judge(
    rows: Sequence[Mapping[str, Any]],
    judge: Judge,
    *,
    principles: Sequence[Principle] = (),
    pairs_per_prompt: int | None = None,
    seed: int = 0,
    orders: Orders = "agree",
) -> JudgedRows:
    """Preference rows {prompt, chosen, rejected, judge} of the responses of each prompt, as `judge` sees them.

    `rows` hold `prompt` and `responses`, as `prefopt.rollout.sample.samples_of` gives them. Every pair of different
    responses of a prompt is judged, or `pairs_per_prompt` of them, drawn with `seed`. The judge is asked in both orders, and
    a row is made where both name the same response; all else is counted. With `orders` "mean", for a judge that gives
    log-probs, the mean margin of both orders decides instead: a taste for a place, which adds the same to both margins,
    cancels, as with small models whose taste is stronger than their judgement. With `principles` (see
    `prefopt.rollout.principles`) each pair is judged by one of them, drawn with `seed` for this pair, and its row says
    which in `principle`. Where the judge gives log-probs or scores, `margin` is the mean margin of both orders; where it
    gives log-probs, `probability` is the sigmoid of that, which the loss soft_dpo can use. DataError as of
    `prefopt.rollout.label.label`.
    """
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise ConfigError(
            f"pairs_per_prompt: found {pairs_per_prompt}, at least 1 is needed", todo="Or leave it out for all pairs."
        )
    if orders not in ORDERS or (orders == "mean" and not getattr(judge, "has_probability", False)):
        raise ConfigError(
            f'orders: "{orders}" does not go with the judge {judge.name}',
            todo="agree is for every judge; mean for a local one that gives log-probs (the judge setting verdict_by=letters).",
        )
    if principles and not getattr(judge, "contrasts", False):
        check_takes_principles(judge.name, getattr(judge, "template", None))
    skipped: Counter[str] = Counter()
    pairs = _pairs(rows, principles, pairs_per_prompt, seed, skipped)
    forward, backward = _both_orders(judge, pairs)
    made = []
    kept: Counter[str] = Counter()
    for pair, one, other in zip(pairs, forward, backward, strict=True):
        if orders == "mean":
            one = _mean(one, other)
            other = mirrored(one)
        reason = _undecided(one, other)
        if reason:
            skipped[reason] += 1
            continue
        row = _row(pair, one, other, judge)
        kept[row.get("principle", "")] += 1
        made.append(row)
    verdicts = [verdict for verdict in (*forward, *backward) if verdict.winner in ("first", "second")]
    decided = len(verdicts) if sees_order(judge) else 0
    return JudgedRows(
        rows=made,
        skipped=dict(+skipped),
        pairs=len(pairs),
        first_won=sum(verdict.winner == "first" for verdict in verdicts) if decided else 0,
        decided=decided,
        by_principle={name: count for name, count in kept.items() if name},
    )


def _pairs(
    rows: Sequence[Mapping[str, Any]],
    principles: Sequence[Principle],
    pairs_per_prompt: int | None,
    seed: int,
    skipped: Counter[str],
) -> list[_Pair]:
    found = []
    for at, row in enumerate(rows):
        answers = usable_responses(at, row, skipped)
        random = np.random.default_rng([seed % 2**64, at])
        candidates = []
        for one, other in combinations(answers, 2):
            if one[0].strip() == other[0].strip():
                skipped["identical responses"] += 1
            else:
                candidates.append((one, other))
        if pairs_per_prompt is not None and len(candidates) > pairs_per_prompt:
            chosen = np.sort(random.choice(len(candidates), pairs_per_prompt, replace=False))
            candidates = [candidates[number] for number in chosen.tolist()]
        for one, other in candidates:
            principle = principles[int(random.integers(len(principles)))] if principles else None
            found.append(_Pair(row["prompt"], one[0], other[0], (one[1], other[1]), principle))
    return found


def _both_orders(judge: Judge, pairs: Sequence[_Pair]) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts with `one` shown first, and with `other` shown first, asked for in one call."""
    prompts = [pair.prompt for pair in pairs]
    ones, others = [pair.one for pair in pairs], [pair.other for pair in pairs]
    by = [pair.principle for pair in pairs if pair.principle is not None]
    ask: Any = judge.compare
    named = {"principles": by} if by else {}
    if not sees_order(judge):
        forward = ask(prompts, ones, others, **named)
        return forward, [mirrored(verdict) for verdict in forward]
    named = {"principles": by * 2} if by else {}
    verdicts = ask(prompts * 2, ones + others, others + ones, **named)
    return verdicts[: len(pairs)], verdicts[len(pairs) :]


def _mean(one: Verdict, other: Verdict) -> Verdict:
    """The verdict of the mean margin of both orders."""
    if one.margin is None or other.margin is None:
        return Verdict(None)
    margin = (one.margin - other.margin) / 2
    return Verdict(winner_of(margin, 0.0), margin=margin)


def _undecided(one: Verdict, other: Verdict) -> str:
    """Why a pair gives no row; "" where it does."""
    if one.winner is None or other.winner is None:
        return UNREADABLE
    if (one.winner, other.winner) in (("first", "second"), ("second", "first")):
        return ""
    return "tie" if one.winner == other.winner == "tie" else DISAGREE


def _row(pair: _Pair, one: Verdict, other: Verdict, judge: Judge) -> dict[str, Any]:
    first_won = one.winner == "first"
    texts = (pair.one, pair.other) if first_won else (pair.other, pair.one)
    row: dict[str, Any] = {
        "prompt": pair.prompt,
        "chosen": as_prompt_is(pair.prompt, texts[0]),
        "rejected": as_prompt_is(pair.prompt, texts[1]),
        "judge": judge.name,
    }
    if pair.principle is not None:
        row["principle"] = pair.principle.name
    if one.margin is not None and other.margin is not None:
        margin = (one.margin - other.margin) / 2 * (1 if first_won else -1)
        row["margin"] = margin
        if getattr(judge, "has_probability", False):
            row["probability"] = 1 / (1 + math.exp(-margin))  # margin > 0: it cannot overflow
    if not all(pair.finished):
        finished = pair.finished if first_won else pair.finished[::-1]
        row |= {"chosen_finished": finished[0], "rejected_finished": finished[1]}
    return row
