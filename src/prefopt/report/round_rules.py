"""Rules about learning from the policy's own samples: what was gained, what it cost, and signs that the reward is being played."""

from __future__ import annotations

import math

from prefopt.report.history import num, number
from prefopt.report.known import Finding, Known

ENTROPY_LEFT = 0.5  # of a token's entropy at the start; below, samples of a prompt become the same
LENGTH_CHANGE = 0.5
CLIPPED = 0.3  # of the ratios: nearly a third of the samples has no gradient


def _ends(known: Known, key: str) -> tuple[float, float] | None:
    """The first and the last round's value; None with fewer than two rounds."""
    values = [value for event in known.history.of_kind("round") if (value := number(event.get(key))) is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def reward_of_rounds(known: Known) -> Finding | None:
    """Whether the samples of the last round earn more than those of the first, by two standard errors."""
    reward, kl, rounds = _ends(known, "objective/scores"), _ends(known, "objective/kl"), known.history.of_kind("round")
    if reward is None or kl is None:
        return None
    first, last = rounds[0], rounds[-1]
    spread = [number(event.get("objective/scores_std")) or 0.0 for event in (first, last)]
    counts = [number(event.get("objective/responses")) or 1.0 for event in (first, last)]
    error = math.hypot(*(std / math.sqrt(count) for std, count in zip(spread, counts, strict=True)))
    evidence = f"mean reward of a round {num(reward[0])} → {num(reward[1])}, at {num(kl[1])} nats a response"
    if reward[1] - reward[0] > 2 * error:
        return Finding(
            "good",
            "The policy's samples earn more reward than at the start. Evaluate on prompts it did not train on.",
            evidence,
        )
    if reward[0] - reward[1] > 2 * error:
        return Finding(
            "warning",
            "The policy's samples earn less reward than at the start: lower train.lr, or look at the reward.",
            evidence,
        )
    return Finding(
        "note", "The reward of the samples has not measurably changed: try a higher train.lr or more rounds.", evidence
    )


def collapsed(known: Known) -> Finding | None:
    """Samples that become alike: the entropy of a token fell by half or more."""
    entropy, length = _ends(known, "objective/entropy"), _ends(known, "objective/length")
    if entropy is None or length is None or not all(length) or entropy[0] <= 0:
        return None
    before, after = entropy[0] / length[0], entropy[1] / length[1]
    if after >= ENTROPY_LEFT * before:
        return None
    return Finding(
        "warning",
        "The samples have become much more alike: raise rollout.kl_coefficient, or stop earlier.",
        f"entropy {num(before)} → {num(after)} nats a token",
    )


def length_played(known: Known) -> Finding | None:
    """A reward that grows with length, or without it."""
    length = _ends(known, "objective/length")
    if length is None or not length[0] or abs(length[1] / length[0] - 1) < LENGTH_CHANGE:
        return None
    grew = length[1] > length[0]
    return Finding(
        "warning",
        f"The samples have become much {'longer' if grew else 'shorter'}: part of the reward may be length alone."
        " Compare at equal length (prefopt evaluate win-rate controls for it).",
        f"{num(length[0])} → {num(length[1])} tokens a response",
    )


def steps_too_large(known: Known) -> Finding | None:
    """Ratios beyond the clip have no gradient: many of them waste the samples of a round."""
    share = known.history.final("policy/clipfrac_avg")
    if share is None or share <= CLIPPED:
        return None
    return Finding(
        "warning",
        "Many samples are beyond the clip and teach nothing: lower train.lr or rollout.epochs_per_round.",
        f"clipped share {num(share)} at the end",
    )
