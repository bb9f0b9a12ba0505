"""How well a policy separates held-out pairs that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluate.intervals import Floats, bootstrap_mean, wilson


def heldout(policy_logps_G2: Floats, reference_logps_G2: Floats, *, beta: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """The "heldout" section of evaluation.json, from summed log-probs in nats; columns are chosen and rejected.

    With m = (log-ratio of chosen) - (log-ratio of rejected): accuracy is the share of m > 0, a tie counting half;
    margin the mean of m in nats; loss the mean DPO loss -log sigmoid(beta m), ln 2 where policy == reference.
    reference_accuracy asks the reference alone, without ratios, whether the chosen response is the likelier one.
    """
    policy, reference = (np.asarray(logps, dtype=np.float64) for logps in (policy_logps_G2, reference_logps_G2))
    if policy.shape != reference.shape or policy.ndim != 2 or policy.shape[1] != 2 or not len(policy):
        raise ValueError(f"held-out log-probs are (pairs, 2), found {policy.shape} and {reference.shape}")
    ratios = policy - reference
    margin = ratios[:, 0] - ratios[:, 1]
    return {
        "accuracy": wilson(_wins(margin), len(margin)),
        "margin": bootstrap_mean(margin, seed=seed),
        "loss": float(np.logaddexp(0, -beta * margin).mean()),
        "pairs": len(margin),
        "reference_accuracy": wilson(_wins(reference[:, 0] - reference[:, 1]), len(margin)),
    }


def response_sums(scores: Sequence[tuple[NDArray[Any], ...]]) -> Floats:
    """(groups, responses) sums of what `LanguageModel.score` gives, in float64; every group has as many responses."""
    return np.array([[token_logps.sum(dtype=np.float64) for token_logps in group] for group in scores], dtype=np.float64)


def _wins(difference: Floats) -> float:
    return float((difference > 0).sum() + (difference == 0).sum() / 2)
