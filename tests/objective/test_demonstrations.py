"""Imitation: what counts, and what it is divided by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from objective.made_rows import DEMONSTRATION, PAIR, group, judged, label, ranking, said, scores, values
from prefopt.objective.apply import Objective

SFT = {"name": "sft"}


def test_it_is_the_cross_entropy_over_the_tokens_of_all_demonstrations() -> None:
    logits_NV = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids_N = torch.tensor([3, 0, 10, 5, 5, 1, 7])
    policy_N = logits_NV.log_softmax(1)[torch.arange(7), ids_N]
    ours = judged(SFT, [group(DEMONSTRATION, 2), group(DEMONSTRATION, 5)], policy_N).loss
    wanted = F.cross_entropy(logits_NV, ids_N)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-14)
    (mine,), (theirs,) = torch.autograd.grad(ours, logits_NV, retain_graph=True), torch.autograd.grad(wanted, logits_NV)
    assert torch.allclose(mine, theirs, rtol=1e-12)


def test_the_best_response_of_every_kind_of_row_is_imitated() -> None:
    """Chosen, rank 1, the highest score, the first of equally high ones, a desirable one; not the others."""
    rows = [
        group(PAIR, 1, 1),
        group(ranking(3, 1, 2), 1, 1, 1),
        group(scores(0.5, 2.0), 1, 1),
        group(scores(4.0, 4.0), 1, 1),
        group(label(True), 1),
        group(label(False), 1),
        group(replace(PAIR, tie=True), 1, 1),
    ]
    policy_N = values(*[-1.0] * 13)
    outcome = judged(SFT, rows, policy_N)
    outcome.loss.backward()
    imitated = [1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0]
    assert policy_N.grad.tolist() == pytest.approx([-share / 5 for share in imitated])
    assert outcome.loss_G.tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_every_token_counts_the_same_and_the_weight_of_its_row() -> None:
    """Rows of 1 and 3 tokens with weights 3 and 1: (3 * 2 + 1 + 1 + 1) / (3 * 1 + 1 * 3)."""
    rows = [group(DEMONSTRATION, 1, weight=3.0), group(DEMONSTRATION, 3)]
    outcome = judged(SFT, rows, values(-2.0, -1.0, -1.0, -1.0))
    assert outcome.loss.item() == pytest.approx(9 / 6)


def test_tokens_that_carry_no_loss_are_not_counted() -> None:
    row = group(DEMONSTRATION, 4)
    user_turn_inside = replace(row, scored=(row.scored[0] & [True, False, False, True],))
    assert Objective(SFT).totals([user_turn_inside]) == (2.0,)


def test_a_step_with_nothing_to_imitate_has_no_loss() -> None:
    rows = [group(label(False), 2)]
    policy_N = values(-1.0, -2.0)
    outcome = judged(SFT, rows, policy_N)
    outcome.loss.backward()
    assert outcome.loss.item() == 0.0 and policy_N.grad.tolist() == [0.0, 0.0]


def test_it_has_no_reward_and_no_reference() -> None:
    objective = Objective(SFT)
    outcome = objective(said([group(DEMONSTRATION, 1)], values(-1.0)), totals=(1.0,))
    assert not objective.needs_reference and objective.rewarding is None
    assert outcome.reward_S.isnan().all() and outcome.ratio_S.isnan().all()
    assert outcome.logp_S.tolist() == [-1.0]
