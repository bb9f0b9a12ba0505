"""What holds of a step of every loss, on every kind of rows it takes, from rows to gradients: how it is cut, weights, descent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from prefopt.core.losses.table import LOSSES, resolve_parts
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup
from prefopt.data.merge import Merged, merged
from prefopt.model import engine
from prefopt.objective.apply import Objective
from prefopt.train import gradients
from train.rows_of_kinds import SINGLE, VARIANTS, Row, rows_for, title
from train.tiny_objectives import Models, assert_same_gradients, run, step_of

pytestmark = pytest.mark.slow

ALL = [*SINGLE, *VARIANTS]
CASES = pytest.mark.parametrize(("section", "kind"), ALL, ids=title)


def compares_distributions(section: Row) -> bool:
    """Whether a part of the loss refuses rows of different weights."""
    return any(part.facts.unit == "step" for part in resolve_parts(section))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models.made_in(tmp_path_factory.mktemp("objectives"))


def assert_same_values(first: Any, second: Any) -> None:
    """Loss, parts and running statistics of two steps."""
    assert first.total == pytest.approx(second.total, rel=1e-5, abs=1e-6)
    assert first.parts == pytest.approx(second.parts, rel=1e-5, abs=1e-6)
    assert first.statistics == pytest.approx(second.statistics, rel=1e-4, abs=1e-5)


def reweighted(group: TokenGroup, weight: float) -> TokenGroup:
    """The group, and what is mismatched of it, with another weight of its row."""
    feedback = replace(group.feedback, weight=weight)
    other = group.mismatched and replace(group.mismatched, feedback=feedback)
    return replace(group, feedback=feedback, mismatched=other)


def test_every_loss_of_the_table_is_here() -> None:
    of_rows = {name for name, facts in LOSSES.items() if not facts.needs_samples}  # of samples: test_online
    assert {section["name"] for section, _ in SINGLE} == of_rows
    step_wide = [section for section, _ in VARIANTS if any(part.facts.step_wide for part in resolve_parts(section))]
    assert len(step_wide) >= 3


@CASES
def test_a_step_is_the_same_in_one_micro_batch_and_in_many(models: Models, section: Row, kind: str) -> None:
    """Where a loss carries something from step to step, two in a row."""
    rows = rows_for(section, kind)
    whole, cut = (models.training(section, rows, train={"micro_batch_tokens": tokens}) for tokens in (4096, 16))
    for step in range(2 if whole.objective.state() else 1):
        groups = whole.groups_of(step)
        (ours, one), (theirs, many) = step_of(whole, groups), step_of(cut, groups)
        assert_same_values(ours, theirs)
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(ours.reward, theirs.reward, rtol=1e-4, atol=1e-4)
        assert_same_gradients(one, many)


@CASES
def test_rows_with_one_prompt_are_as_if_each_were_computed_alone(
    models: Models, section: Row, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_for(section, kind)
    shared = [{**row, "prompt": rows[place - place % 3]["prompt"]} for place, row in enumerate(rows)]
    first, second = (models.training(section, shared) for _ in range(2))
    groups = [first.groups[place] for place in range(min(8, len(first.groups)))]
    # the order of equal responses, by which lambda weighs, is one of rounding where each is computed
    groups = [one for one in groups if len({ids.tobytes() for ids in one.response_ids}) == len(one.response_ids)]
    assert merged(groups).response_S is not None
    ours, one = step_of(first, groups)
    for module in (gradients, engine):
        monkeypatch.setattr(module, "merged", lambda groups: Merged(tuple(groups), None))
    theirs, other = step_of(second, groups)
    assert_same_values(ours, theirs)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(ours.logp, theirs.logp, rtol=1e-5, atol=1e-4)
    assert_same_gradients(one, other)


@pytest.mark.parametrize(("section", "kind"), [case for case in ALL if not compares_distributions(case[0])], ids=title)
def test_weight_2_is_the_row_twice_and_weight_0_no_row(models: Models, section: Row, kind: str) -> None:
    first, second = (models.training(section, rows_for(section, kind)) for _ in range(2))
    some = first.groups_of(0)
    weighted = [reweighted(group, (2.0, 0.0, 1.0)[place % 3]) for place, group in enumerate(some)]
    repeated = [group for place, group in enumerate(some) for _ in range((2, 0, 1)[place % 3])]
    (ours, one), (theirs, other) = step_of(first, weighted), step_of(second, repeated)
    assert_same_values(ours, theirs)
    assert_same_gradients(one, other)


@pytest.mark.parametrize(("section", "kind"), SINGLE, ids=title)
def test_every_loss_falls_on_the_rows_that_it_learns_from(models: Models, section: Row, kind: str) -> None:
    """All rows in every step, from a policy that is its reference."""
    train = {"groups_per_step": 5, "max_steps": 4, "lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0}
    training = models.training(section, rows_for(section, kind, 5), fresh=True, train=train)
    totals = [record.values.total for record in run(training)]
    assert totals[-1] < totals[0] - 1e-4 * abs(totals[0]), totals


@CASES
def test_the_saved_configuration_is_the_same_objective(models: Models, section: Row, kind: str) -> None:
    config = models.config(section)
    again = resolve_config(config.resolved())
    assert again.resolved() == config.resolved()
    described = Objective(config.loss.resolved()).described()
    assert described == Objective(again.loss.resolved()).described() == Objective(section).described()
