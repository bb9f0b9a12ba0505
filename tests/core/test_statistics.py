"""Intervals of shares and areas: how often they hold the truth, and that they have a width at the ends."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from prefopt.core.statistics import area_interval, wilson


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_interval_of_an_area_holds_the_truth_as_often_as_it_says(shift: float) -> None:
    random = np.random.default_rng(3)
    good, bad = 30, 20
    truth = NormalDist().cdf(shift / 2**0.5)
    held = 0
    for _ in range(2000):
        above = random.normal(shift, 1, good)[:, None] > random.normal(0, 1, bad)[None, :]
        low, high = area_interval(above.mean(), good, bad)
        held += low <= truth <= high
    assert 0.93 <= held / 2000 <= 0.975


@pytest.mark.parametrize(("good", "bad"), [(1, 1), (5, 7), (400, 300)])
def test_an_area_of_1_is_not_certain(good: int, bad: int) -> None:
    low, high = area_interval(1.0, good, bad)
    assert low < 1 and high == 1
    assert area_interval(0.0, good, bad) == pytest.approx((0, 1 - low))


def test_more_observations_make_it_narrower_and_classes_may_change_places() -> None:
    widths = [high - low for low, high in (area_interval(0.7, count, count) for count in (5, 20, 80, 320))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] / widths[3] == pytest.approx(2, rel=0.05)
    assert area_interval(0.7, 30, 10) == area_interval(0.7, 10, 30)


def test_an_area_needs_both_classes_and_a_share_an_observation() -> None:
    for good, bad in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="both classes"):
            area_interval(0.5, good, bad)
    with pytest.raises(ValueError, match="at least one observation"):
        wilson(0.5, 0)
