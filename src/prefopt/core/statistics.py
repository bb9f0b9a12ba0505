"""Intervals of shares and of areas under a curve, used wherever one is shown."""

from __future__ import annotations

import math
from collections.abc import Callable

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of `n` (Wilson 1927), within [0, 1]. ValueError unless n >= 1."""
    if n < 1:
        raise ValueError(f"an interval needs at least one observation, found {n}")
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    # at the ends rounding would leave the share outside its interval
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def area_interval(area: float, good: int, bad: int) -> tuple[float, float]:
    """The 95 % interval of an area under the ROC curve from `good` and `bad` observations, within [0, 1].

    Newcombe 2006 (Statistics in Medicine 25, 559), method 5: the areas that the observed one does not contradict, each
    with the variance that Hanley and McNeil's exponential model gives it. Unlike that model's own symmetric interval it
    has a width at 0 and 1. ValueError unless there is one observation of each class.
    """
    if good < 1 or bad < 1:
        raise ValueError(f"an area needs both classes, found {good} good and {bad} bad")
    others = (good + bad) / 2 - 1

    def contradicts(truth: float) -> bool:
        spread = 1 + others * ((1 - truth) / (2 - truth) + truth / (1 + truth))
        return (area - truth) ** 2 > Z_95**2 * truth * (1 - truth) * spread / (good * bad)

    return _boundary(area, 0.0, contradicts), _boundary(area, 1.0, contradicts)


def _boundary(inside: float, outside: float, contradicts: Callable[[float], bool]) -> float:
    """Where `contradicts` begins on the way from `inside` to `outside`, which is itself the boundary if it never does."""
    if not contradicts(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if contradicts(middle) else (middle, outside)
    return inside
