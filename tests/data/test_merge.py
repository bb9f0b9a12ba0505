"""Groups with one prompt are computed as one: nothing is lost, nothing comes twice, and each asked-for number is found again."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.groups import Feedback
from prefopt.data.merge import merged, merged_batches, prompt_numbers
from prefopt.data.pack import groups_of_step, in_order_of, micro_batches
from prefopt.data.tokens import TokenGroup

ids = st.lists(st.integers(0, 2), min_size=1, max_size=4)
responses = st.lists(st.tuples(ids, st.integers(0, 1)), min_size=1, max_size=4)
rows = st.lists(st.tuples(ids, responses), min_size=1, max_size=12)


def group(prompt: list[int], answers: list[tuple[list[int], int]]) -> TokenGroup:
    """`answers`: tokens, and whether the first of them carries no loss."""
    tokens = tuple(np.array(answer, dtype=np.int32) for answer, _ in answers)
    scored = tuple(np.arange(len(answer)) >= unscored for answer, unscored in answers)
    return TokenGroup(np.array(prompt, dtype=np.int32), tokens, scored, Feedback("demonstration"))


def pieces(groups: list[TokenGroup]) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (one.prompt_ids.tobytes(), tokens.tobytes(), flags.tobytes())
        for one in groups
        for tokens, flags in zip(one.response_ids, one.scored, strict=True)
    ]


@given(rows)
def test_every_response_is_found_again_and_computed_once(
    given_rows: list[tuple[list[int], list[tuple[list[int], int]]]],
) -> None:
    groups = [group(prompt, answers) for prompt, answers in given_rows]
    found = merged(groups)
    asked, unique = pieces(groups), pieces(list(found.groups))
    if found.response_S is None:
        assert unique == asked and found.token_N is None
        assert len({one.prompt_ids.tobytes() for one in groups}) == len(groups)
        return
    assert [unique[at] for at in found.response_S] == asked
    assert len(set(unique)) == len(unique) and len({prompt for prompt, _, _ in unique}) == len(found.groups)
    flat = [(number, place) for number, (_, _, flags) in enumerate(unique) for place in range(sum(flags))]
    wanted = [(int(number), place) for number in found.response_S for place in range(sum(unique[number][2]))]
    assert found.token_N is not None and [flat[at] for at in found.token_N] == wanted


@given(rows, st.integers(1, 30))
def test_micro_batches_hold_every_group_once_within_the_budget(
    given_rows: list[tuple[list[int], list[tuple[list[int], int]]]], budget: int
) -> None:
    groups = [group(prompt, answers) for prompt, answers in given_rows]
    cuts = merged_batches(groups, lambda one: one.unique_tokens, budget_tokens=budget)
    assert sorted(place for cut in cuts for place in cut) == list(range(len(groups)))
    for cut in cuts:
        cost = sum(one.unique_tokens for one in merged([groups[place] for place in cut]).groups)
        assert cost <= budget or len(cut) == 1
    if len({tuple(prompt) for prompt, _ in given_rows}) == len(groups):
        assert cuts == micro_batches([one.unique_tokens for one in groups], budget_tokens=budget)


def test_all_pairs_of_four_responses_cost_a_third() -> None:
    answers = [([number] * 4, 0) for number in range(4)]
    pairs = [group([9], [one, other]) for at, one in enumerate(answers) for other in answers[at + 1 :]]
    (whole,) = merged(pairs).groups
    assert (len(whole.response_ids), whole.unique_tokens, sum(one.unique_tokens for one in pairs)) == (4, 17, 54)
    assert len(merged_batches(pairs, lambda one: one.unique_tokens, budget_tokens=17)) == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 9))
def test_rows_of_a_prompt_follow_each_other_in_every_epoch(prompts: list[int], seed: int) -> None:
    numbers = prompt_numbers([group([prompt], [([1], 0)]) for prompt in prompts])
    assert sorted(set(numbers)) == list(range(len(set(prompts)))) and len(set(zip(prompts, numbers, strict=True))) == len(
        set(prompts)
    )
    count = len(prompts)
    for epoch in range(2):
        places = groups_of_step(epoch, groups=count, groups_per_step=count, total_groups=2 * count, seed=seed, together=numbers)
        assert sorted(places) == list(range(count))
        seen = [prompts[place] for place in places]
        changes = sum(one != other for one, other in zip(seen, seen[1:], strict=False))
        assert changes == len(set(prompts)) - 1


def test_prompts_and_their_rows_come_in_random_order() -> None:
    numbers = np.repeat(np.arange(4), 3)
    orders = {tuple(in_order_of(numbers, np.random.default_rng(seed)).tolist()) for seed in range(200)}
    assert len(orders) > 190
    assert {tuple(np.array(order)[::3] // 3) for order in orders} >= {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert {tuple(place % 3 for place in order[:3]) for order in orders} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)
    }  # fmt: skip
