"""The win rate that would be seen if both sides wrote at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.evaluate.intervals import Floats, cluster_means, resampled_counts, resampled_interval

LEAST = 10  # prompts; with fewer, two coefficients are not told apart
_STEPS = 60  # of Newton's method; some 8 suffice unless a resample holds hardly any difference
_LONGEST_STEP = 2.0


def length_controlled(
    outcome_N: Floats, difference_N: Floats, clusters: Sequence[int], *, seed: int = 0, resamples: int = 1000
) -> tuple[dict[str, Any] | None, str]:
    """sigmoid(a), where outcome ~ sigmoid(a + b * difference / sd), with its interval; and a note where there is one.

    `difference_N`: length of the policy's response less the opponent's; `sd` their standard deviation; 0 stays 0. Every prompt
    counts once, whatever the number of its comparisons; ties are outcomes of 1/2. a and b maximise the likelihood with
    Firth's penalty (Jeffreys' prior, Biometrika 80, 1993), so that they are finite where one side wins everything.
    Intervals are percentiles of a bootstrap over prompts, corrected for bias. None, with the reason, where lengths do not vary or prompts are few.

    AlpacaEval 2 (arXiv 2404.04475, eq. 1 and 2) is the same idea with three differences: it has a term for the difficulty of each
    instruction, fitted over many models; it puts tanh around the standardised difference; it penalises squared coefficients,
    chosen by cross-validation. Here there is one pair of models, so that no difficulty can be fitted, and its number is not theirs.
    """
    prompts = int(max(clusters)) + 1
    spread = float(np.std(difference_N))
    if prompts < LEAST:
        return None, f"left out: {prompts} prompts, and {LEAST} are needed"
    if spread == 0:
        return None, f"left out: all pairs differ by {difference_N[0]:.0f} characters"
    numbers = np.asarray(clusters, dtype=np.int64)
    scaled_N = difference_N / spread
    share_N = 1 / np.bincount(numbers)[numbers]
    whole = _fit(outcome_N, scaled_N, share_N[None])[0]
    drawn = np.concatenate(
        [
            _fit(outcome_N, scaled_N, counts_BP[:, numbers] * share_N)
            for counts_BP in resampled_counts(prompts, resamples, seed=seed, width=len(outcome_N))
        ]
    )
    extrapolated = not difference_N.min() <= 0 <= difference_N.max()
    longer = "longer" if difference_N.min() > 0 else "shorter"
    note = (
        f"every response of the policy is {longer} than the opponent's: equal length is an extrapolation"
        if extrapolated
        else ""
    )
    result = {
        "rate": resampled_interval(float(_sigmoid(whole[0])), _sigmoid(drawn[:, 0]), prompts),
        "log_odds_per_sd": resampled_interval(float(whole[1]), drawn[:, 1], prompts),
        "sd_characters": spread,
        "mean_difference_characters": float(cluster_means(difference_N, clusters).mean()),
        "extrapolated": extrapolated,
    }
    return result, note


def _fit(outcome_N: Floats, x_N: Floats, weights_BN: Floats) -> Floats:
    """Coefficients (constant, slope) of B weighted logistic regressions with Firth's penalty, shape (B, 2)."""
    found_B2 = np.zeros((len(weights_BN), 2))
    for _ in range(_STEPS):
        p_BN = _sigmoid(found_B2[:, :1] + found_B2[:, 1:] * x_N)
        v_BN = weights_BN * p_BN * (1 - p_BN)
        s0, s1, s2 = v_BN.sum(axis=1), v_BN @ x_N, v_BN @ x_N**2
        det = np.maximum(s0 * s2 - s1**2, 1e-9 * s0 * (s0 + s2))
        leverage_BN = v_BN * (s2[:, None] - 2 * x_N * s1[:, None] + x_N**2 * s0[:, None]) / det[:, None]
        residual_BN = weights_BN * (outcome_N - p_BN) + leverage_BN * (0.5 - p_BN)
        g0, g1 = residual_BN.sum(axis=1), residual_BN @ x_N
        step_B2 = np.stack([s2 * g0 - s1 * g1, s0 * g1 - s1 * g0], axis=1) / det[:, None]
        found_B2 += np.clip(step_B2, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step_B2).max() < 1e-9:
            break
    return found_B2


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(x / 2))
