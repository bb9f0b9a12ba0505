"""Order and packing: every group once per epoch, the same after a resume, and micro-batches within their budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.pack import draw_held_out, groups_of_step, micro_batches, total_steps


def steps(groups: int, per_step: int, epochs: float, seed: int) -> list[list[int]]:
    count = total_steps(groups, epochs=epochs, groups_per_step=per_step, max_steps=None)
    total = round(groups * epochs)
    return [
        groups_of_step(step, groups=groups, groups_per_step=per_step, total_groups=total, seed=seed) for step in range(count)
    ]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None)
def test_every_group_comes_once_in_every_epoch(groups: int, per_step: int, epochs: int, seed: int) -> None:
    order = [group for step in steps(groups, per_step, epochs, seed) for group in step]
    assert len(order) == groups * epochs
    for epoch in range(epochs):
        assert sorted(order[epoch * groups : (epoch + 1) * groups]) == list(range(groups))


@given(st.integers(1, 40), st.integers(1, 9), st.floats(0.1, 3))
@settings(deadline=None)
def test_no_step_is_empty_and_only_the_last_is_smaller(groups: int, per_step: int, epochs: float) -> None:
    made = steps(groups, per_step, epochs, 0)
    wanted = round(groups * epochs)
    if wanted:
        assert len(made) == math.ceil(wanted / per_step)
        assert all(len(step) == per_step for step in made[:-1]) and 1 <= len(made[-1]) <= per_step
        assert sum(map(len, made)) == wanted


def test_steps_in_any_order_are_those_of_the_unbroken_run() -> None:
    """A resumed run asks for step k first; another number of steps in total does not reorder them."""
    unbroken = steps(37, 5, 3, 7)
    for step in (20, 3, 11):
        assert groups_of_step(step, groups=37, groups_per_step=5, total_groups=111, seed=7) == unbroken[step]
    assert steps(37, 5, 5, 7)[:22] == unbroken[:22]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [tuple(step) for seed in (0, 1) for step in steps(30, 30, 2, seed)]
    assert len(set(orders)) == 4
    assert tuple(range(30)) not in orders


def test_a_number_of_steps_wins_over_epochs_and_goes_round() -> None:
    assert total_steps(10, epochs=1, groups_per_step=4, max_steps=9) == 9
    order = [g for step in range(9) for g in groups_of_step(step, groups=10, groups_per_step=4, total_groups=36, seed=0)]
    assert len(order) == 36 and sorted(order[:10]) == sorted(order[10:20]) == list(range(10))


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
@settings(deadline=None)
def test_micro_batches_hold_every_group_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = micro_batches(lengths, budget_tokens=budget)
    assert sorted(place for members in bins for place in members) == list(range(len(lengths)))
    for members in bins:
        assert members
        assert sum(lengths[place] for place in members) <= budget or len(members) == 1
    loads = sorted(sum(lengths[place] for place in members) for members in bins)
    assert all(a + b > budget for a, b in zip(loads, loads[1:], strict=False)), "two bins that fit together are one"
    assert bins == micro_batches(lengths, budget_tokens=budget)


def test_micro_batches_are_as_even_as_they_come() -> None:
    lengths = [310, 280, 200, 150, 120, 110, 90, 60]
    loads = [sum(lengths[place] for place in members) for members in micro_batches(lengths, budget_tokens=1024)]
    assert len(loads) == 2 and max(loads) - min(loads) <= 60
    assert micro_batches([900, 500, 500, 30], budget_tokens=1000) == [[0, 3], [1, 2]], "an even cut would need 1,030 tokens"


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(deadline=None)
def test_held_out_rows_are_apart_from_the_others(rows: int, held_out: int, seed: int) -> None:
    train, held = draw_held_out(rows, held_out=held_out, seed=seed)
    assert sorted(train + held) == list(range(rows)) and train == sorted(train) and held == sorted(held)
    assert len(held) == min(rows, held_out)
    assert draw_held_out(rows, held_out=held_out, seed=seed) == (train, held)


STRATA = st.lists(st.integers(-1, 2), min_size=1, max_size=60)


def epoch_order(strata: list[int] | None, seed: int, epoch: int = 0, *, groups: int) -> list[int]:
    return groups_of_step(
        epoch, groups=groups, groups_per_step=groups, total_groups=(epoch + 1) * groups, seed=seed, strata=strata
    )


@given(STRATA, st.integers(0, 2**31), st.integers(0, 3))
@settings(deadline=None)
def test_any_places_in_a_row_hold_the_strata_in_their_proportion(strata: list[int], seed: int, epoch: int) -> None:
    """n places hold n * share of a stratum, up to 1 + (K - 2) * share with K strata: at most 1 with two of them."""
    order = epoch_order(strata, seed, epoch, groups=len(strata))
    assert sorted(order) == list(range(len(strata)))
    kinds = set(strata)
    for kind in kinds:
        share = strata.count(kind) / len(strata)
        bound = 1 + (len(kinds) - 2) * share + 1e-9
        before = [0, *itertools.accumulate(strata[group] == kind for group in order)]
        for start, end in itertools.combinations(range(len(before)), 2):
            assert abs(before[end] - before[start] - (end - start) * share) <= bound


@given(STRATA, st.integers(0, 2**31))
@settings(deadline=None)
def test_strata_keep_the_order_of_their_members(strata: list[int], seed: int) -> None:
    """They interleave the order that there is without them; a single stratum changes nothing."""
    count = len(strata)
    free, spread = (epoch_order(given, seed, 1, groups=count) for given in (None, strata))
    for kind in set(strata):
        assert [g for g in spread if strata[g] == kind] == [g for g in free if strata[g] == kind]
    assert epoch_order([5] * count, seed, 1, groups=count) == free


def test_without_strata_the_order_is_a_plain_draw() -> None:
    for seed, epoch in ((0, 0), (7, 0), (7, 3)):
        drawn = np.random.default_rng((seed, epoch)).permutation(50).tolist()
        assert epoch_order(None, seed, epoch, groups=50) == drawn


def test_strata_have_an_order_for_every_seed_and_epoch() -> None:
    strata = [0] * 20 + [1] * 10
    orders = {tuple(epoch_order(strata, seed, epoch, groups=30)) for seed in (0, 1) for epoch in (0, 1)}
    patterns = {tuple(strata[group] for group in order) for order in orders}
    assert len(orders) == 4 and len(patterns) > 1
    again = epoch_order(strata, 1, 1, groups=30)
    assert tuple(again) in orders


def test_every_step_holds_the_classes_of_unbalanced_labels() -> None:
    """900 desirable and 100 undesirable rows in steps of 20: 2 of each step, up to 1; a plain draw has steps with none."""
    strata = [1] * 900 + [0] * 100
    both = []
    for given_strata in (strata, None):
        made = [
            groups_of_step(step, groups=1000, groups_per_step=20, total_groups=1000, seed=0, strata=given_strata)
            for step in range(50)
        ]
        assert sorted(group for step in made for group in step) == list(range(1000))
        both.append([sum(strata[group] == 0 for group in step) for step in made])
    assert min(both[0]) >= 1 and max(both[0]) <= 3
    assert min(both[1]) == 0


def test_strata_of_another_number_of_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 strata for 4 groups"):
        epoch_order([0, 1, 0], 0, groups=4)
