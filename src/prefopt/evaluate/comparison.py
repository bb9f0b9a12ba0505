"""A policy's samples against the reference's on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.evaluate.diversity import distinct_n, self_bleu
from prefopt.evaluate.intervals import Floats, Interval, bootstrap_mean, cluster_means, paired_difference, wilson
from prefopt.rollout.prompts import prompt_text
from prefopt.rollout.rewards import Reward
from prefopt.rollout.sample import SampleRow, scores_of


@dataclass(frozen=True, slots=True)
class Comparison:
    """`sections` of evaluation.json, and `rows` of samples.jsonl: one for each pair of samples."""

    sections: dict[str, Any]
    rows: list[dict[str, Any]]


def compare(
    policy: Sequence[SampleRow],
    reference: Sequence[SampleRow],
    reward: Reward | None = None,
    *,
    tolerance: float = 0.0,
    kl: Sequence[float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Sections reward and win_rate (with a reward), length, finished and diversity; `policy[i]` meets `reference[i]`.

    A pair is a tie where the rewards differ by at most `tolerance`. Prompts are the independent observations: samples
    of one prompt are averaged before any interval, whose `n` is the number of prompts. wins, losses and ties count
    pairs of samples. `kl` holds log(policy / reference) of each of the policy's samples, for the rows.
    DataError where the two lists are empty or hold different prompts.
    """
    _check_pairs(policy, reference)
    clusters = prompt_clusters(policy)
    sections: dict[str, Any] = {}
    ours: Sequence[float | None] = [None] * len(policy)
    theirs: Sequence[float | None] = [None] * len(policy)
    if reward is not None:
        scores = [np.array(scores_of(reward, rows)) for rows in (policy, reference)]
        sections["reward"] = reward_section(reward.name, *(cluster_means(values, clusters) for values in scores), seed=seed)
        sections["win_rate"] = win_rate(scores[0] - scores[1], clusters, tolerance=tolerance, seed=seed)
        ours, theirs = scores[0].tolist(), scores[1].tolist()
    both = {"policy": policy, "reference": reference}
    sections["length"] = {name: _length(rows, clusters, seed) for name, rows in both.items()}
    sections["finished"] = {name: sum(row.finished for row in rows) / len(rows) for name, rows in both.items()}
    sections["diversity"] = {name: _diversity(rows, clusters) for name, rows in both.items()}
    rows = [
        {
            "prompt": prompt_text(mine.prompt),
            "policy": mine.response,
            "reference": other.response,
            "policy_reward": ours[at],
            "reference_reward": theirs[at],
            "kl": float(kl[at]) if kl is not None else None,
        }
        for at, (mine, other) in enumerate(zip(policy, reference, strict=True))
    ]
    return Comparison(sections, rows)


def reward_section(name: str, policy: Floats, reference: Floats, *, seed: int = 0) -> dict[str, Any]:
    """The "reward" section from mean rewards per prompt; the difference is paired by prompt."""
    return {
        "name": name,
        "policy": bootstrap_mean(policy, seed=seed),
        "reference": bootstrap_mean(reference, seed=seed),
        "difference": paired_difference(policy, reference, seed=seed),
    }


def win_rate(difference: Floats, clusters: Sequence[int], *, tolerance: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """The "win_rate" section from reward differences (policy - reference) of pairs of samples.

    With one pair a prompt the interval is Wilson's; with several, the bootstrap's over the prompts' own rates. Where
    those are all equal the bootstrap has no spread to go by, and Wilson's over the prompts is used, which is wider.
    """
    outcome = np.where(np.abs(difference) <= tolerance, 0.5, (difference > 0).astype(np.float64))
    rates = cluster_means(outcome, clusters)
    rate: Interval
    if len(rates) == len(outcome) or np.ptp(rates) == 0:
        rate = wilson(min(float(rates.sum()), len(rates)), len(rates))
    else:
        rate = bootstrap_mean(rates, seed=seed)
    return {
        "wins": int((outcome == 1).sum()),
        "losses": int((outcome == 0).sum()),
        "ties": int((outcome == 0.5).sum()),
        "rate": rate,
    }


def prompt_clusters(rows: Sequence[SampleRow]) -> list[int]:
    """For each row the number of its prompt, in order of appearance; a prompt that is listed twice is one."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(json.dumps(row.prompt), len(numbers)) for row in rows]


def _check_pairs(policy: Sequence[SampleRow], reference: Sequence[SampleRow]) -> None:
    if not policy or len(policy) != len(reference):
        raise DataError(
            f"{len(policy)} samples of the policy and {len(reference)} of the reference cannot be compared",
            todo="Sample both from the same prompts, with the same number of samples a prompt.",
        )
    for at, (mine, other) in enumerate(zip(policy, reference, strict=True)):
        if mine.prompt != other.prompt:
            ours, theirs = (prompt_text(row.prompt)[:60] for row in (mine, other))
            raise DataError(
                f"sample {at}: the policy answers {ours!r}, the reference {theirs!r}",
                todo="Sample both from the same prompts, in the same order.",
            )


def _length(rows: Sequence[SampleRow], clusters: Sequence[int], seed: int) -> Interval:
    return bootstrap_mean(cluster_means([float(len(row.response_ids)) for row in rows], clusters), seed=seed)


def _diversity(rows: Sequence[SampleRow], clusters: Sequence[int]) -> dict[str, float]:
    texts = [row.response for row in rows]
    found = {"distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2)}
    of_prompt: dict[int, list[str]] = {}
    for text, prompt in zip(texts, clusters, strict=True):
        of_prompt.setdefault(prompt, []).append(text)
    several = [members for members in of_prompt.values() if len(members) > 1]
    return found | ({"self_bleu": sum(map(self_bleu, several)) / len(several)} if several else {})
