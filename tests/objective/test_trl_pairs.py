"""The pair losses of TRL 1.16, run by TRL's own code on made-up log-probs, and ours on the same: values and gradients.

`DPOTrainer._compute_loss` runs on an object that has only what it reads; its model answers with given log-probs. Scored
tokens are completion tokens behind at least one prompt token, so that every count of TRL's (completion_mask for ipo and
sigmoid_norm, the shifted mask for ld_alpha, use_weighting and sft) is the count of scored tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from objective.made_rows import PAIR, group, said
from prefopt.core.losses.table import LOSSES
from prefopt.data.encode import TokenGroup
from prefopt.objective.apply import Objective

pytestmark = [
    pytest.mark.slow,  # imports TRL
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

PAIRS, PROMPT_TOKENS, TOKENS = 5, 2, 9  # a batch's; TOKENS with those of the prompt
OURS = {
    "sigmoid": "dpo",
    "sigmoid_norm": "sigmoid_norm",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
OF_THE_MARGIN = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's other losses, sigmoid among them, ignore label_smoothing
STEP_UNIT = ("aot", "aot_unpaired")  # sorted over the batch: no weights of pairs, and aot reads plain sums of log-probs


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """TRL makes exo's label smoothing a tensor of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Batch:
    """TRL's layout: rows are the chosen responses, then the rejected ones; values of the tokens after the first."""

    mask: Tensor
    policy: Tensor
    reference: Tensor
    log_square: Tensor

    @property
    def pairs(self) -> int:
        return len(self.mask) // 2

    @property
    def completion_mask(self) -> Tensor:
        return torch.nn.functional.pad(self.mask, (1, 0))

    @property
    def rows(self) -> list[TokenGroup]:
        counts = self.mask.sum(1).tolist()
        return [group(PAIR, *both) for both in zip(counts[: self.pairs], counts[self.pairs :], strict=True)]

    def by_pair(self, values: Tensor) -> Tensor:
        """Values of the scored tokens of each pair's two responses, pair after pair: our layout."""
        in_order = [row for pair in range(self.pairs) for row in (pair, pair + self.pairs)]
        return torch.cat([values[row][self.mask[row].bool()] for row in in_order])


def batch(seed: int = 0, dtype: torch.dtype = torch.float64, apart: float = 1.0) -> Batch:
    """Responses of 1 to 7 scored tokens, the last of them with a token in the middle that carries no loss."""
    random = torch.Generator().manual_seed(seed)
    lengths = [3, 7, 1, 5, 4, 6, 2, 7, 5, 7]
    mask = torch.tensor(
        [[PROMPT_TOKENS - 1 <= place < PROMPT_TOKENS - 1 + length for place in range(TOKENS - 1)] for length in lengths]
    ).long()
    mask[-1, 4] = 0
    values = [-apart * torch.rand(mask.shape, generator=random, dtype=torch.float64).add(0.05) for _ in range(3)]
    policy, reference, log_square = ((value * mask).to(dtype) for value in values)
    return Batch(mask, policy.requires_grad_(), reference, log_square)


def answer(log_probs: Tensor, log_square: Tensor) -> SimpleNamespace:
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(
        log_probs=log_probs, log_sum_sq_probs=log_square, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def trl_value(batch: Batch, types: list[str], weights: list[float] | None = None, **options: Any) -> Tensor:
    """The loss by TRL's code."""
    trainer_class = pytest.importorskip("trl").DPOTrainer
    trainer = object.__new__(trainer_class)
    read: dict[str, Any] = {
        "loss_types": types,
        "loss_weights": weights or [1.0] * len(types),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        "model": torch.nn.Module(),
        "ref_model": lambda **_: answer(batch.reference, batch.log_square),
        "args": SimpleNamespace(discopop_tau=options.pop("tau", 0.05), gradient_checkpointing_kwargs=None),
        "accelerator": SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    assert options.keys() <= read.keys()
    trainer.__dict__.update({**read, **options})
    trainer.model.is_gradient_checkpointing = False
    inputs = {
        "input_ids": torch.ones_like(batch.completion_mask),
        "attention_mask": torch.ones_like(batch.completion_mask),
        "completion_mask": batch.completion_mask,
    }
    return trainer._compute_loss(lambda **_: answer(batch.policy, batch.log_square), inputs, return_outputs=False)


def trl_loss(batch: Batch, types: list[str], weights: list[float] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient of each token's log-prob in our layout) by TRL's code."""
    loss = trl_value(batch, types, weights, **options)
    (gradient,) = torch.autograd.grad(loss, batch.policy)
    return loss.detach(), batch.by_pair(gradient)


def our_loss(batch: Batch, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same by Objective. Running statistics are those of the start: 0."""
    objective = Objective(options)
    policy_N = batch.by_pair(batch.policy).detach().requires_grad_()
    heard = said(batch.rows, policy_N, batch.by_pair(batch.reference), log_square_N=batch.by_pair(batch.log_square))
    loss = objective(heard, totals=objective.totals(batch.rows)).loss
    (gradient,) = torch.autograd.grad(loss, policy_N)
    return loss.detach(), gradient


def assert_same(theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], tolerance: float = 1e-9) -> None:
    assert theirs[0].isfinite() and theirs[1].abs().max() > 0
    for their, our in zip(theirs, ours, strict=True):
        assert torch.allclose(our.double(), their.double(), rtol=tolerance, atol=tolerance * 1e-2), (our - their).abs().max()


def smoothing(types: list[str], value: float = 0.1) -> dict[str, float]:
    return {"label_smoothing": value} if any(name in SMOOTHED for name in types) else {}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OURS)
def test_every_loss_type(name: str, seed: int, beta: float) -> None:
    """bco_pair without its baseline d, which TRL leaves out although arXiv 2404.04656 shifts the reward by it."""
    batch_ = batch(seed)
    theirs = trl_loss(batch_, [name], beta=beta, **smoothing([name]))
    assert_same(theirs, our_loss(batch_, {"name": OURS[name], "beta": beta, **smoothing([name])}))


def test_all_their_loss_types_are_here() -> None:
    """sft is a loss of single responses and comes in a mix below."""
    pytest.importorskip("trl")
    from trl import DPOConfig

    named = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = {word.strip("`'.,") for word in named.split() if word.startswith("`'")}
    assert theirs == {*OURS, "sft"}
    assert set(OURS.values()) <= set(LOSSES)


def test_cdpo_is_their_aot_of_a_single_pair() -> None:
    """TRL 1.16 has no cDPO of its own (its sigmoid ignores label_smoothing); sorting one pair changes nothing."""
    whole, first = batch(), [0, PAIRS]
    single = Batch(
        whole.mask[first], whole.policy[first].detach().requires_grad_(), whole.reference[first], whole.log_square[first]
    )
    theirs = trl_loss(single, ["aot"], beta=0.3, label_smoothing=0.2)
    for name in ("dpo", "cdpo"):
        assert_same(theirs, our_loss(single, {"name": name, "beta": 0.3, "label_smoothing": 0.2}))


@pytest.mark.parametrize(("theirs", "ours"), [("forward_kl", "forward_kl"), ("js_divergence", "js")])
@pytest.mark.parametrize("name", OF_THE_MARGIN)
def test_divergences(name: str, theirs: str, ours: str) -> None:
    batch_ = batch(2)
    options = {"name": OURS[name], "beta": 0.5, "divergence": ours, **smoothing([name])}
    assert_same(trl_loss(batch_, [name], beta=0.5, f_divergence_type=theirs, **smoothing([name])), our_loss(batch_, options))


@pytest.mark.parametrize("order", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", OF_THE_MARGIN)
def test_alpha_divergence(name: str, order: float) -> None:
    """TRL takes this one in fp32 at most (its table of clamps has no fp64), and subtracts 1 after the exponential: 1e-5."""
    batch_ = batch(3, torch.float32)
    theirs = trl_loss(
        batch_, [name], beta=0.5, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=order, **smoothing([name])
    )
    options = {"name": OURS[name], "beta": 0.5, "divergence": "alpha", "divergence_alpha": order, **smoothing([name])}
    assert_same(theirs, our_loss(batch_, options), tolerance=2e-5)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", [name for name in OURS if name not in STEP_UNIT])
def test_ld_dpo(name: str, ld_alpha: float) -> None:
    batch_ = batch(4)
    options = {"name": OURS[name], "beta": 0.3, "ld_alpha": ld_alpha, **smoothing([name])}
    assert_same(trl_loss(batch_, [name], beta=0.3, ld_alpha=ld_alpha, **smoothing([name])), our_loss(batch_, options))


@pytest.mark.parametrize("name", [name for name in OURS if name not in (*STEP_UNIT, "hinge")])
def test_wpo(name: str) -> None:
    batch_ = batch(5)
    options = {"name": OURS[name], "beta": 0.3, "wpo": True, **smoothing([name])}
    assert_same(trl_loss(batch_, [name], beta=0.3, use_weighting=True, **smoothing([name])), our_loss(batch_, options))


def test_wpo_of_hinge_has_their_value() -> None:
    """TRL multiplies the output of relu in place, which its backward pass then refuses: there is a value and no gradient."""
    batch_ = batch(5)
    with pytest.raises(RuntimeError, match="inplace"):
        trl_loss(batch_, ["hinge"], beta=0.3, use_weighting=True)
    theirs = trl_value(batch_, ["hinge"], beta=0.3, use_weighting=True)
    ours, gradient = our_loss(batch_, {"name": "hinge", "beta": 0.3, "wpo": True})
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9) and gradient.abs().max() > 0


def test_divergence_ld_alpha_and_wpo_together() -> None:
    batch_ = batch(6)
    theirs = trl_loss(batch_, ["sigmoid"], beta=0.3, f_divergence_type="js_divergence", ld_alpha=0.5, use_weighting=True)
    assert_same(theirs, our_loss(batch_, {"name": "dpo", "beta": 0.3, "divergence": "js", "ld_alpha": 0.5, "wpo": True}))


@pytest.mark.parametrize(
    ("types", "weights"),
    [
        (["sigmoid", "sft"], [1.0, 0.2]),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["ipo", "apo_zero"], [0.3, 0.7]),
        (["aot", "sigmoid"], [0.5, 1.0]),
    ],
    ids=["rpo", "mpo", "ipo+apo_zero", "aot+dpo"],
)
def test_mixes(types: list[str], weights: list[float]) -> None:
    """RPO (dpo + sft), MPO (dpo + bco_pair + sft) and others; sft is averaged over tokens of the batch in both."""
    mix = {OURS.get(name, name): weight for name, weight in zip(types, weights, strict=True)}
    if not mix.keys() <= LOSSES.keys():
        pytest.skip("no sft among the losses")
    batch_ = batch(7)
    assert_same(trl_loss(batch_, types, weights, beta=0.3), our_loss(batch_, {**mix, "beta": 0.3}))


def test_discopop_stays_finite_where_theirs_is_nan() -> None:
    """TRL multiplies sigmoid(beta m / tau) = 0 and exp(-beta m) = inf; the product is exp(log sigmoid(..) - beta m)."""
    far = batch(8, apart=1.0)
    far.reference = torch.cat([0 * far.reference[:PAIRS], far.reference[PAIRS:] - 2e3 * far.mask[PAIRS:]])
    far.policy.data[:PAIRS] -= 2e3 * far.mask[:PAIRS]
    theirs, _ = trl_loss(far, ["discopop"], beta=1.0)
    ours, gradient = our_loss(far, {"name": "discopop", "beta": 1.0})
    assert math.isnan(theirs) and ours.isfinite() and gradient.isfinite().all()
