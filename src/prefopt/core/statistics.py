"""Intervals of shares and of areas under a curve, used wherever one is shown."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` (Wilson 1927), within [0, 1]. ValueError unless n > 0."""
    if n < 1:
        raise ValueError(f"an interval needs at least one observation, found {n}")
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    # at the ends rounding would leave the share outside its interval
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def area_interval(area: float, good: int, bad: int) -> tuple[float, float]:
    """The 95 % interval of an area under the ROC curve from `good` and `bad` observations, within [0, 1].

    Standard error of Hanley and McNeil 1982, eq. 2 with their exponential approximation of Q1 and Q2. ValueError unless
    there is one of each.
    """
    if good < 1 or bad < 1:
        raise ValueError(f"an area needs both classes, found {good} good and {bad} bad")
    both_good, both_bad = area / (2 - area), 2 * area * area / (1 + area)
    variance = (area * (1 - area) + (good - 1) * (both_good - area**2) + (bad - 1) * (both_bad - area**2)) / (good * bad)
    half = Z_95 * math.sqrt(max(0.0, variance))
    return max(0.0, area - half), min(1.0, area + half)
