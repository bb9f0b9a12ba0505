"""Agreement with TRL 1.16: its own loss code, on a stub of its trainers, and ours, on the same numbers. Values and gradients.

Of the losses here TRL 1.16 has no bco (its trainer is gone; DPO's bco_pair has no reward shift), no loss of K responses
and no reward_ranking: nothing to compare those with.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from objective.made_rows import PAIR, group, label, said, scored
from prefopt.objective.apply import Objective
from prefopt.objective.reference_free import orpo

pytestmark = pytest.mark.slow  # imports TRL

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

PROMPT = 2
LENGTHS = (3, 1, 2, 4, 1, 3)  # responses; of pairs: chosen, rejected, chosen, ...
WIDTH = PROMPT + max(LENGTHS)
COUNT = len(LENGTHS)
TOKENS = torch.tensor(LENGTHS)
IS_RESPONSE = (torch.arange(WIDTH) >= PROMPT) & (torch.arange(WIDTH) < PROMPT + TOKENS[:, None])
CHOSEN_THEN_REJECTED = torch.tensor([0, 2, 4, 1, 3, 5])
PAIRS = [group(PAIR, *LENGTHS[first : first + 2]) for first in (0, 2, 4)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(seed: int) -> Tensor:
    """Log-probs of all places, as a leaf; those of prompts and padding are for nobody to look at."""
    return (-drawn(COUNT, WIDTH, seed=seed).abs() - 0.05).requires_grad_()


def trainer(**fields: Any) -> SimpleNamespace:
    """What TRL's loss methods look at in a trainer on one process."""
    same = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value)
    basics = {
        "model": SimpleNamespace(training=True),
        "accelerator": same,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "is_encoder_decoder": False,
        "label_smoothing": 0.0,
        "pad_token_id": 0,
        "padding_value": 0,
    }
    return SimpleNamespace(**basics | fields)


def saying(logp_SL: Tensor, order: Tensor) -> Any:
    """A model that answers with these log-probs, 0 where there is no response, as TRL's fused head does."""
    shifted = logp_SL.masked_fill(~IS_RESPONSE, 0.0)[order, 1:]
    nothing = torch.zeros_like(shifted)
    outputs = SimpleNamespace(log_probs=shifted, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return lambda **_: outputs


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-12)
    mine, wanted = torch.autograd.grad(ours, leaf, retain_graph=True)[0], torch.autograd.grad(theirs, leaf)[0]
    assert wanted.abs().max() > 1e-6
    assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-13)


def ours(
    options: dict[str, Any], rows: list[Any], policy_SL: Tensor, reference_SL: Tensor | None = None, **more: Any
) -> Tensor:
    objective = Objective(options)
    reference_N = None if reference_SL is None else reference_SL.detach()[IS_RESPONSE]
    return objective(said(rows, policy_SL[IS_RESPONSE], reference_N, **more), totals=objective.totals(rows)).loss


@pytest.mark.parametrize(
    "labels", [[True, False, True, True, False, True], [True] * 6, [False] * 6], ids=["both", "good", "bad"]
)
@pytest.mark.parametrize("kl", [0.7, -0.7], ids=["kl", "kl below 0"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.4)], ids=str)
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired(name: str, weights: tuple[float, float], kl: float, labels: list[bool]) -> None:
    """KTOTrainer._compute_loss. Its KL comes from mismatched responses in the batch; the same number is given to both."""
    policy_SL, reference_SL = log_probs(1), log_probs(2)
    reference_S = reference_SL.masked_fill(~IS_RESPONSE, 0.0).sum(1).detach()
    spread = drawn(COUNT, seed=3)
    stub = trainer(
        loss_type=name,
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda *_: spread - spread.mean() + kl,
    )
    batch = {
        "input_ids": torch.ones(COUNT, WIDTH, dtype=torch.int64),
        "attention_mask": torch.ones(COUNT, WIDTH, dtype=torch.int64),
        "completion_mask": IS_RESPONSE.long(),
        "label": torch.tensor(labels),
        "ref_logps": reference_S,
        "ref_KL_logps": torch.zeros(COUNT, dtype=torch.float64),
    }
    theirs = KTOTrainer._compute_loss(stub, saying(policy_SL, torch.arange(COUNT)), batch, False)
    options = {"name": name, "beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    rows = [group(label(good), count) for good, count in zip(labels, LENGTHS, strict=True)]
    assert_same(ours(options, rows, policy_SL, reference_SL, mismatch=kl), theirs, policy_SL)


class TestLogits:
    """CPO and ORPO start from logits, so that their own averages over tokens are part of what is compared."""

    IDS = torch.randint(0, 7, (COUNT, WIDTH), generator=torch.Generator().manual_seed(4))

    def model(self, seed: int) -> tuple[Any, Tensor, Tensor]:
        """(model for TRL, its logits as a leaf, log-probs of all places for us)."""
        logits_SLV = drawn(COUNT, WIDTH, 7, seed=seed).requires_grad_()
        logp_SL = logits_SLV[:, :-1].log_softmax(2).gather(2, self.IDS[:, 1:, None]).squeeze(2)
        ours_SL = torch.cat([logp_SL.new_zeros(COUNT, 1), logp_SL], dim=1)
        return lambda *_, **__: SimpleNamespace(logits=logits_SLV[CHOSEN_THEN_REJECTED]), logits_SLV, ours_SL

    def batch(self) -> dict[str, Tensor]:
        present = torch.arange(WIDTH) < PROMPT + TOKENS[:, None]
        labels = self.IDS.masked_fill(~IS_RESPONSE, -100)
        return {
            f"{side}_{field}": value[first::2]
            for first, side in ((0, "chosen"), (1, "rejected"))
            for field, value in (("input_ids", self.IDS), ("attention_mask", present.long()), ("labels", labels))
        }

    def cpo(self, model: Any, **fields: Any) -> Tensor:
        stub = trainer(
            alpha=0.0, concatenated_inputs=CPOTrainer.concatenated_inputs, get_batch_logps=CPOTrainer.get_batch_logps, **fields
        )
        stub.concatenated_forward = lambda *args: CPOTrainer.concatenated_forward(stub, *args)
        stub.cpo_loss = lambda *args: CPOTrainer.cpo_loss(stub, *args)
        return CPOTrainer.get_batch_loss_metrics(stub, model, self.batch())[0]

    def test_simpo(self) -> None:
        """Its gamma_logratios is gamma / beta, subtracted before the scaling by beta."""
        model, logits_SLV, logp_SL = self.model(5)
        theirs = self.cpo(model, loss_type="simpo", beta=2.5, simpo_gamma=1.4, cpo_alpha=0.0)
        assert_same(ours({"name": "simpo", "beta": 2.5, "gamma": 1.4}, PAIRS, logp_SL), theirs, logits_SLV)

    def test_cpo_without_imitation(self) -> None:
        model, logits_SLV, logp_SL = self.model(6)
        theirs = self.cpo(model, loss_type="sigmoid", beta=0.2, cpo_alpha=0.0)
        assert_same(ours({"name": "cpo", "beta": 0.2, "alpha": 0.0}, PAIRS, logp_SL), theirs, logits_SLV)

    def test_cpo_imitates_by_the_token(self) -> None:
        """TRL's second term is the mean over the tokens of all chosen responses of a batch: that is sft in a mix."""
        model, logits_SLV, logp_SL = self.model(7)
        theirs = self.cpo(model, loss_type="sigmoid", beta=0.2, cpo_alpha=0.7)
        assert_same(ours({"cpo": {"alpha": 0.0, "beta": 0.2}, "sft": 0.7}, PAIRS, logp_SL), theirs, logits_SLV)

    def test_cpo_alpha_averages_over_responses_instead(self) -> None:
        """arXiv 2401.08417 eq. 4 has an expectation over responses, not over tokens; so does our alpha, per token of each."""
        model, _, logp_SL = self.model(7)
        theirs = self.cpo(model, loss_type="sigmoid", beta=0.2, cpo_alpha=0.7)
        mine = ours({"name": "cpo", "alpha": 0.7, "beta": 0.2}, PAIRS, logp_SL)
        nll_S = -logp_SL.masked_fill(~IS_RESPONSE, 0.0).sum(1)[::2]
        by_response, by_token = (nll_S / TOKENS[::2]).mean(), nll_S.sum() / TOKENS[::2].sum()
        assert (mine - theirs).item() == pytest.approx(0.7 * (by_response - by_token).item(), abs=1e-12)
        assert abs(mine - theirs) > 1e-3

    def orpo(self, model: Any, monkeypatch: pytest.MonkeyPatch, beta: float) -> tuple[Tensor, Tensor]:
        """(the odds-ratio term of ORPOTrainer, its imitation term). TRL casts to fp32 in between, which is switched off."""
        stub = trainer(
            concatenated_inputs=ORPOTrainer.concatenated_inputs, get_batch_logps=ORPOTrainer.get_batch_logps, beta=beta
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", lambda value: value)
            chosen_G, rejected_G, _, _, imitation = ORPOTrainer.concatenated_forward(stub, model, self.batch())
            losses, *_ = ORPOTrainer.odds_ratio_loss(stub, chosen_G, rejected_G)
        return -losses.mean(), imitation

    def test_orpo_odds_ratio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, logits_SLV, logp_SL = self.model(8)
        theirs, _ = self.orpo(model, monkeypatch, beta=0.4)
        nll_S = -logp_SL.masked_fill(~IS_RESPONSE, 0.0).sum(1)[::2]
        mine = ours({"name": "orpo", "beta": 0.4}, PAIRS, logp_SL) - (nll_S / TOKENS[::2]).mean()
        assert_same(mine, theirs, logits_SLV)

    def test_orpo_imitates_responses_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """arXiv 2403.07691 eq. 6 has the loss of chosen given the prompt; TRL imitates the prompt's tokens as well."""
        model, _, logp_SL = self.model(8)
        _, theirs = self.orpo(model, monkeypatch, beta=0.4)
        has_text = (torch.arange(WIDTH) >= 1) & (torch.arange(WIDTH) < PROMPT + TOKENS[:, None])
        assert theirs.item() == pytest.approx(-logp_SL[::2][has_text[::2]].mean().item(), rel=1e-12)
        assert abs(theirs + logp_SL[::2][IS_RESPONSE[::2]].mean()) > 1e-3

    def test_trl_stumbles_where_a_response_is_certain_and_we_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """log(1 - p) at p = 1 is -inf there, and its gradient NaN; here 1 - p is at least the dtype's eps."""
        stub = trainer(beta=0.1)
        certain, other = torch.zeros(1, requires_grad=True), torch.full((1,), -1.0)
        theirs = torch.autograd.grad(ORPOTrainer.odds_ratio_loss(stub, certain, other)[0].sum(), certain)[0]
        mine = torch.autograd.grad(orpo(certain, other, beta=0.1).sum(), certain)[0]
        assert theirs.isnan().all() and mine.isfinite().all()


@pytest.mark.parametrize("margins", [None, (0.5, 0.0, -0.3)], ids=["no margin", "margin"])
@pytest.mark.parametrize("centering", [None, 0.01, 0.5], ids=lambda value: f"centering {value}")
def test_reward(centering: float | None, margins: tuple[float, ...] | None) -> None:
    score_S = drawn(COUNT, seed=9).requires_grad_()
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(COUNT, 3, dtype=torch.int64)}
    rows = PAIRS
    if margins is not None:
        inputs["margin"] = torch.tensor(margins, dtype=torch.float64)
        rows = [replace(row, feedback=replace(PAIR, margin=margin)) for row, margin in zip(PAIRS, margins, strict=True)]
    theirs = RewardTrainer.compute_loss(
        stub, lambda **_: SimpleNamespace(logits=score_S[CHOSEN_THEN_REJECTED][:, None]), inputs
    )
    objective = Objective({"name": "reward", "centering": centering or 0.0})
    mine = objective(scored(rows, score_S), totals=objective.totals(rows)).loss
    assert_same(mine, theirs, score_S)


@pytest.mark.parametrize(
    ("types", "weights", "options"),
    [
        (["sft"], [1.0], {"name": "sft"}),
        (["sigmoid", "sft"], [1.0, 0.2], {"dpo": 1.0, "sft": 0.2, "beta": 0.3}),
        (["sft", "sigmoid"], [2.0, 0.5], {"sft": 2.0, "dpo": {"weight": 0.5, "beta": 0.3}}),
    ],
    ids=str,
)
def test_sft_and_its_mix_with_dpo(types: list[str], weights: list[float], options: dict[str, Any]) -> None:
    """DPOTrainer._compute_loss with several loss types: the chosen responses' tokens, and dpo."""
    policy_SL, reference_SL = log_probs(10), log_probs(11)
    reference_S = reference_SL.masked_fill(~IS_RESPONSE, 0.0).sum(1).detach()
    stub = trainer(
        loss_types=types, loss_weights=weights, beta=0.3, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False
    )
    batch = {
        "input_ids": torch.ones(COUNT, WIDTH, dtype=torch.int64),
        "attention_mask": torch.ones(COUNT, WIDTH, dtype=torch.int64),
        "completion_mask": IS_RESPONSE[CHOSEN_THEN_REJECTED].long(),
        "ref_chosen_logps": reference_S[::2],
        "ref_rejected_logps": reference_S[1::2],
    }
    theirs = DPOTrainer._compute_loss(stub, saying(policy_SL, CHOSEN_THEN_REJECTED), batch, False)
    assert_same(ours(options, PAIRS, policy_SL, reference_SL), theirs, policy_SL)
