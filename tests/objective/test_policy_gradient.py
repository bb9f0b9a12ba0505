"""Laws of the policy-gradient losses: on the first pass they are REINFORCE, beyond the clip nothing pulls any more."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefopt.objective.policy_gradient import WATCHED, clipped, grpo, ppo, rloo, value_loss

NUMBER = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(logp=st.floats(-8, 0), advantage=NUMBER)
def test_where_the_policy_is_still_the_old_one_the_gradient_is_that_of_reinforce(logp: float, advantage: float) -> None:
    new = doubles(logp).requires_grad_()
    for loss in (grpo, rloo):
        (gradient,) = torch.autograd.grad(loss(new, doubles(logp), doubles(advantage)).sum(), new)
        assert gradient.item() == pytest.approx(-advantage, rel=1e-12)


@given(log_ratio=st.floats(-2, 2), advantage=NUMBER, clip=st.floats(0.05, 0.5))
def test_a_ratio_beyond_the_clip_in_the_wanted_direction_has_no_gradient(
    log_ratio: float, advantage: float, clip: float
) -> None:
    ratio = math.exp(log_ratio)
    moved = doubles(log_ratio).requires_grad_()
    (gradient,) = torch.autograd.grad(clipped(moved, doubles(advantage), clip).sum(), moved)
    outside = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    wanted = 0.0 if outside else -advantage * ratio
    assert gradient.item() == pytest.approx(wanted, abs=1e-12)
    assert clipped(moved, doubles(advantage), clip).item() >= -advantage * ratio - 1e-12  # a pessimistic bound


@given(value=NUMBER, old=NUMBER, target=NUMBER, clip=st.floats(0.05, 1))
def test_the_value_loss_is_never_below_the_plain_squared_error(value: float, old: float, target: float, clip: float) -> None:
    found = value_loss(doubles(value), doubles(old), doubles(target), clip).item()
    near = min(max(value, old - clip), old + clip)
    assert found == pytest.approx(max((value - target) ** 2, (near - target) ** 2) / 2, rel=1e-12)


def test_ppo_is_the_policy_loss_plus_the_weighted_value_loss() -> None:
    logp, old, advantage = doubles(-1.0, -2.0, -0.5), doubles(-1.2, -1.5, -0.5), doubles(1.0, -2.0, 0.3)
    value, old_value, target = doubles(0.1, 0.9, -1.0), doubles(0.0, 0.2, -0.9), doubles(0.5, 0.0, 0.0)
    found = ppo(logp, old, advantage, value, old_value, target, clip=0.1, value_clip=0.3, value_weight=0.7)
    wanted = grpo(logp, old, advantage, clip=0.1) + 0.7 * value_loss(value, old_value, target, 0.3)
    assert torch.equal(found, wanted)


def test_what_is_watched_is_what_the_names_say() -> None:
    of = {
        "logp_N": doubles(math.log(1.5), math.log(0.5), 0.0, math.log(1.1)),
        "old_logp_N": doubles(0.0, 0.0, 0.0, 0.0),
        "advantage_N": doubles(1.0, -1.0, 1.0, 1.0),
        "value_N": doubles(1.0, 0.0, 0.0, 0.0),
        "old_value_N": doubles(0.0, 0.0, 0.0, 0.0),
        "return_N": doubles(2.0, 0.0, 0.0, 0.0),
    }
    seen = WATCHED["ppo"](of, clip=0.2, value_clip=0.2, value_weight=0.1)
    assert seen["policy/clipfrac_avg"].tolist() == [1, 1, 0, 0]
    assert seen["val/clipfrac_avg"].tolist() == [1, 0, 0, 0]
    assert seen["val/ratio"].tolist() == pytest.approx([1.5, 0.5, 1.0, 1.1])
    assert (seen["policy/approxkl_avg"] >= 0).all() and seen["policy/approxkl_avg"][2] == 0
