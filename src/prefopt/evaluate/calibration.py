"""Whether sigmoid(margin) of the implicit reward is the probability that people prefer the response.

Under the Bradley-Terry model that DPO fits (arXiv 2305.18290 eq. 6) it is; training usually makes it too sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.evaluate.intervals import Floats, Interval, bootstrap_mean, wilson
from prefopt.evaluate.win_rate import shown

BINS = 10
_RESAMPLES = 1000
_BLOCK = 1 << 20  # numbers drawn at a time


def calibration_section(margins: Sequence[float] | Floats, *, bins: int = BINS, seed: int = 0) -> dict[str, Any]:
    """Reliability table, ECE and Brier score of p = sigmoid(margin), with margin = reward of chosen - reward of rejected.

    Every pair says "chosen wins", so the label would be the same for all. Each pair is therefore turned round or not by a coin
    with `seed`: then p is the predicted probability that the response in the first place is preferred, and the label says
    whether it was. The Brier score, mean (p - label)^2, does not depend on the coins. ECE = sum over bins of
    share of pairs * |mean p - share preferred|, with bins of equal counts. Noise alone makes an ECE above 0: "ece_by_chance" is
    its mean, and its 95th percentile in "high", were p exactly right. The ECE's interval reaches over both the percentiles of
    resamples and their mirror image at the ECE (the basic bootstrap), and not below 0: resampling adds noise once more, so that
    either of them alone covers too seldom (92 in 100 simulations).
    DataError with fewer pairs than two a bin, or margins that are not finite.
    """
    margin_N = np.asarray(margins, dtype=np.float64)
    if len(margin_N) < 2 * bins or not np.isfinite(margin_N).all():
        raise DataError(
            f"calibration in {bins} bins needs {2 * bins} finite margins, found {int(np.isfinite(margin_N).sum())}",
            todo="Give more pairs, or fewer bins.",
        )
    random = np.random.default_rng(seed)
    first_N = random.random(len(margin_N)) < 0.5
    p_N = _sigmoid(np.where(first_N, margin_N, -margin_N))
    label_N = first_N.astype(np.float64)
    found = ece(p_N, label_N, bins)
    order = np.argsort(p_N, kind="stable")
    drawn, chance = _resampled_ece(p_N[order], label_N[order], bins, random)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "pairs": len(margin_N),
        "ece": _joined(found, float(low), float(high), len(margin_N)),
        "ece_by_chance": {"value": float(chance.mean()), "high": float(np.quantile(chance, 0.95))},
        "brier": bootstrap_mean((_sigmoid(margin_N) - 1) ** 2, seed=seed),
        "table": reliability(p_N, label_N, bins),
    }


def ece(p_N: Floats, label_N: Floats, bins: int = BINS) -> float:
    """Expected calibration error in bins of equal counts (Naeini et al. 2015 has bins of equal width)."""
    order = np.argsort(p_N, kind="stable")
    return float(_ece_sorted((p_N - label_N)[order][None], bins)[0])


def _ece_sorted(error_BN: Floats, bins: int) -> Floats:
    """ECE from p - label of pairs that are sorted by p, shape (B,)."""
    pairs = error_BN.shape[1]
    starts = np.cumsum([0, *map(len, np.array_split(np.empty(pairs), bins))])[:-1]
    found: Floats = np.abs(np.add.reduceat(error_BN, starts, axis=1)).sum(axis=1) / pairs
    return found


def _resampled_ece(p_N: Floats, label_N: Floats, bins: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """ECE of resamples of pairs that are sorted by p, and of labels drawn from p itself."""
    pairs = len(p_N)
    drawn, chance = [], []
    rows = max(1, _BLOCK // pairs)
    for at in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - at), pairs)
        places_BN = np.sort(random.integers(0, pairs, shape), axis=1)
        drawn.append(_ece_sorted((p_N - label_N)[places_BN], bins))
        chance.append(_ece_sorted(p_N - (random.random(shape) < p_N), bins))
    return np.concatenate(drawn), np.concatenate(chance)


def reliability(p_N: Floats, label_N: Floats, bins: int = BINS) -> list[dict[str, Any]]:
    """A row for each bin: its range of p, mean p, and the share that was preferred with Wilson's interval."""
    return [
        {
            "low": float(p_N[members].min()),
            "high": float(p_N[members].max()),
            "predicted": float(p_N[members].mean()),
            "observed": wilson(float(label_N[members].sum()), len(members)),
        }
        for members in _bins(p_N, bins)
    ]


def calibration_lines(section: dict[str, Any]) -> list[str]:
    """The section as plain text, with the reliability table."""
    chance = section["ece_by_chance"]
    lines = [
        f"ECE    {shown(section['ece'])} on {section['pairs']} pairs; noise alone gives {chance['value']:.3f}, seldom more than"
        f" {chance['high']:.3f}",
        f"Brier  {shown(section['brier'])}; 0.25 for who always says 0.5",
        "predicted  preferred",
    ]
    return lines + [f"{row['predicted']:9.3f}  {shown(row['observed'])} on {row['observed']['n']}" for row in section["table"]]


def _bins(p_N: Floats, bins: int) -> list[Any]:
    """Places of the pairs of each bin: sorted by p and cut into counts that differ by at most one."""
    return np.array_split(np.argsort(p_N, kind="stable"), bins)


def _joined(value: float, low: float, high: float, n: int) -> Interval:
    """From the lower to the higher of the percentiles and their mirror image at `value`."""
    return {"value": value, "low": max(0.0, min(low, 2 * value - high)), "high": max(high, 2 * value - low), "n": n}


def _sigmoid(x: Floats) -> Floats:
    half: Floats = 0.5 * (1 + np.tanh(x / 2))
    return half
