"""Packing loses no token, keeps positions, and predicts each token from the one before it in its own response."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tiny_models import awkward_groups, language_model, token_group
from prefopt.data.encode import TokenGroup
from prefopt.model.batch import Batch, packed_batch, padded_batch, sum_per_response
from prefopt.model.layout import Layout

CPU = torch.device("cpu")
SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=5
)


def made(shapes: list[tuple[int, tuple[int, ...]]], seed: int) -> list[TokenGroup]:
    random = np.random.default_rng(seed)
    return [token_group(random, prompt, responses) for prompt, responses in shapes]


def scored_tokens(groups: list[TokenGroup]) -> list[list[int]]:
    return [tokens[flags].tolist() for group in groups for tokens, flags in zip(group.response_ids, group.scored, strict=True)]


def targets_of(batch: Batch) -> list[list[int]]:
    return [batch.target_N[batch.response_N == number].tolist() for number in range(batch.responses)]


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packing_keeps_every_token_once_and_its_position(shapes: list[tuple[int, tuple[int, ...]]], seed: int) -> None:
    groups = made(shapes, seed)
    batch = packed_batch(groups, CPU)
    ids, positions = batch.token_ids[0].tolist(), batch.position_ids[0].tolist()
    wanted_ids, wanted_positions, wanted_predictors = [], [], []
    for group in groups:
        prompt = len(group.prompt_ids)
        last_of_prompt = len(wanted_ids) + prompt - 1
        wanted_ids += group.prompt_ids.tolist()
        wanted_positions += range(prompt)
        for tokens, flags in zip(group.response_ids, group.scored, strict=True):
            start = len(wanted_ids)
            places = np.flatnonzero(flags)
            wanted_predictors += [last_of_prompt if place == 0 else start + int(place) - 1 for place in places]
            wanted_ids += tokens.tolist()
            wanted_positions += range(prompt, prompt + len(tokens))
    assert ids == wanted_ids
    assert positions == wanted_positions
    assert batch.predictor_N.tolist() == wanted_predictors
    assert targets_of(batch) == scored_tokens(groups)
    assert batch.responses_per_group == tuple(len(responses) for _, responses in shapes)


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_padded_rows_hold_the_same_predictions(shapes: list[tuple[int, tuple[int, ...]]], seed: int) -> None:
    """Row by row: the token at a predictor's place is the one before the target, as in the packed batch."""
    groups = made(shapes, seed)
    packed, padded = packed_batch(groups, CPU), padded_batch(groups, CPU, pad_id=60)
    assert targets_of(padded) == targets_of(packed) == scored_tokens(groups)
    assert torch.equal(padded.response_N, packed.response_N)
    for name in ("token_ids", "position_ids"):
        flat_packed, flat_padded = getattr(packed, name).reshape(-1), getattr(padded, name).reshape(-1)
        assert torch.equal(flat_packed[packed.predictor_N], flat_padded[padded.predictor_N])
    assert torch.equal(padded.token_ids.reshape(-1)[padded.predictor_N + 1], padded.target_N)


@given(SHAPES, st.sampled_from([None, 1, 3, 100]), st.sampled_from([0.0, 40.0, 1e9]))
@settings(max_examples=60, deadline=None)
def test_segments_cover_each_query_once_and_allow_exactly_prompt_and_self(
    shapes: list[tuple[int, tuple[int, ...]]], window: int | None, cost: float
) -> None:
    """Against the definition: same group, key in the prompt or in the same response, not after, not beyond the window."""
    batch = packed_batch(made(shapes, 0), CPU)
    owner, group_of, position = [], [], batch.position_ids[0]
    for number, (prompt, responses) in enumerate(shapes):
        for part, length in enumerate((prompt, *responses)):
            owner += [part] * length
            group_of += [number] * length
    owner_T, group_T = torch.tensor(owner), torch.tensor(group_of)
    distance = position[:, None] - position[None, :]
    wanted = (group_T[:, None] == group_T[None, :]) & (distance >= 0)
    wanted &= (owner_T[:, None] == owner_T[None, :]) | (owner_T[None, :] == 0)
    if window is not None:
        wanted &= distance < window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.model.layout._CALL_COST", {"cpu": cost})
        assert batch.layout is not None
        segments = Layout(batch.layout.spans).segments(window, CPU)
    found = torch.zeros_like(wanted)
    assert [q for s in segments for q in range(s.query_start, s.query_end)] == list(range(len(owner)))
    for segment in segments:
        keys = torch.cat([torch.arange(start, end) for start, end in segment.keys])
        queries = segment.query_end - segment.query_start
        mask = segment.mask if segment.mask is not None else torch.ones(queries, len(keys), dtype=torch.bool).tril()
        found[segment.query_start : segment.query_end, keys] |= mask
    assert torch.equal(found, wanted)


def test_sum_per_response_is_the_sum_of_each() -> None:
    groups = awkward_groups()
    batch = packed_batch(groups, CPU)
    values = torch.randn(len(batch.target_N), generator=torch.Generator().manual_seed(0))
    wanted = [float(values[batch.response_N == number].sum()) for number in range(batch.responses)]
    assert sum_per_response(values, batch).tolist() == pytest.approx(wanted, abs=1e-5)
    flags = [flags.copy() for flags in groups[0].scored]
    flags[0][:] = False
    silent = TokenGroup(groups[0].prompt_ids, groups[0].response_ids, tuple(flags), groups[0].feedback)
    batch = packed_batch([silent], CPU)
    assert sum_per_response(torch.ones(len(batch.target_N)), batch).tolist() == [0.0, float(flags[1].sum())]


def test_scores_do_not_depend_on_micro_batches_and_come_back_in_order() -> None:
    groups = [*awkward_groups(0), *awkward_groups(1)]
    model = language_model()
    alone = [model.score([group])[0] for group in groups]
    for budget in (1, 40, 97, 10_000):
        together = model.score(groups, micro_batch_tokens=budget)
        assert len(together) == len(groups)
        for group, one, other in zip(groups, alone, together, strict=True):
            assert [len(values) for values in other] == [int(flags.sum()) for flags in group.scored]
            for first, second in zip(one, other, strict=True):
                assert second.dtype == np.float32
                assert np.abs(first - second).max() < 1e-4
    backwards = model.score(groups[::-1], micro_batch_tokens=97)[::-1]
    assert all(np.allclose(a, b, atol=1e-4) for x, y in zip(alone, backwards, strict=True) for a, b in zip(x, y, strict=True))


def test_scoring_leaves_the_mode_of_the_model_alone() -> None:
    model = language_model()
    for mode in (True, False):
        model.model.train(mode)
        model.score(awkward_groups()[:1])
        assert model.model.training is mode
    assert model.score([]) == []
