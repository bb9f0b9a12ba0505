"""The interval of a share, used wherever a share is shown."""

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
