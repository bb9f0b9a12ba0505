"""95 % confidence intervals, as {"value", "low", "high", "n"}."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from prefopt.core.statistics import Z_95
from prefopt.core.statistics import wilson as wilson_interval

Floats = NDArray[np.float64]
_NORMAL = NormalDist()
_BLOCK = 1 << 20  # numbers drawn at a time


class Interval(TypedDict):
    """A value with its 95 % interval; `n` is the number of independent observations behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927). `successes` may hold halves, for ties.

    With halves it is conservative: n observations in [0, 1] vary at most as much as n of 0 or 1 with the same mean.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    low, high = wilson_interval(successes / n, n)
    return {"value": successes / n, "low": low, "high": high, "n": n}


def tied_wilson(values: Sequence[float] | Floats) -> Interval:
    """Wilson's interval of the mean of independent values in [0, 1], narrowed where they are not all 0 or 1.

    Values that vary less than wins and losses with the same mean p count for more observations: n p (1 - p) / variance, at
    least n. With wins and losses alone it is `wilson`; where all values are equal too, for they say nothing of their spread.
    """
    observed = np.asarray(values, dtype=np.float64)
    n, mean = len(observed), min(1.0, float(observed.mean()))
    if n < 2 or np.ptp(observed) == 0:
        return wilson(mean * n, n)
    low, high = wilson_interval(mean, max(n, n * mean * (1 - mean) / float(observed.var(ddof=1))))
    return {"value": mean, "low": low, "high": high, "n": n}


def bootstrap_mean(values: Sequence[float] | Floats, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Interval of a mean by the BCa bootstrap (Efron 1987): percentiles corrected for bias and skewness.

    `values` are independent observations: average what belongs together first. With a single observation, or equal
    ones, there is no spread to learn from and low = value = high.
    """
    observed = np.asarray(values, dtype=np.float64)
    if observed.ndim != 1 or not len(observed) or not np.isfinite(observed).all():
        raise ValueError(f"the bootstrap needs finite numbers in one dimension, found shape {observed.shape}")
    n, mean = len(observed), float(observed.mean())
    spread = observed - mean
    if n == 1 or np.ptp(observed) == 0:
        return {"value": mean, "low": mean, "high": mean, "n": n}
    means = _resampled_means(observed, np.random.default_rng(seed), resamples)
    acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))  # the jackknife's, in closed form for a mean
    bias = _bias(means, mean)
    low, high = (_corrected(z, bias, acceleration) for z in (-Z_95, Z_95))
    return {"value": mean, "low": float(np.quantile(means, low)), "high": float(np.quantile(means, high)), "n": n}


def paired_difference(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Interval of mean(a - b), where a[i] and b[i] belong to the same prompt."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values have one length, found {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, seed=seed, resamples=resamples)


def cluster_means(values: Sequence[float] | Floats, clusters: Sequence[int]) -> Floats:
    """Mean of `values` within each cluster, in the order of the cluster's number (0, 1, 2 ...)."""
    numbers = np.asarray(clusters, dtype=np.int64)
    return np.bincount(numbers, weights=np.asarray(values, dtype=np.float64)) / np.bincount(numbers)


def resampled_counts(n: int, resamples: int, *, seed: int = 0, width: int = 0) -> Iterator[Floats]:
    """How often each of `n` observations is in each resample, in blocks (B, n) of some resamples.

    `width`: columns of what is made of a block, where that is more than n.
    """
    random = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(n, width, 1))
    for at in range(0, resamples, rows):
        block = min(rows, resamples - at)
        drawn = random.integers(0, n, size=(block, n)) + n * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n).astype(np.float64)


def resampled_interval(value: float, drawn: Floats, n: int) -> Interval:
    """The interval of `value` from its values `drawn` on resamples: percentiles corrected for bias (Efron 1981).

    Without those that are not finite; NaN where none is. `n` is the number of independent observations.
    """
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return {"value": value, "low": math.nan, "high": math.nan, "n": n}
    bias = _bias(finite, value)
    low, high = (float(np.quantile(finite, _corrected(z, bias, 0.0))) for z in (-Z_95, Z_95))
    return {"value": value, "low": min(low, value), "high": max(high, value), "n": n}


def _resampled_means(observed: Floats, random: np.random.Generator, resamples: int) -> Floats:
    n = len(observed)
    rows = max(1, _BLOCK // n)
    blocks = [
        observed[random.integers(0, n, size=(min(rows, resamples - at), n))].mean(axis=1) for at in range(0, resamples, rows)
    ]
    return np.concatenate(blocks)


def _bias(drawn: Floats, value: float) -> float:
    """The normal quantile of the share of `drawn` below `value`; 0 where half of them are."""
    below = float((drawn < value).mean() + (drawn == value).mean() / 2)
    return _NORMAL.inv_cdf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))


def _corrected(z: float, bias: float, acceleration: float) -> float:
    shifted = bias + z
    return _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))
