"""What holds for every loss without a pair and a reference: gradients, signs, weights, order of rows, micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objective.made_rows import DEMONSTRATION, PAIR, group, label, randoms, ranking, responses, said, scored, scores, tokens
from prefopt.core.losses import listwise, reference_free, single, unpaired
from prefopt.core.losses.facts import LossFacts
from prefopt.core.losses.table import loss_facts
from prefopt.data.encode import TokenGroup
from prefopt.objective.apply import Objective, Outcome
from prefopt.objective.measured import Measured, joined

FACTS = [facts for table in (reference_free, unpaired, listwise, single) for facts in table.FACTS]
NAMES = [facts.name for facts in FACTS]
VARIANTS: list[dict[str, Any]] = [{"name": name} for name in NAMES] + [
    {"name": "simpo", "gamma": 0.0},
    {"name": "cpo", "alpha": 0.0},
    {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
    {"name": "all_pairs", "weighting": "gap"},
    {"name": "all_pairs", "weighting": "lambda"},
    {"name": "reward", "centering": 0.0},
    {"dpo": 1.0, "sft": 0.5},
    {"cpo": {"alpha": 0.0}, "sft": 1.0},
    {"kto": 1.0, "sft": 0.1},
    {"plackett_luce": 0.5, "best_of_k": 0.25, "beta": 0.7},
]
EVERY = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
SAMPLE_ROWS = [
    group(PAIR, 2, 3),
    group(label(True), 3),
    group(label(False), 1),
    group(scores(0.25, -3.0, 2.0, 0.25), 1, 2, 1, 2),
    group(ranking(2, 3, 1), 2, 1, 1),
    group(DEMONSTRATION, 4),
    group(replace(PAIR, margin=0.4), 1, 2),
    group(scores(5.0, 1.0), 2, 2),
    group(label(True), 2),
]
KL = 0.3


def parts_of(options: dict[str, Any]) -> list[LossFacts]:
    return [part.facts for part in Objective(options).parts]


def rows_for(options: dict[str, Any]) -> list[TokenGroup]:
    """The sample rows that all parts learn from, without tied scores where an order is needed."""
    facts = parts_of(options)
    return [
        each
        for each in SAMPLE_ROWS
        if all(each.feedback.kind in one.accepts for one in facts)
        and not (any(one.strict_order for one in facts) and len(set(each.feedback.scores)) < len(each.feedback.scores))
    ]


def model_says(options: dict[str, Any], seed: int = 0, scale: float = 1.0) -> Callable[[list[TokenGroup]], Measured]:
    """A made-up model: log-probs and scores by row of SAMPLE_ROWS, whatever the order and number in which they are asked."""
    trains_reward_model = Objective(options).trains_reward_model
    each_of = {id(row): number for number, row in enumerate(SAMPLE_ROWS)}

    def answer(row: TokenGroup, count: int, what: int) -> Tensor:
        return randoms(count, seed=1000 * seed + 10 * each_of[id(row)] + what, scale=scale).detach()

    def model(groups: list[TokenGroup]) -> Measured:
        if trains_reward_model:
            return scored(groups, torch.cat([answer(row, responses([row]), 2) for row in groups]).requires_grad_())
        policy_N = torch.cat([answer(row, tokens([row]), 0) for row in groups]).requires_grad_()
        reference_N = torch.cat([answer(row, tokens([row]), 1) for row in groups])
        return said(groups, policy_N, reference_N, mismatch=KL)

    return model


def whole(options: dict[str, Any], groups: list[TokenGroup], model: Callable[[list[TokenGroup]], Measured]) -> Outcome:
    objective = Objective(options)
    return objective(model(groups), totals=objective.totals(groups), learn=True)


def leaf(heard: Measured) -> Tensor:
    return heard.score_S if heard.score_S is not None else heard.policy_N


@EVERY
def test_gradient_is_the_slope(options: dict[str, Any]) -> None:
    groups = rows_for(options)
    heard = model_says(options)(groups)
    objective = Objective(options)
    objective.load_state({key: {"value": -0.2, "count": 3.0} for key in objective.state()})
    field = "score_S" if objective.trains_reward_model else "policy_N"

    def loss(values: Tensor) -> Tensor:
        return objective(replace(heard, **{field: values}), totals=objective.totals(groups)).loss

    assert torch.autograd.gradcheck(loss, leaf(heard))


@EVERY
def test_a_row_of_weight_2_is_the_row_twice_and_one_of_weight_0_is_none(options: dict[str, Any]) -> None:
    groups = rows_for(options)
    model = model_says(options)
    once = whole(options, groups, model)
    heavy = [replace(groups[0], feedback=replace(groups[0].feedback, weight=2.0)), *groups[1:]]
    nothing = [replace(groups[0], feedback=replace(groups[0].feedback, weight=0.0)), *groups[1:]]
    heard = model(groups)

    def weighted(rows: list[TokenGroup]) -> Outcome:
        objective = Objective(options)
        as_weighted = replace(heard, feedbacks=tuple(row.feedback for row in rows))
        return objective(as_weighted, totals=objective.totals(rows), learn=True)

    assert weighted(heavy).loss.item() == pytest.approx(whole(options, [groups[0], *groups], model).loss.item(), rel=1e-12)
    assert weighted(nothing).loss.item() == pytest.approx(whole(options, groups[1:], model).loss.item(), rel=1e-12)
    assert weighted(heavy).loss.item() != pytest.approx(once.loss.item(), rel=1e-6)


@EVERY
def test_micro_batches_add_up_to_the_step(options: dict[str, Any]) -> None:
    """With the step's totals. A loss that needs the whole step is given it in one piece by `joined`."""
    groups = rows_for(options)
    model = model_says(options)
    objective = Objective(options)
    at_once = objective(model(groups), totals=objective.totals(groups), learn=True)
    pieces = [model(groups[start : start + 2]) for start in range(0, len(groups), 2)]
    if objective.step_wide:
        objective = Objective(options)
        pieces = [joined(pieces)]
    outcomes = [objective(piece, totals=objective.totals(groups), learn=objective.step_wide) for piece in pieces]
    assert sum(outcome.loss.item() for outcome in outcomes) == pytest.approx(at_once.loss.item(), rel=1e-12)
    assert torch.allclose(torch.cat([outcome.loss_G for outcome in outcomes]), at_once.loss_G, rtol=1e-12)
    for name, share in at_once.parts.items():
        assert sum(outcome.parts[name].item() for outcome in outcomes) == pytest.approx(share.item(), rel=1e-12)


@EVERY
def test_the_order_of_the_rows_does_not_matter(options: dict[str, Any]) -> None:
    groups = rows_for(options)
    model = model_says(options)
    straight, turned = whole(options, groups, model), whole(options, groups[::-1], model)
    assert turned.loss.item() == pytest.approx(straight.loss.item(), rel=1e-12)
    assert torch.allclose(turned.loss_G.flip(0), straight.loss_G, rtol=1e-12)


@EVERY
def test_the_loss_is_the_weighted_sum_of_its_parts_and_of_its_groups(options: dict[str, Any]) -> None:
    groups = rows_for(options)
    objective = Objective(options)
    totals = objective.totals(groups)
    outcome = objective(model_says(options)(groups), totals=totals, learn=True)
    assert list(outcome.parts) == [part.facts.name for part in objective.parts]
    summed = sum(part.weight * outcome.parts[part.facts.name].item() for part in objective.parts)
    assert outcome.loss.item() == pytest.approx(summed, rel=1e-12)
    if len(objective.parts) == 1:
        assert outcome.loss_G.sum().item() / totals[0] == pytest.approx(outcome.loss.item(), rel=1e-12)
    assert not any(value.requires_grad for value in (*outcome.parts.values(), outcome.loss_G, outcome.reward_S))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@EVERY
@given(
    seed=st.integers(0, 9), scale=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 30.0, 1e4]), apart=st.sampled_from([0.0, 1e-3, 1e4])
)
@settings(deadline=None, max_examples=15)
def test_loss_and_gradient_stay_finite(
    options: dict[str, Any], dtype: torch.dtype, seed: int, scale: float, apart: float
) -> None:
    """Also of responses that the policy is certain of (log-prob 0), and far from the reference on either side."""
    groups = rows_for(options)
    objective = Objective(options)
    signs = torch.where(torch.arange(responses(groups)) % 2 == seed % 2, apart, 0.0)
    if objective.trains_reward_model:
        values = (randoms(responses(groups), seed, scale).detach() + signs).to(dtype).requires_grad_()
        heard = scored(groups, values)
    else:
        values = randoms(tokens(groups), seed, scale).detach().to(dtype).requires_grad_()
        heard = said(groups, values, mismatch=KL)
        heard = replace(
            heard, reference_N=(randoms(tokens(groups), seed + 100, scale) - signs[heard.response_N]).detach().to(dtype)
        )
    outcome = objective(heard, totals=objective.totals(groups), learn=True)
    outcome.loss.backward()
    assert outcome.loss.isfinite() and values.grad is not None and values.grad.isfinite().all()
    assert outcome.loss.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 5.0]))
@settings(deadline=None, max_examples=25)
def test_the_gradient_raises_the_better_response_and_lowers_the_worse(name: str, seed: int, scale: float) -> None:
    """Best of a group up, worst down; of single responses, desirable up and undesirable down. sft lowers none."""
    options = {"name": name, **({"centering": 0.0} if "centering" in loss_facts(name).knobs else {})}
    groups = rows_for(options)
    heard = model_says(options, seed, scale)(groups)
    objective = Objective(options)
    outcome = objective(heard, totals=objective.totals(groups), learn=True)
    (slope,) = torch.autograd.grad(outcome.loss, leaf(heard))
    slope_S = (
        slope
        if objective.trains_reward_model
        else torch.zeros(responses(groups)).double().index_add(0, heard.response_N, slope)
    )
    rows = heard.rows
    for number, row in enumerate(groups):
        places = rows.order_GK[number][rows.order_GK[number] >= 0]
        best, worst = slope_S[places[0]], slope_S[places[-1]]
        if row.feedback.kind == "label" and not row.feedback.label:
            assert best == 0 if name == "sft" else best > 0
            continue
        assert best < 0
        if len(places) > 1:
            assert worst == 0 if name == "sft" else worst > 0


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name: str) -> None:
    facts = loss_facts(name)
    assert facts.title and facts.formula and facts.since == "0.2" and facts.accepts
    assert "arXiv" in facts.paper
    assert all(len(knob.about) > 10 for knob in facts.knobs.values())
    described = {name for name in facts.knobs if name in facts.formula or name in ("weighting",)}
    assert described | {"desirable_weight", "undesirable_weight"} >= set(facts.knobs), "the formula shows every option"
