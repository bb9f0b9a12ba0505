"""Packed scores are transformers' own, whatever lies behind, beside or in front of a response, and survive saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tiny_models import token_group
from model.tiny_reward_models import PAD, SHARED, classifier, groups, plain_scores, reward_model, texts
from prefopt.core.config import LoraConfig, TrainConfig
from prefopt.core.errors import DataError, ModelError
from prefopt.model import attention, layout
from prefopt.model.adapters import add_lora
from prefopt.model.batch import packed_batch, padded_batch
from prefopt.train.optimizer import MasterOptimizer

CPU = torch.device("cpu")
SQUARE, APART = 1e9, 0.0  # costs of a call that force one of the two ways to attend
SHAPES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)), min_size=1, max_size=5
)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_the_last_position_is_that_of_the_last_token_scored_or_not(shapes: list[tuple[int, tuple[int, ...]]]) -> None:
    random = np.random.default_rng(0)
    made = [token_group(random, prompt, responses) for prompt, responses in shapes]
    made = [replace(group, scored=tuple(flags & False for flags in group.scored)) for group in made]
    wanted = [int(ids[-1]) for group in made for ids in group.response_ids]
    positions = [len(group.prompt_ids) + len(ids) - 1 for group in made for ids in group.response_ids]
    for batch in (packed_batch(made, CPU), padded_batch(made, CPU, pad_id=PAD)):
        assert batch.token_ids.reshape(-1)[batch.last_S].tolist() == wanted
        assert batch.position_ids.reshape(-1)[batch.last_S].tolist() == positions


@pytest.mark.parametrize("cost", [SQUARE, APART], ids=["square", "apart"])
@pytest.mark.parametrize("name", SHARED)
def test_packed_scores_are_padded_ones_are_transformers_own(name: str, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CALL_COST", {"cpu": cost})
    model, rows = reward_model(name), groups()
    assert model.sharing
    with torch.no_grad():
        wanted = plain_scores(classifier(name), rows)
        packed, padded = model.scores(packed_batch(rows, CPU)), model.scores(padded_batch(rows, CPU))
    assert wanted.std() > 0.1
    assert packed.dtype == torch.float32 and packed.shape == wanted.shape
    assert (packed - wanted).abs().max() < 1e-4
    assert (padded - wanted).abs().max() < 1e-4


def test_a_decoder_that_cannot_follow_a_packed_layout_is_computed_padded() -> None:
    model, rows = reward_model("bloom"), groups()
    assert model.sharing is False
    with torch.no_grad():
        found = model.scores(model.batch(rows))
        assert (found - plain_scores(classifier("bloom"), rows)).abs().max() < 1e-4


def bradley_terry(scores_S: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(scores_S[0::2] - scores_S[1::2]).sum()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_packed_gradients_are_those_of_transformers_own_forward(name: str, checkpointing: bool) -> None:
    rows = [group for group in groups() if len(group.response_ids) == 2]
    model, theirs = reward_model(name), classifier(name)
    model.model.train()
    model.disable_dropout()
    if checkpointing:
        model.enable_activation_checkpointing()
    loss = bradley_terry(model.scores(packed_batch(rows, CPU)))
    before = attention.calls_in_layout
    loss.backward()
    assert (attention.calls_in_layout > before) is checkpointing
    bradley_terry(plain_scores(theirs, rows)).backward()
    wanted = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in wanted.values())
    for key, parameter in model.model.named_parameters():
        assert (parameter.grad - wanted[key].grad).abs().max() < 1e-4 * largest, key


def test_a_head_of_zeros_scores_zero_and_learns() -> None:
    """The loss starts at ln 2 exactly, and its gradient in the head is -1/2 of the difference of the hidden states."""
    model = reward_model()
    torch.nn.init.zeros_(model.head.weight)
    rows = groups()[:1]
    batch = model.batch(rows)
    scores = model.scores(batch)
    assert scores.tolist() == [0.0, 0.0]
    loss = bradley_terry(scores)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    with torch.no_grad():
        hidden = model.hidden_states(batch)[batch.last_S]
    assert torch.allclose(model.head.weight.grad[0], -(hidden[0] - hidden[1]) / 2, atol=1e-6)
    assert model.head.weight.grad.abs().max() > 0.1


def test_an_unscored_tail_and_a_missing_end_do_not_move_the_place_that_is_read() -> None:
    rows, model = groups(), reward_model()
    silent = [replace(group, scored=tuple(_silent_tail(flags) for flags in group.scored)) for group in rows]
    cut = [
        replace(
            group,
            response_ids=tuple(_cut(ids) for ids in group.response_ids),
            scored=tuple(flags[: len(_cut(flags))] for flags in group.scored),
            finished=(False,) * len(group.response_ids),
        )
        for group in rows
    ]
    scores = {
        name: np.concatenate(model.score_groups(some)) for name, some in (("rows", rows), ("silent", silent), ("cut", cut))
    }
    assert np.array_equal(scores["silent"], scores["rows"])
    with torch.no_grad():
        assert np.abs(scores["cut"] - plain_scores(classifier("llama"), cut).numpy()).max() < 1e-4
    changed = np.array([len(ids) > 3 for group in rows for ids in group.response_ids])
    assert np.abs(scores["cut"] - scores["rows"])[changed].min() > 1e-3


def _silent_tail(flags: np.ndarray) -> np.ndarray:
    return np.append(flags[: len(flags) // 2 + 1], np.zeros(len(flags) - len(flags) // 2 - 1, bool))


def _cut(values: np.ndarray) -> np.ndarray:
    return values[: max(1, len(values) - 3)]


def test_other_responses_to_the_same_prompt_do_not_move_a_score() -> None:
    model, rows = reward_model(), groups()
    together = model.score_groups(rows)
    for group, scores in zip(rows, together, strict=True):
        for number, ids in enumerate(group.response_ids):
            alone = replace(group, response_ids=(ids,), scored=(group.scored[number],), finished=())
            assert abs(model.score_groups([alone])[0][0] - scores[number]) < 1e-5


def test_scores_come_back_in_order_whatever_the_micro_batches() -> None:
    rows = [*groups(0), *groups(1)]
    model = reward_model()
    model.model.train()
    wanted = [model.score_groups([group])[0] for group in rows]
    assert model.model.training
    for budget in (1, 40, 97, 10_000):
        found = model.score_groups(rows, micro_batch_tokens=budget)
        assert [values.shape for values in found] == [(len(group.response_ids),) for group in rows]
        assert all(values.dtype == np.float32 for values in found)
        assert all(np.abs(one - other).max() < 1e-4 for one, other in zip(found, wanted, strict=True))
    assert model.score_groups([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_learns_an_order_from_a_head_of_zeros(dtype: torch.dtype) -> None:
    model = reward_model()
    torch.nn.init.zeros_(model.head.weight)
    model.dtype = dtype
    rows = [group for group in groups() if len(group.response_ids) == 2]
    optimizer = MasterOptimizer(model.model, TrainConfig(lr=3e-3), dtype)
    losses = []
    for _ in range(12):
        loss = bradley_terry(model.scores(model.batch(rows))) / len(rows)
        losses.append(loss.item())
        loss.backward()
        assert optimizer.clip() > 0
        optimizer.step(3e-3)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
    assert optimizer.state().keys() == {
        f"{kind}.{name}" for name in optimizer.masters for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_bf16_scores_are_computed_by_the_head_in_fp32() -> None:
    """Hidden states of a wide model in bf16, head in fp32: as close as they are, and not to 1/128 of the score."""
    model = reward_model().model.to(torch.bfloat16)
    half = type(reward_model())(model, None, name="half", dtype=torch.bfloat16, device=CPU)
    batch = half.batch(groups())
    with torch.no_grad():
        hidden = half.hidden_states(batch)[batch.last_S].double()
        exact = hidden @ half.head.weight.double()[0]
        assert (half.scores(batch) - exact).abs().max() < 1e-5
        assert (half.scores(batch) - half.scores(batch).bfloat16()).abs().max() > 1e-3


@pytest.mark.parametrize("seen", ["neighbours", "the next token"])
def test_packing_that_is_wrong_is_found_while_the_head_is_still_zero(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model()
    torch.nn.init.zeros_(model.head.weight)

    def one_long_row(self: Any, window: int | None, device: torch.device) -> list[layout.Segment]:
        end = self.spans[-1].start + self.spans[-1].tokens
        return [layout.Segment(0, end, ((0, end),), None)]

    if seen == "neighbours":
        monkeypatch.setattr(layout.Layout, "segments", one_long_row)
    else:
        monkeypatch.setattr(layout, "_in_reach", lambda queries, keys, window: queries[:, None] >= keys[None, :] - 1)
    assert model.sharing is False
    assert model.batch(groups()).layout is None


@pytest.mark.parametrize("wrong", ["first token", "scaled", "mean"])
def test_a_classifier_that_reads_elsewhere_is_refused(wrong: str) -> None:
    model = reward_model()
    torch.nn.init.zeros_(model.head.weight)
    change: dict[str, Callable[[Any, Any], Any]] = {
        "first token": lambda layer, given: (given[0][:, :1].expand_as(given[0]),),
        "scaled": lambda layer, given: (given[0] * 1.1,),
        "mean": lambda layer, given: (given[0].mean(dim=1, keepdim=True).expand_as(given[0]),),
    }
    model.head.register_forward_pre_hook(change[wrong])
    with pytest.raises(ModelError, match="differ from transformers' own"):
        _ = model.sharing


def test_a_response_that_ends_with_the_padding_token_is_named() -> None:
    rows = groups()
    ids = rows[2].response_ids[1].copy()
    ids[-1] = PAD
    rows[2] = replace(rows[2], response_ids=(rows[2].response_ids[0], ids, *rows[2].response_ids[2:]))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: a response ends with token 60"):
        reward_model().score_groups(rows)
    assert texts(rows)[4][-1] == PAD


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)])
def test_an_adapter_that_would_freeze_the_head_is_refused(targets: Any) -> None:
    model = reward_model()
    add_lora(model, LoraConfig(r=2, targets=targets))
    with pytest.raises(ModelError, match="freezes the head"):
        model.score_groups(groups())


def test_what_a_reward_model_does_not_have_is_said() -> None:
    model = reward_model()
    with pytest.raises(ModelError, match="it gives scores, and no log-probs"):
        model.score(groups())
    model.model.config.pad_token_id = None
    with pytest.raises(ModelError, match="no pad_token_id"):
        model.score_groups(groups())
    model.model.score = torch.nn.Linear(32, 2)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification has no linear layer with one output"):
        _ = model.head
