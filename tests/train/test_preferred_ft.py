"""Preferred-FT (arXiv 2305.18290, section 6) is `sft` on pairs: training that never looks at the rejected response."""

from __future__ import annotations

import pytest
import torch

from train.tiny_objectives import Models, run
from train.tiny_runs import preference_rows

SFT = {"name": "sft"}
STEPS = {"groups_per_step": 4, "max_steps": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models.made_in(tmp_path_factory.mktemp("preferred-ft"))


def trained(models: Models, rows: list[dict[str, str]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, weights after the last)."""
    training = models.training(SFT, rows, fresh=True, train=STEPS)
    losses = [record.values.total for record in run(training)]
    return losses, training.policy.model.state_dict()


def test_pairs_train_as_their_chosen_responses_do_as_demonstrations(models: Models) -> None:
    """The same steps to the bit, whatever was rejected."""
    pairs = preference_rows(16)
    others = [{**row, "rejected": f"something else, {number}"} for number, row in enumerate(pairs)]
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    (losses, weights), *same = (trained(models, rows) for rows in (pairs, others, chosen))
    assert losses[-1] < losses[0]
    for other_losses, other_weights in same:
        assert other_losses == losses
        assert all(torch.equal(value, weights[name]) for name, value in other_weights.items())


def test_unlikelihood_without_its_second_term_goes_the_same_way(models: Models) -> None:
    """With chosen responses of one length in tokens, where a mean over pairs is one over tokens."""
    lines = [{**row, "chosen": "It is a good one"} for row in preference_rows(8)]
    losses = []
    for section in (SFT, {"name": "unlikelihood", "alpha": 0.0}):
        losses.append([record.values.total for record in run(models.training(section, lines, fresh=True, train=STEPS))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
