"""What holds for every loss of pairs with a reference: gradients, limits, invariances, signs, weights, order of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objective.made_rows import PAIR, group, judged, pairs, randoms, said, tokens
from prefopt.core.losses import pair_variants as variant_facts
from prefopt.core.losses import pairs as pair_facts
from prefopt.core.losses.table import loss_facts
from prefopt.data.encode import TokenGroup
from prefopt.objective.apply import Objective, Outcome
from prefopt.objective.measured import Measured, joined

NAMES = [facts.name for table in (pair_facts, variant_facts) for facts in table.FACTS]
MODIFIED: list[dict[str, Any]] = [
    {"name": "dpo", "label_smoothing": 0.2},
    {"name": "dpo", "ld_alpha": 0.3},
    {"name": "dpo", "divergence": "forward_kl"},
    {"name": "robust", "divergence": "js", "ld_alpha": 0.5},
    {"name": "ipo", "reduce": "sum", "divergence": "alpha", "divergence_alpha": 0.3},
    {"name": "sigmoid_norm", "label_smoothing": 0.1, "ld_alpha": 0.0},
    {"name": "odpo", "scaling": "identity"},
    {"name": "tdpo", "version": "tdpo1"},
    {"name": "aot", "label_smoothing": 0.3},
    {"dpo": 1.0, "apo_zero": 0.5, "aot_unpaired": {"weight": 0.25, "beta": 0.4}},
]
VARIANTS = [{"name": name} for name in NAMES] + MODIFIED
EVERY = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
BY_STEP = ("aot", "aot_unpaired")  # sorted over the step: values of quantiles, no weights of rows


def rows_for(names: Sequence[str]) -> list[TokenGroup]:
    """Pairs of unequal lengths with every column; the last is a tie where all the losses learn from ties."""
    ties = all(loss_facts(name).learns_from_ties for name in names)
    known = replace(PAIR, margin=0.4, probability=0.9)
    return [
        group(known, 2, 3),
        group(replace(known, margin=2.5, probability=0.6), 4, 1),
        group(replace(known, margin=1.0, probability=1.0), 1, 3),
        group(replace(known, margin=3.0, probability=0.25, tie=ties), 2, 2),
    ]


def names_of(options: dict[str, Any]) -> list[str]:
    return [part.facts.name for part in Objective(options).parts]


def heard(groups: list[TokenGroup], seed: int = 0) -> Measured:
    """A made-up model's answer: log-probs of both models, KL and sum of squared probabilities at every token."""
    policy_N, reference_N, log_square_N, negative_kl_N = (randoms(tokens(groups), 10 * seed + place) for place in range(4))
    kl_N = -negative_kl_N.detach()
    return said(groups, policy_N, reference_N.detach(), log_square_N=log_square_N.detach(), kl_N=kl_N.requires_grad_())


def started(options: dict[str, Any]) -> Objective:
    """An objective whose running statistics have seen something."""
    objective = Objective(options)
    objective.load_state({key: {"value": -0.2, "count": 3.0} for key in objective.state()})
    return objective


def slopes(outcome: Outcome, of: Measured) -> Tensor:
    return torch.autograd.grad(outcome.loss, of.policy_N)[0]


@EVERY
def test_gradient_is_the_slope(options: dict[str, Any]) -> None:
    """Of beta_dpo at a beta that does not move: that one is part of the step and has no gradient by design."""
    groups = rows_for(names_of(options))
    model = heard(groups)
    objective = started({**options, "alpha": 0.0} if options.get("name") == "beta_dpo" else options)

    def loss(policy_N: Tensor) -> Tensor:
        return objective(replace(model, policy_N=policy_N), totals=objective.totals(groups)).loss

    assert torch.autograd.gradcheck(loss, model.policy_N)


@EVERY
def test_micro_batches_add_up_to_the_step(options: dict[str, Any]) -> None:
    """With the step's totals. A loss that needs the whole step gets it in one piece, and the slopes are the same."""
    groups = rows_for(names_of(options))
    model, objective = heard(groups), started(options)
    whole = objective(model, totals=objective.totals(groups), learn=True)
    places = torch.split(torch.arange(tokens(groups)), [tokens(groups[:2]), tokens(groups[2:])])
    pieces = [
        said(part, *(values[place] for values in (model.policy_N, model.reference_N)), kl_N=model.kl_N[place])
        for part, place in zip((groups[:2], groups[2:]), places, strict=True)
    ]
    if objective.step_wide:
        pieces = [joined(pieces)]
    objective = started(options)
    outcomes = [objective(piece, totals=objective.totals(groups), learn=objective.step_wide) for piece in pieces]
    assert sum(outcome.loss.item() for outcome in outcomes) == pytest.approx(whole.loss.item(), rel=1e-12)
    found = torch.cat([slopes(outcome, piece) for outcome, piece in zip(outcomes, pieces, strict=True)])
    assert torch.allclose(found, slopes(whole, model), rtol=1e-12)


@EVERY
def test_the_order_of_the_rows_does_not_matter(options: dict[str, Any]) -> None:
    groups = rows_for(names_of(options))
    model, objective = heard(groups), Objective(options)
    straight = objective(model, totals=objective.totals(groups), learn=True)
    order = torch.cat(torch.split(torch.arange(tokens(groups)), [tokens([row]) for row in groups])[::-1])
    turned_model = said(groups[::-1], model.policy_N[order], model.reference_N[order], kl_N=model.kl_N[order])
    turned = Objective(options)(turned_model, totals=objective.totals(groups), learn=True)
    assert turned.loss.item() == pytest.approx(straight.loss.item(), rel=1e-12)
    assert torch.allclose(turned.loss_G.flip(0), straight.loss_G, rtol=1e-12, equal_nan=True)
    assert torch.allclose(slopes(turned, model), slopes(straight, model), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_STEP])
def test_a_row_of_weight_2_is_the_row_twice_and_one_of_weight_0_is_none(name: str) -> None:
    groups = rows_for([name])[:3]
    model, first = heard(groups), tokens(groups[:1])

    def loss(weight: float, copies: int) -> float:
        rows = [replace(groups[0], feedback=replace(groups[0].feedback, weight=weight))] * copies + groups[1:]
        place = torch.cat([torch.arange(first)] * copies + [torch.arange(first, tokens(groups))])
        objective = started({"name": name})
        repeated = said(rows, model.policy_N[place], model.reference_N[place], kl_N=model.kl_N[place])
        return objective(repeated, totals=objective.totals(rows), learn=True).loss.item()

    assert loss(2.0, 1) == pytest.approx(loss(1.0, 2), rel=1e-12)
    assert loss(0.0, 1) == pytest.approx(loss(1.0, 0), rel=1e-12)
    assert loss(2.0, 1) != pytest.approx(loss(1.0, 1), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if "wpo" in loss_facts(name).knobs])
def test_wpo_is_a_weight_of_the_pair_without_a_gradient_of_its_own(name: str) -> None:
    groups = rows_for([name])
    model, objective = heard(groups), started({"name": name, "wpo": True})
    aligned = (model.policy_N - model.log_square_N).detach()
    means = [part.mean() for part in torch.split(aligned, [len(ids) for row in groups for ids in row.response_ids])]
    weights = [math.exp(chosen + rejected) for chosen, rejected in zip(means[::2], means[1::2], strict=True)]
    weighted = [replace(row, feedback=replace(row.feedback, weight=w)) for row, w in zip(groups, weights, strict=True)]
    plain = started({"name": name})
    if name == "beta_dpo":  # whose beta follows the rows' own weights
        plain, objective = started({"name": name, "alpha": 0.0}), started({"name": name, "alpha": 0.0, "wpo": True})
    wanted = plain(replace(model, feedbacks=tuple(row.feedback for row in weighted)), totals=(4.0,))
    found = objective(model, totals=(4.0,))
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    assert torch.allclose(slopes(found, model), slopes(wanted, model), rtol=1e-12)


def pair(name: str, chosen: float, rejected: float, *, learn: bool = False, **options: Any) -> tuple[float, float, float]:
    """(loss, slope in c, slope in r) of one pair with these log-ratios, one token each, margin 1 and probability 0.9."""
    row = {"margin": 1.0, "probability": 0.9, **{key: options.pop(key) for key in ("tie", "probability") if key in options}}
    both_N = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(2, dtype=torch.float64)
    rows = [group(replace(PAIR, **row), 1, 1)]
    outcome = judged({"name": name, **options}, rows, both_N, nothing, kl_N=nothing, learn=learn)
    return outcome.loss.item(), *torch.autograd.grad(outcome.loss, both_N)[0].tolist()


def test_where_policy_is_reference_the_loss_is_known() -> None:
    """ln 2 for every logistic loss of the margin; margin 1 has no logarithm's worth of offset. Others from their formulas
    with c = r = 0: twice ln 2 for two classifiers, 1 for sums of two halves, 1 / (2 beta) squared once or twice."""
    ln_2, e = math.log(2), 1e-3
    logistic = {"dpo", "cdpo", "robust", "sigmoid_norm", "odpo", "dpop", "r_dpo", "beta_dpo", "tdpo", "soft_dpo", *BY_STEP}
    known = dict.fromkeys(logistic, ln_2) | {
        "ipo": 25.0,
        "hinge": 1.0,
        "exo": -ln_2 - 0.5 * math.log(e * (1 - e)),
        "discopop": (ln_2 + 1) / 2,
        "nca": 2 * ln_2,
        "bco_pair": 2 * ln_2,
        "sppo": 50.0,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "cal_dpo": ln_2 + 50.0,
        "rao_kupper": math.log(4),
        "davidson": math.log(4),
    }
    assert known.keys() == set(NAMES)
    for name, wanted in known.items():
        assert pair(name, 0.0, 0.0)[0] == pytest.approx(wanted, rel=1e-12), name


SQUARES = {"ipo": 1 / 4, "sppo": 1 / 2, "cal_dpo": 1 / 2}  # beta^2 times the loss, as beta goes to 0


@pytest.mark.parametrize("name", NAMES)
def test_a_vanishing_beta_leaves_the_loss_where_it_starts(name: str) -> None:
    """Log-ratios stop to matter, but for losses whose target 1 / (2 beta) runs away. discopop at its tau."""
    beta = 1e-9
    loss = pair(name, 3.0, -4.0, beta=beta)[0]
    if name in SQUARES:
        assert beta**2 * loss == pytest.approx(SQUARES[name], abs=1e-7)
    else:
        assert loss == pytest.approx(pair(name, 0.0, 0.0, beta=beta)[0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("cdpo", {"label_smoothing": 0.0}, 1e-14),
        ("robust", {"label_smoothing": 0.0}, 1e-14),
        ("sigmoid_norm", {}, 1e-14),
        ("odpo", {"alpha": 0.0}, 1e-14),
        ("odpo", {}, 1e-14),
        ("dpop", {"penalty": 0.0}, 1e-14),
        ("r_dpo", {"alpha": 0.0}, 1e-14),
        ("beta_dpo", {"alpha": 0.0}, 1e-14),
        ("beta_dpo", {"learn": True}, 1e-14),
        ("tdpo", {"alpha": 0.0}, 1e-14),
        ("tdpo", {"version": "tdpo1"}, 1e-14),
        ("soft_dpo", {"probability": 1.0}, 1e-14),
        ("rao_kupper", {"nu": 1 + 1e-9}, 1e-8),
        ("davidson", {"nu": 1e-9}, 1e-8),
        ("aot", {}, 1e-14),
        ("aot_unpaired", {}, 1e-14),
        ("dpo", {"ld_alpha": 1.0}, 1e-14),
        ("dpo", {"divergence": "alpha", "divergence_alpha": 1 - 1e-9}, 1e-7),
    ],
)
@given(c=st.floats(-20, 20), r=st.floats(-20, 20), beta=st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=20)
def test_limits_that_are_dpo(name: str, options: dict[str, Any], tolerance: float, c: float, r: float, beta: float) -> None:
    """One token a response, margin 1 (offset log 1 = 0), KL 0 at every token, a first step (whose mean margin is M)."""
    assert pair(name, c, r, beta=beta, **options) == pytest.approx(pair("dpo", c, r, beta=beta), rel=tolerance, abs=tolerance)


@given(c=st.floats(-20, 20), r=st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_soft_dpo_with_one_probability_for_all_is_cdpo(c: float, r: float) -> None:
    assert pair("soft_dpo", c, r, probability=0.9) == pytest.approx(pair("cdpo", c, r), rel=1e-12, abs=1e-15)


OF_THE_MARGIN = {
    *("dpo", "cdpo", "robust", "ipo", "hinge", "sigmoid_norm", "exo", "discopop"),
    *("odpo", "r_dpo", "beta_dpo", "tdpo", "soft_dpo", "rao_kupper", "davidson", "aot"),
}
OF_EACH_RESPONSE = {"nca", "bco_pair", "sppo", "apo_zero", "apo_down", "dpop", "cal_dpo", "aot_unpaired"}


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_of_the_prompt_cancels_in_losses_of_the_margin_and_in_no_other(name: str) -> None:
    """The log of the partition function; aot_unpaired compares responses to different prompts, where it does not cancel."""
    assert set(NAMES) == OF_THE_MARGIN | OF_EACH_RESPONSE and not OF_THE_MARGIN & OF_EACH_RESPONSE
    groups = pairs(3)
    rows = [replace(row, feedback=replace(PAIR, margin=2.0, probability=0.8)) for row in groups]
    ratio_S, constant_G = torch.tensor([1.0, -2, 4, 0.5, -3, 2]).double(), torch.tensor([5.0, 0, -7]).double()
    nothing = torch.zeros(6, dtype=torch.float64)
    plain, moved = (
        judged({"name": name, "beta": 0.1}, rows, values.requires_grad_(), nothing, kl_N=nothing).loss.item()
        for values in (ratio_S, ratio_S + constant_G.repeat_interleave(2))
    )
    assert (moved == pytest.approx(plain, rel=1e-12)) is (name in OF_THE_MARGIN)


@pytest.mark.parametrize("name", NAMES)
def test_raising_the_one_counts_like_lowering_the_other(name: str) -> None:
    """loss(c, r) = loss(-r, -c). Not in nca, apo_down and dpop, which look after the chosen response in particular."""
    straight, turned = pair(name, -1.5, -4.0, beta=0.3)[0], pair(name, 4.0, 1.5, beta=0.3)[0]
    assert (straight == pytest.approx(turned, rel=1e-12)) is (name not in ("nca", "apo_down", "dpop"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"label_smoothing": 0.5}),
        ("sigmoid_norm", {"label_smoothing": 0.5}),
        ("exo", {"label_smoothing": 0.5}),
        ("aot", {"label_smoothing": 0.5}),
        ("aot_unpaired", {"label_smoothing": 0.5}),
        ("soft_dpo", {"probability": 0.5}),
        ("rao_kupper", {"tie": True}),
        ("davidson", {"tie": True}),
    ],
)
def test_a_pair_that_says_nothing_is_the_same_both_ways_and_pulls_the_margin_to_0(name: str, options: dict[str, Any]) -> None:
    straight, turned = pair(name, 2.0, -1.0, **options), pair(name, -1.0, 2.0, **options)
    assert straight[0] == pytest.approx(turned[0], rel=1e-12)
    assert straight[1] == pytest.approx(turned[2], rel=1e-12) and straight[1] > 0
    assert pair(name, 1.0, 1.0, **options)[1:] == pytest.approx((0, 0), abs=1e-15)


# (c, r) where the slope in c is above 0, and why.
EXCEPTIONS = {
    "ipo": (9.0, 0.0),  # beyond the target margin 1 / (2 beta) = 5
    "sppo": (6.0, 0.0),  # beyond the target 5 of the chosen response
    "cal_dpo": (6.0, 0.0),  # as sppo's
    "cdpo": (30.0, 0.0),  # beyond log(9) / beta = 22: 10 % of the labels are believed to be flipped
    "soft_dpo": (30.0, 0.0),  # as cdpo's, the row's probability being 0.9
    "exo": (80.0, 0.0),  # beyond log(999) / beta = 69
    "nca": (80.0, 0.0),  # beyond log(2) / beta = 69
    "discopop": (0.0, 0.0),  # the formula that was found is not monotonic around 0
    "apo_down": (1.0, -1.0),  # the chosen response is pushed down as well, the rejected one further
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXCEPTIONS])
@given(c=st.floats(-1e3, 1e3), r=st.floats(-1e3, 1e3), beta=st.floats(1e-3, 2))
@settings(deadline=None, max_examples=40)
def test_the_gradient_raises_chosen_and_lowers_rejected(name: str, c: float, r: float, beta: float) -> None:
    loss, in_chosen, in_rejected = pair(name, c, r, beta=beta)
    assert math.isfinite(loss) and in_chosen <= 0 <= in_rejected


@pytest.mark.parametrize("name", EXCEPTIONS)
@given(r=st.floats(-100, 100))
@settings(deadline=None, max_examples=20)
def test_exceptions_raise_chosen_only_up_to_a_point(name: str, r: float) -> None:
    """And the rejected response of nca and apo_down is lowered everywhere."""
    assert pair(name, *EXCEPTIONS[name])[1] > 0
    if name in ("nca", "apo_down"):
        assert pair(name, EXCEPTIONS[name][0], r)[2] >= 0
    if name not in ("discopop", "apo_down"):
        assert pair(name, 0.0, 0.0)[1] < 0 < pair(name, 0.0, 0.0)[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 9), scale=st.sampled_from([0.0, 1e-8, 1.0, 30.0, 1e4]), apart=st.sampled_from([0.0, 1e-3, 1e4, -1e4])
)
@settings(deadline=None, max_examples=15)
def test_loss_and_gradient_stay_finite(name: str, dtype: torch.dtype, seed: int, scale: float, apart: float) -> None:
    """Also where policy and reference are certain (log-prob 0), and far apart on either side."""
    groups = rows_for([name])
    count = tokens(groups)
    policy_N = randoms(count, seed, scale).detach().to(dtype).requires_grad_()
    reference_N = (randoms(count, seed + 100, scale).detach() - apart * (torch.arange(count) % 2)).to(dtype)
    objective = Objective({"name": name})
    model = said(groups, policy_N, reference_N, kl_N=randoms(count, seed + 1, scale).detach().neg().to(dtype))
    outcome = objective(model, totals=objective.totals(groups), learn=True)
    assert outcome.loss.isfinite() and slopes(outcome, model).isfinite().all()
    assert outcome.loss.dtype == dtype
