"""Weighted sums of losses: value and gradient, what belongs to which part, and what an objective as a whole needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from objective.made_rows import PAIR, group, judged, label, pairs, ranking, values
from prefopt.objective.apply import Objective

PAIRS = [group(PAIR, 2, 1), group(replace(PAIR, margin=1.0), 1, 3, weight=2.0)]
LABELS = [group(label(True), 2), group(label(False), 3), group(label(True), 1)]
POLICY = (-1.0, -0.5, -2.0, -0.3, -1.5, -0.2, -0.9)
REFERENCE = (-1.2, -0.4, -1.0, -0.8, -1.4, -0.6, -1.1)


def both(options: dict[str, Any], rows: Any) -> tuple[float, torch.Tensor]:
    """(loss, gradient)."""
    count = sum(len(ids) for row in rows for ids in row.response_ids)
    policy_N = values(*POLICY[:count])
    loss = judged(options, rows, policy_N, values(*REFERENCE[:count]).detach(), mismatch=0.2, learn=True).loss
    return loss.item(), torch.autograd.grad(loss, policy_N)[0]


@pytest.mark.parametrize(
    ("mix", "apart", "rows"),
    [
        ({"dpo": 1.0, "sft": 0.2}, [(1.0, {"name": "dpo"}), (0.2, {"name": "sft"})], PAIRS),
        (
            {"dpo": {"weight": 0.5, "beta": 0.4}, "orpo": 3.0, "beta": 0.7},
            [(0.5, {"name": "dpo", "beta": 0.4}), (3.0, {"name": "orpo", "beta": 0.7})],
            PAIRS,
        ),
        (
            {"kto": 1.0, "bco": 2.0, "sft": 0.1},
            [(1.0, {"name": "kto"}), (2.0, {"name": "bco"}), (0.1, {"name": "sft"})],
            LABELS,
        ),
        ({"simpo": 0.25}, [(0.25, {"name": "simpo"})], PAIRS),
        (
            {"plackett_luce": 1.0, "all_pairs": {"weighting": "gap"}},
            [(1.0, {"name": "plackett_luce"}), (1.0, {"name": "all_pairs", "weighting": "gap"})],
            [group(ranking(2, 1, 3), 2, 1, 2)],
        ),
    ],
    ids=str,
)
def test_a_mix_is_the_weighted_sum_of_its_losses(mix: dict[str, Any], apart: list[Any], rows: list[Any]) -> None:
    """Each divided by its own total: groups, responses or tokens."""
    loss, gradient = both(mix, rows)
    each = [(weight, *both(options, rows)) for weight, options in apart]
    assert loss == pytest.approx(sum(weight * one for weight, one, _ in each), rel=1e-12)
    assert torch.allclose(gradient, sum(weight * one for weight, _, one in each), rtol=1e-12)


def test_parts_are_reported_by_name_without_their_weights() -> None:
    count = 7
    policy_N, reference_N = values(*POLICY[:count]), values(*REFERENCE[:count])
    mixed = judged({"dpo": 2.0, "sft": 0.1}, PAIRS, policy_N, reference_N)
    assert list(mixed.parts) == ["dpo", "sft"]
    for name, share in mixed.parts.items():
        assert share == judged({"name": name}, PAIRS, policy_N, reference_N).loss
        assert not share.requires_grad


def test_of_label_rows_sft_imitates_the_desirable_ones_alone() -> None:
    """kto lowers the undesirable response, sft leaves it alone and does not count its tokens."""
    policy_N, reference_N = values(*POLICY[:6]), values(*REFERENCE[:6])
    outcome = judged({"kto": 1e-9, "sft": 1.0}, LABELS, policy_N, reference_N, mismatch=0.0)
    outcome.loss.backward()
    assert outcome.parts["sft"].item() == pytest.approx((1.0 + 0.5 + 0.2) / 3)
    assert policy_N.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0, 0, 0, -1 / 3], abs=1e-8)


def test_rewards_are_those_of_the_first_part_that_has_some() -> None:
    """sft has none, so beta and the log-ratio are dpo's; with simpo first they are mean log-probs."""
    policy_N, reference_N = values(*POLICY), values(*REFERENCE)
    imitating = judged({"sft": 1.0, "dpo": {"beta": 0.5}}, PAIRS, policy_N, reference_N)
    assert torch.allclose(imitating.reward_S, 0.5 * imitating.ratio_S)
    assert Objective({"sft": 1.0, "dpo": {"beta": 0.5}}).beta == 0.5
    length = judged({"simpo": 1.0, "dpo": 1.0}, PAIRS, policy_N, reference_N)
    assert torch.allclose(length.reward_S, 2.0 * length.logp_S / length.tokens_S)
    assert length.ratio_S.isfinite().all()


def test_an_objective_needs_what_any_of_its_parts_needs() -> None:
    free, mixed = Objective({"simpo": 1.0, "sft": 1.0}), Objective({"simpo": 1.0, "bco": 1.0})
    assert not free.needs_reference and not free.step_wide and not free.needs_mismatched
    assert mixed.needs_reference and mixed.step_wide
    assert Objective({"kto": 1.0, "sft": 0.1}).needs_mismatched
    assert mixed.name == "simpo + bco"
    assert mixed.described() == {"simpo": {"weight": 1.0, "beta": 2.0, "gamma": 1.0}, "bco": {"weight": 1.0, "beta": 0.1}}


def test_every_part_has_its_own_total() -> None:
    """Weights 1 and 2: two pairs are 3 groups, 6 responses, and 1 * 2 + 2 * 1 imitated tokens."""
    assert Objective({"dpo": 1.0, "bco": 1.0, "sft": 1.0}).totals(PAIRS) == (3.0, 6.0, 4.0)


def test_a_weight_scales_the_loss_and_leaves_the_report_alone() -> None:
    policy_N, reference_N = values(-1.0, -2.0), values(-1.5, -1.5)
    plain = judged({"name": "dpo"}, pairs(1), policy_N, reference_N)
    double = judged({"dpo": 2.0}, pairs(1), policy_N, reference_N)
    assert double.loss == 2 * plain.loss and double.parts == plain.parts
    assert torch.equal(double.loss_G, 2 * plain.loss_G)
