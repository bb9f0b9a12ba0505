"""The unlikelihood baseline and Preferred-FT: closed forms, digits near certainty, gradients in the logits, limits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objective.made_rows import DEMONSTRATION, PAIR, group, judged, pairs, randoms, values
from prefopt.core.losses.table import loss_facts
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.objective.apply import Objective
from prefopt.objective.reference_free import log_complement, unlikelihood

LOGPS = st.floats(-30, -0.001).map(lambda value: round(value, 6))
ALPHAS = st.floats(0, 1).map(lambda value: round(value, 6))


def test_value_by_hand() -> None:
    """chosen: p = 1/2 and 1/8, so -mean log p = 2 ln 2. rejected: 1 - p = 1/2, 3/4, 1/4: mean log is ln(3/32) / 3."""
    rows = [group(PAIR, 2, 3)]
    policy_N = values(*(math.log(p) for p in (1 / 2, 1 / 8, 1 / 2, 1 / 4, 3 / 4)))
    outcome = judged({"name": "unlikelihood", "alpha": 0.3}, rows, policy_N)
    assert outcome.loss.item() == pytest.approx(2 * math.log(2) - 0.3 * math.log(3 / 32) / 3, abs=1e-14)
    assert outcome.reward_S.tolist() == pytest.approx([-2 * math.log(2), math.log(3 / 32) / 3], abs=1e-14)
    assert outcome.ratio_S.isnan().all(), "there is no reference"


@given(LOGPS, LOGPS, ALPHAS, st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None)
def test_gradient_in_the_log_probs(c: float, r: float, alpha: float, chosen_tokens: int, rejected_tokens: int) -> None:
    """-1 / tokens for a token of chosen; alpha p / (1 - p) / tokens for one of rejected."""
    policy_N = values(*[c] * chosen_tokens, *[r] * rejected_tokens)
    outcome = judged({"name": "unlikelihood", "alpha": alpha}, [group(PAIR, chosen_tokens, rejected_tokens)], policy_N)
    outcome.loss.backward()
    odds = math.exp(r) / -math.expm1(r)
    wanted = [-1 / chosen_tokens] * chosen_tokens + [alpha * odds / rejected_tokens] * rejected_tokens
    assert policy_N.grad.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_gradient_against_finite_differences() -> None:
    rows = [group(PAIR, 2, 3), group(PAIR, 1, 4, weight=2.0)]
    objective = {"name": "unlikelihood", "alpha": 0.7}
    assert torch.autograd.gradcheck(lambda policy_N: judged(objective, rows, policy_N).loss, (randoms(10),))


@pytest.mark.parametrize("logp", [-1e-15, -1e-9, -1e-4, -0.3, -0.6931, -0.6932, -1.0, -20.0, -60.0, -700.0, -1e5])
def test_log_complement_keeps_its_digits(logp: float) -> None:
    """Against 400 digits, on both sides of p = 1/2 and at either end."""
    with localcontext() as context:
        context.prec = 400
        p = Decimal(logp).exp()
        wanted, slope = float((1 - p).ln()), float(-p / (1 - p))
    at = values(logp)
    found = log_complement(at)
    found.backward()
    assert found.item() == pytest.approx(wanted, rel=1e-14, abs=0)
    assert at.grad.item() == pytest.approx(slope, rel=1e-12, abs=0)


def test_certainty_counts_as_1_minus_eps_and_has_no_slope() -> None:
    for dtype in (torch.float32, torch.float64):
        certain = torch.tensor([0.0, 1e-7], dtype=dtype, requires_grad=True)  # rounding can leave a log-prob above 0
        found = log_complement(certain)
        found.sum().backward()
        assert found.tolist() == pytest.approx([math.log(torch.finfo(dtype).eps)] * 2, rel=1e-6)
        assert certain.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("logit", [-30.0, -3.0, 0.0, 3.0, 10.0, 14.0])
def test_the_push_on_a_logit_is_p_however_sure_the_model_is(logit: float) -> None:
    """d/dz [-log(1 - softmax(z)_y)] = p_y at y, and -p_y p_j / (1 - p_y) elsewhere: at most 1, in fp32 too."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        z_V = torch.tensor([logit, 0.0, -1.0], dtype=dtype, requires_grad=True)
        (-log_complement(z_V.log_softmax(0)[0])).backward()
        found[dtype] = z_V.grad.double()
    p_V = torch.tensor([logit, 0.0, -1.0], dtype=torch.float64).softmax(0)
    wanted = torch.stack([p_V[0], *(-p_V[0] * p_V[1:] / p_V[1:].sum())])
    assert torch.allclose(found[torch.float64], wanted, rtol=1e-8)
    rounding = 2e-7 / float(p_V[1:].sum())  # of 1 - p, relative, where p is within some eps of 1
    assert torch.allclose(found[torch.float32], wanted, rtol=1e-5 + 4 * rounding)


def test_a_certain_rejected_token_leaves_loss_and_gradient_finite() -> None:
    policy_N = torch.tensor([-0.5, 0.0, -1e-9, -90.0], requires_grad=True)
    outcome = judged({"name": "unlikelihood"}, [group(PAIR, 1, 3)], policy_N)
    outcome.loss.backward()
    assert math.isfinite(outcome.loss.item()) and policy_N.grad.isfinite().all()


@given(LOGPS, ALPHAS)
@settings(deadline=None)
def test_it_is_bounded_below_where_the_difference_of_log_probs_is_not(logp: float, alpha: float) -> None:
    """An unlikely rejected token costs nothing more, so the loss ends at imitation and never below 0."""
    loss = unlikelihood(values(logp), log_complement(values(-1e4)), alpha=alpha)
    assert loss.item() == -logp
    assert unlikelihood(values(-1e-12), log_complement(values(logp)), alpha=alpha).item() >= 0


def test_alpha_goes_from_imitation_to_the_papers_1_and_no_further() -> None:
    knob = loss_facts("unlikelihood").knobs["alpha"]
    assert (knob.low, knob.high, knob.default) == (0.0, 1.0, 1.0)
    assert not loss_facts("unlikelihood").needs_reference


def test_without_the_unlikelihood_term_it_is_imitation_of_chosen() -> None:
    """sft averages over the tokens of a step and this over pairs: the same where chosen responses are equally long."""
    policy_N = randoms(9)
    ours = judged({"name": "unlikelihood", "alpha": 0.0}, pairs(3, 2, 1), policy_N).loss
    theirs = judged({"name": "sft"}, pairs(3, 2, 1), policy_N).loss
    both = [torch.autograd.grad(loss, policy_N)[0] for loss in (ours, theirs)]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14) and torch.allclose(*both, rtol=1e-14)


class TestPreferredFT:
    """The recipe preferred-ft on pairs is sft on their chosen responses, to the bit."""

    def test_loss_and_gradient_are_those_of_the_chosen_responses_as_demonstrations(self) -> None:
        lengths = [(2, 5), (4, 1), (3, 3)]
        policy_N = randoms(sum(map(sum, lengths)))
        of_pairs = judged({"name": "sft"}, [group(PAIR, *both) for both in lengths], policy_N).loss
        kept = torch.tensor([place < c for c, r in lengths for place in range(c + r)])
        chosen_N = policy_N.detach()[kept].requires_grad_()
        alone = judged({"name": "sft"}, [group(DEMONSTRATION, c) for c, _ in lengths], chosen_N).loss
        of_pairs.backward()
        alone.backward()
        assert of_pairs.item() == alone.item()
        assert torch.equal(policy_N.grad[kept], chosen_N.grad) and not policy_N.grad[~kept].any(), "rejected is not looked at"

    def test_the_recipe_is_that_loss(self, request: pytest.FixtureRequest) -> None:
        recipe = request.config.rootpath / "recipes" / "preferred-ft.yaml"
        config = resolve_config(read_recipe(recipe), ["data.train=rows.jsonl"], source=str(recipe))
        assert Objective(config.loss.resolved()).described() == Objective({"name": "sft"}).described()
        assert config.reference_kind == "none"
