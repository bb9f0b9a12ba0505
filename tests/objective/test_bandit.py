"""On bandits with a known reward DPO, PPO's objective and the closed form of RLHF meet, and IPO ends where its theory says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefopt.objective.pairs import dpo, ipo

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "paper" / "bandit.py"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("paper_bandit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_bandit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bandit = loaded()
CASES = [(1, 2, 0.5), (1, 8, 0.7), (1, 6, 3.0), (4, 5, 1.0)]
EVERY = pytest.mark.parametrize(("prompts", "responses", "beta"), CASES)


def made(prompts: int, responses: int, beta: float, seed: int = 3) -> Any:
    case = bandit.random_bandit(prompts, responses, beta=beta, seed=seed)
    assert bandit.distance(case.reference_PV, bandit.rlhf_optimum(case)) > 0.02
    return case


def assert_same(found_PV: torch.Tensor, wanted_PV: torch.Tensor) -> None:
    """Equal policies, to 1e-6 in every probability."""
    assert float((found_PV.exp() - wanted_PV.exp()).abs().max()) < 1e-6


def deterministic_pair() -> Any:
    """Three equally likely responses, of which the first always beats the second, and the third is in no pair."""
    case = bandit.Bandit(torch.zeros(1, 3).double(), torch.full((1, 3), -math.log(3)).double(), 1.0)
    labels = torch.zeros(1, 3, 3, dtype=torch.float64)
    labels[0, 0, 1] = 1.0
    return case, labels


class TestInfinitelyManyLabels:
    @EVERY
    def test_dpo_ends_at_the_optimum_of_rlhf(self, prompts: int, responses: int, beta: float) -> None:
        """arXiv 2305.18290 eq. 4: reference exp(r / beta) / Z."""
        case = made(prompts, responses, beta)
        assert_same(bandit.solved(dpo, case, case.preference_PVV), bandit.rlhf_optimum(case))

    @EVERY
    def test_the_objective_of_ppo_has_the_same_optimum(self, prompts: int, responses: int, beta: float) -> None:
        case = made(prompts, responses, beta)
        found = bandit.minimise(bandit.rl_loss(case), case.reference_PV).log_softmax(1)
        assert_same(found, bandit.rlhf_optimum(case))

    def test_at_the_optimum_the_objective_is_beta_log_z(self) -> None:
        """E[r] - beta KL = beta log sum of reference exp(r / beta), and no other policy reaches it."""
        case = made(1, 8, 0.7)
        best = -bandit.rl_loss(case)(bandit.rlhf_optimum(case)).item()
        assert best == pytest.approx(0.7 * torch.logsumexp(case.reference_PV + case.reward_PV / 0.7, 1).item(), rel=1e-12)
        others = torch.randn(50, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert all(-bandit.rl_loss(case)(other).item() < best for other in others)

    def test_the_first_step_of_ppos_clipped_loss_is_the_gradient_of_the_objective(self) -> None:
        case = made(4, 5, 1.0)
        logits_PV = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        surrogate = bandit.ppo_surrogate(case, logits_PV, logits_PV.detach().log_softmax(1))
        both = [torch.autograd.grad(loss, logits_PV)[0] for loss in (surrogate, bandit.rl_loss(case)(logits_PV))]
        assert torch.allclose(*both, rtol=1e-12, atol=1e-14)

    def test_ppos_rounds_with_clipping_end_there_too(self) -> None:
        case = made(1, 5, 0.7)
        assert_same(bandit.ppo_rounds(case), bandit.rlhf_optimum(case))

    @EVERY
    def test_ipo_ends_at_its_own_closed_form(self, prompts: int, responses: int, beta: float) -> None:
        """reference exp(mean probability to win / beta) / Z; arXiv 2310.12036 eq. 7 with Psi the identity."""
        case = made(prompts, responses, beta)
        wanted = bandit.ipo_optimum(case, case.preference_PVV)
        assert_same(bandit.solved(ipo, case, case.preference_PVV), wanted)
        assert bandit.distance(wanted, bandit.rlhf_optimum(case)) > 0.01, "it differs from what rlhf and dpo find"

    def test_ipo_between_two_responses_is_pulled_to_the_probability_less_a_half_over_beta(self) -> None:
        case = made(1, 2, 0.5)
        ratio = (bandit.solved(ipo, case, case.preference_PVV) - case.reference_PV)[0]
        p = torch.sigmoid(case.reward_PV[0, 0] - case.reward_PV[0, 1])
        assert float(ratio[0] - ratio[1]) == pytest.approx(float(p - 0.5) / 0.5, abs=1e-9)

    def test_where_all_responses_are_nearly_as_good_ipo_is_dpo_at_four_times_beta(self) -> None:
        """sigmoid(d) = 1/2 + d / 4 for small d, so P(win) is r / 4 up to a constant."""
        near = bandit.random_bandit(1, 6, beta=0.01, spread=1e-3, seed=3)
        dpo_like = bandit.Bandit(near.reward_PV, near.reference_PV, 0.04)
        assert_same(bandit.ipo_optimum(near, near.preference_PVV), bandit.rlhf_optimum(dpo_like))


class TestLabelsWithoutDoubt:
    def test_dpo_has_no_optimum_whatever_beta_is(self) -> None:
        """Its loss falls for ever as log-ratios in the right order are scaled up, and P(best) goes to 1, also with a beta
        at which the optimum for the true rewards is 0.01 from the reference."""
        for beta in (0.5, 5.0):
            case = bandit.random_bandit(1, 5, beta=beta, seed=3)
            assert bandit.distance(case.reference_PV, bandit.rlhf_optimum(case)) < 0.01 or beta < 5
            labels = bandit.deterministic(case)
            ratio_PV = case.reward_PV / beta
            scales = [10.0**power for power in range(1, 5)]
            total = bandit.pair_loss(dpo, case, labels)
            losses = [total(case.reference_PV + scale * ratio_PV).item() for scale in scales]
            assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] + 1e-3
            found = bandit.minimise(total, case.reference_PV, steps=200).log_softmax(1)
            best = case.reward_PV[0].argmax()
            assert case.reference_PV.exp()[0, best] < 0.05 and found.exp()[0, best] > 0.95

    def test_ipo_ends_where_the_count_of_beaten_responses_says(self) -> None:
        """The k-th worst of V beats k of them and is even with itself: reference exp((k + 1/2) / (V beta)) / Z."""
        case = made(1, 5, 0.7)
        place = case.reward_PV.argsort(1).argsort(1)
        wanted = (case.reference_PV + (place + 0.5) / (5 * case.beta)).log_softmax(1)
        assert_same(bandit.solved(ipo, case, bandit.deterministic(case)), wanted)
        assert bandit.widest(case, wanted) == pytest.approx(4 / (5 * case.beta))

    def test_one_label_takes_everything_from_responses_that_it_does_not_speak_of(self) -> None:
        """DPO sends the winner's logit off, so the third response dies out unseen; IPO stops at +-1 / (4 beta)."""
        case, labels = deterministic_pair()
        unseen = [bandit.solved(dpo, case, labels, steps=steps)[0, 2].exp().item() for steps in (3, 30)]
        assert unseen[1] < 1e-3 < unseen[0] < 1 / 3
        quarter = torch.tensor([[0.25, -0.25, 0.0]], dtype=torch.float64) / case.beta
        assert_same(bandit.solved(ipo, case, labels), (case.reference_PV + quarter).log_softmax(1))


class TestFiniteLabels:
    def test_dpo_is_the_closed_form_on_the_most_likely_rewards(self) -> None:
        """Learning a reward model and solving RLHF with it gives the policy that DPO finds in one step."""
        case = made(2, 4, 0.7)
        labels = bandit.draw_labels(case, 300, np.random.default_rng(0))
        assert bandit.has_finite_optimum(labels)
        learnt = bandit.Bandit(bandit.reward_model(case, labels), case.reference_PV, case.beta)
        assert_same(bandit.solved(dpo, case, labels), bandit.rlhf_optimum(learnt))

    def test_labels_are_drawn_with_the_probabilities_of_bradley_terry(self) -> None:
        """Shares of wins within 4 standard errors; every label is of two different responses."""
        case = made(2, 4, 0.7)
        labels = bandit.draw_labels(case, 40_000, np.random.default_rng(1))
        assert labels.sum((1, 2)).tolist() == [40_000] * 2 and not torch.diagonal(labels, dim1=1, dim2=2).any()
        of_pair = labels + labels.transpose(1, 2)
        apart = ~torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
        error = (labels / of_pair - case.preference_PVV)[apart].abs()
        allowed = 4 * (case.preference_PVV * (1 - case.preference_PVV) / of_pair)[apart].sqrt()
        assert (error < allowed).all()

    @pytest.mark.parametrize(("loss", "name"), [(dpo, "dpo"), (ipo, "ipo")])
    def test_the_distance_to_the_optimum_falls_as_one_over_the_root_of_the_labels(self, loss: Any, name: str) -> None:
        """16 times the labels, a quarter of the distance, over 24 seeds."""
        case = made(1, 4, 1.0)
        wanted = bandit.rlhf_optimum(case) if name == "dpo" else bandit.ipo_optimum(case, case.preference_PVV)
        counts = (400, 6_400)
        means = []
        for count in counts:
            drawn = [bandit.draw_labels(case, count, np.random.default_rng([seed, count])) for seed in range(24)]
            means.append(np.mean([bandit.distance(bandit.solved(loss, case, labels, steps=100), wanted) for labels in drawn]))
        assert math.log(means[1] / means[0]) / math.log(16) == pytest.approx(-0.5, abs=0.12)

    def test_without_a_loss_for_a_response_there_is_no_optimum(self) -> None:
        """Ford's condition: a cycle of wins has one; a response that never lost, or two groups apart, have none."""
        cycle = torch.zeros(1, 3, 3)
        cycle[0, 0, 1] = cycle[0, 1, 2] = cycle[0, 2, 0] = 1
        never_lost = cycle.clone()
        never_lost[0, 2, 0] = 0
        apart = torch.zeros(1, 4, 4)
        apart[0, 0, 1] = apart[0, 1, 0] = apart[0, 2, 3] = apart[0, 3, 2] = 1
        assert [bandit.has_finite_optimum(labels) for labels in (cycle, never_lost, apart)] == [True, False, False]
        case = bandit.Bandit(torch.zeros(1, 3).double(), torch.full((1, 3), -math.log(3)).double(), 1.0)
        even, lost = (bandit.solved(dpo, case, labels.double(), steps=60).exp() for labels in (cycle, never_lost))
        assert even[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6) and float(lost[0, 0]) > 0.99


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bandit.json").read_text())
    for name in ("one prompt, 8 responses", "3 prompts, 5 responses"):
        methods = found[name]["methods"]
        assert max(methods[key]["largest_difference_from_theory"] for key in ("DPO", "IPO", "PPO's objective")) < 1e-6
        assert f"| DPO | {methods['DPO']['reward']:.4f} |" in done.stdout
    dpo_curve, ipo_curve = (found["deterministic"]["widest_log_ratio"][key] for key in ("DPO", "IPO"))
    assert dpo_curve[-1] > dpo_curve[-2] + 0.1 and ipo_curve[-1] == pytest.approx(
        found["deterministic"]["ipo_theory"], abs=1e-3
    )
    assert (tmp_path / "bandit.png").stat().st_size > 10_000
