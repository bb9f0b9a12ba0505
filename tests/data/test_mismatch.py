"""Responses under other prompts: never under their own, every prompt used as often as the others where that can be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.errors import DataError
from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.data.mismatch import mismatched

PROMPTS = st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(lambda prompts: len(set(prompts)) > 1)


def row(place: int, prompt: int) -> TokenGroup:
    """Prompts are told apart by their length alone too: token ids 7, or 7 7, or 7 7 7."""
    response = np.array([place, place], dtype=np.int32)
    feedback = Feedback("label", label=place % 2 == 0, weight=0.5)
    return TokenGroup(
        np.full(prompt + 1, 7, np.int32), (response,), (np.ones(2, np.bool_),), feedback, f"rows:{place}", (False,)
    )


def rows(prompts: list[int]) -> list[TokenGroup]:
    return [row(place, prompt) for place, prompt in enumerate(prompts)]


def givers(found: list[TokenGroup]) -> list[int]:
    return [int(group.source.rsplit(":", 1)[1]) for group in found]


@given(PROMPTS, st.integers(0, 2**31))
@settings(deadline=None)
def test_every_response_is_under_the_prompt_of_the_row_that_is_named(prompts: list[int], seed: int) -> None:
    groups = rows(prompts)
    found = mismatched(groups, seed=seed)
    assert len(found) == len(groups)
    for own, made, giver in zip(groups, found, givers(found), strict=True):
        assert made.prompt_ids is groups[giver].prompt_ids
        assert made.prompt_ids.tolist() != own.prompt_ids.tolist()
        assert made.source == f"{own.source} under the prompt of rows:{giver}"
        assert made.response_ids is own.response_ids and made.scored is own.scored
        assert (made.feedback, made.finished) == (own.feedback, own.finished)


@given(PROMPTS, st.integers(0, 2**31))
@settings(deadline=None)
def test_every_prompt_is_given_once_or_as_nearly_so_as_can_be(prompts: list[int], seed: int) -> None:
    """A prompt of most rows leaves r others, which those rows have to share: each is given floor or ceil of m / r times."""
    given_by = Counter(givers(mismatched(rows(prompts), seed=seed)))
    frequent, most = Counter(prompts).most_common(1)[0]
    others = [place for place, prompt in enumerate(prompts) if prompt != frequent]
    if most <= len(others):
        assert set(given_by.values()) == {1} and len(given_by) == len(prompts)
        return
    assert {given_by[place] for place in others} <= {most // len(others), -(-most // len(others))}
    assert all(given_by[place] <= 1 for place, prompt in enumerate(prompts) if prompt == frequent)


def test_the_seed_alone_decides() -> None:
    groups = rows([0, 1, 2, 3, 4, 5] * 5)
    draws = [givers(mismatched(groups, seed=seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_with_two_rows_each_gets_the_other_prompt() -> None:
    assert givers(mismatched(rows([0, 1]), seed=0)) == [1, 0]


def test_groups_keep_all_their_responses() -> None:
    pair = TokenGroup(
        np.array([1], np.int32),
        (np.array([2], np.int32), np.array([3], np.int32)),
        (np.ones(1, np.bool_), np.ones(1, np.bool_)),
        Feedback("pair"),
        "pairs:1",
    )
    found = mismatched([pair, row(0, 3)], seed=0)
    assert [ids.tolist() for ids in found[0].response_ids] == [[2], [3]]


@pytest.mark.parametrize("frequent", [100, 15_000, 29_000])
def test_many_rows_take_no_longer_than_sorting_them(frequent: int) -> None:
    """30,000 rows, one prompt common to `frequent` of them; in quadratic time this would run for minutes."""
    count = 30_000
    prompts = [np.array([0 if place < frequent else place], dtype=np.int32) for place in range(count)]
    like = row(0, 0)
    groups = [TokenGroup(ids, like.response_ids, like.scored, like.feedback, f"rows:{at}") for at, ids in enumerate(prompts)]
    found = mismatched(groups, seed=1)
    assert all(made.prompt_ids[0] != own.prompt_ids[0] for made, own in zip(found, groups, strict=True))


def test_rows_that_all_have_one_prompt_are_an_error_that_says_what_to_do() -> None:
    for prompts in ([3], [3, 3, 3]):
        with pytest.raises(DataError, match="have the same prompt") as raised:
            mismatched(rows(prompts), seed=0)
        assert "apo_zero_unpaired" in raised.value.todo
    assert mismatched([], seed=0) == []
