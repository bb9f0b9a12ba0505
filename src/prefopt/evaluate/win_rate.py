"""Responses of a policy against those of an opponent, as a judge sees them in both orders.

P prompts, N comparisons. An outcome is 1 where the policy's response is better, 0 where the opponent's is, 1/2 for a tie.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.evaluate.intervals import Floats, Interval, bootstrap_mean, cluster_means, tied_wilson, wilson
from prefopt.evaluate.length_control import length_controlled
from prefopt.rollout.judges.verdict import Judge, Verdict, mirrored, sees_order
from prefopt.rollout.prompts import Given

_FIRST_SCORE = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class Match:
    """What is compared: a response of the policy and one of its opponent to the same prompt."""

    prompt: Given
    policy: str
    opponent: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A match with the verdicts of both orders: the policy's response shown first, and shown second."""

    match: Match
    policy_first: Verdict
    opponent_first: Verdict

    @property
    def scores(self) -> tuple[float | None, float | None]:
        """The policy's score by each verdict: 1, 1/2 or 0; None where the verdict could not be read."""
        first, second = (
            None if verdict.winner is None else _FIRST_SCORE[verdict.winner]
            for verdict in (self.policy_first, self.opponent_first)
        )
        return first, None if second is None else 1 - second

    @property
    def outcome(self) -> float | None:
        """Mean over the verdicts that could be read: orders that disagree make a tie. None where neither could be."""
        read = [score for score in self.scores if score is not None]
        return sum(read) / len(read) if read else None

    @property
    def first_shown(self) -> float | None:
        """Mean score of whichever response was shown first, 1/2 for a judge that does not look at places; None unless
        both verdicts could be read, because one of them alone says as much of the policy as of its place."""
        first, second = self.scores
        return None if first is None or second is None else (first + 1 - second) / 2


def judge_matches(judge: Judge, matches: Sequence[Match]) -> list[Judged]:
    """Every match, judged in both orders; a judge that sees no order is asked once, and the other order is its mirror image.

    DataError where the judge gives another number of verdicts than it was asked for.
    """
    prompts = [match.prompt for match in matches]
    policy, opponent = [match.policy for match in matches], [match.opponent for match in matches]
    if sees_order(judge):
        verdicts = _asked(judge, prompts * 2, policy + opponent, opponent + policy)
    else:
        verdicts = _asked(judge, prompts, policy, opponent)
        verdicts += [mirrored(verdict) for verdict in verdicts]
    orders = zip(verdicts[: len(matches)], verdicts[len(matches) :], strict=True)
    return [Judged(match, *both) for match, both in zip(matches, orders, strict=True)]


def _asked(judge: Judge, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
    verdicts = list(judge.compare(prompts, first, second))
    if len(verdicts) != len(prompts):
        raise DataError(
            f"judge {judge.name}: gave {len(verdicts)} verdicts on {len(prompts)} comparisons",
            todo="A judge gives one verdict a comparison, in order.",
        )
    return verdicts


def win_rate_section(judged: Sequence[Judged], *, order_seen: bool = True, seed: int = 0) -> dict[str, Any]:
    """Counts, win rate, position bias, length-controlled win rate and mean lengths of judged matches.

    Without `order_seen`, for a judge that scores each response by itself, "position" is None.

    A comparison of which one verdict could be read counts by it; one without any is left out; both are counted under
    "unreadable". The rate's interval is that of `rate_interval`. DataError where no comparison has a verdict.
    """
    kept = [one for one in judged if one.outcome is not None]
    if not kept:
        said = next((one.policy_first.said for one in judged if one.policy_first.said), "")
        raise DataError(
            f"none of {len(judged)} comparisons has a verdict that can be read"
            + (f"; the first answer: {said[:200]!r}" if said else ""),
            todo="Look at what the judge says, and choose another judge or template.",
        )
    outcome_N = np.array([one.outcome for one in kept], dtype=np.float64)
    clusters = prompt_numbers([one.match.prompt for one in kept])
    lengths_N2 = np.array([(len(one.match.policy), len(one.match.opponent)) for one in kept], dtype=np.float64)
    controlled, note = length_controlled(outcome_N, lengths_N2[:, 0] - lengths_N2[:, 1], clusters, seed=seed)
    return {
        "comparisons": len(kept),
        "wins": int((outcome_N > 0.5).sum()),
        "losses": int((outcome_N < 0.5).sum()),
        "ties": int((outcome_N == 0.5).sum()),
        "rate": rate_interval(outcome_N, clusters, seed=seed),
        "unreadable": {
            "one_order": sum(one.first_shown is None for one in kept),
            "both_orders": len(judged) - len(kept),
        },
        "position": _position(kept, seed) if order_seen else None,
        "length_controlled": controlled,
        **({"length_note": note} if note else {}),
        "characters": {
            name: bootstrap_mean(cluster_means(lengths_N2[:, column], clusters), seed=seed)
            for column, name in enumerate(("policy", "opponent"))
        },
    }


def rate_interval(outcome_N: Floats, clusters: Sequence[int], *, seed: int = 0) -> Interval:
    """A mean of outcomes in [0, 1] with its interval; `n` is the number of prompts.

    One comparison a prompt: Wilson's interval, narrowed by ties (`tied_wilson`). Several: the BCa bootstrap of the
    prompts' own means; where these are all equal, Wilson's over the prompts, which is wider.
    """
    means_P = cluster_means(outcome_N, clusters)
    if len(means_P) == len(outcome_N):
        return tied_wilson(means_P)
    if np.ptp(means_P) == 0:
        return wilson(min(float(means_P.sum()), len(means_P)), len(means_P))
    return bootstrap_mean(means_P, seed=seed)


def _position(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """How often whatever was shown first won, and the comparisons whose winner changed with the order."""
    both = [one for one in judged if one.first_shown is not None]
    shown_N = np.array([one.first_shown for one in both], dtype=np.float64)
    clusters = prompt_numbers([one.match.prompt for one in both])
    return {
        "both_orders": len(both),
        "first_shown": rate_interval(shown_N, clusters, seed=seed) if both else None,
        "first_won_twice": int((shown_N == 1).sum()),
        "second_won_twice": int((shown_N == 0).sum()),
        "inconsistent": int(((shown_N == 0) | (shown_N == 1)).sum()),
    }


def prompt_numbers(prompts: Sequence[Given]) -> list[int]:
    """For each prompt its number, in order of appearance; equal ones have one number."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(json.dumps(prompt), len(numbers)) for prompt in prompts]


def comparison_rows(judged: Sequence[Judged], judge: str) -> list[dict[str, Any]]:
    """A row for each comparison: prompt, both responses, both verdicts, outcome (None: unreadable), and who judged."""
    return [
        {
            "prompt": one.match.prompt,
            "policy": one.match.policy,
            "opponent": one.match.opponent,
            "outcome": one.outcome,
            "policy_first": _verdict_row(one.policy_first),
            "opponent_first": _verdict_row(one.opponent_first),
            "judge": judge,
        }
        for one in judged
    ]


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    return {"winner": verdict.winner, "said": verdict.said, "margin": verdict.margin}


def win_rate_lines(section: dict[str, Any]) -> list[str]:
    """The section as plain text."""
    rate, position, control = section["rate"], section["position"], section["length_controlled"]
    lines = [
        f"win rate            {shown(rate)} on {rate['n']} prompts: {section['wins']} won, {section['ties']} tied,"
        f" {section['losses']} lost",
        f"  length-controlled {shown(control['rate']) if control else section['length_note']}",
    ]
    if control and control["extrapolated"]:
        lines.append(f"  ({section['length_note']})")
    length = section["characters"]
    lines.append(f"length, characters  {length['policy']['value']:.0f}, opponent {length['opponent']['value']:.0f}")
    if position is None:
        lines.append("shown first wins    the judge scores each response by itself and sees no order")
    elif first := position["first_shown"]:
        lines.append(
            f"shown first wins    {shown(first)}; the winner changed with the order in {position['inconsistent']} of"
            f" {position['both_orders']} comparisons"
        )
    one, none = section["unreadable"]["one_order"], section["unreadable"]["both_orders"]
    if one or none:
        lines.append(f"unreadable verdicts {one} comparisons count by one order only; {none} have no verdict and are left out")
    return lines


def shown(value: Interval) -> str:
    """`0.512 (0.480 to 0.544)`."""
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
