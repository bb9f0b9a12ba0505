"""Order and packing: every group once per epoch, the same after a resume, and micro-batches within their budget."""

from __future__ import annotations

import math

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


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(deadline=None)
def test_held_out_rows_are_apart_from_the_others(rows: int, held_out: int, seed: int) -> None:
    train, held = draw_held_out(rows, held_out=held_out, seed=seed)
    assert sorted(train + held) == list(range(rows)) and train == sorted(train) and held == sorted(held)
    assert len(held) == min(rows, held_out)
    assert draw_held_out(rows, held_out=held_out, seed=seed) == (train, held)
