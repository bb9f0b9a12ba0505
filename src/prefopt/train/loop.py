"""The loop. Its body is the pseudocode; metrics, logging, evaluation and saving are observers.

Shapes: G pairs of a step, S = 2 G responses, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from prefopt.core.config import TrainConfig
from prefopt.core.errors import TrainingError
from prefopt.data.encode import TokenGroup
from prefopt.data.pack import groups_of_step, micro_batches, total_steps
from prefopt.model.batch import sum_per_response
from prefopt.model.engine import LanguageModel
from prefopt.model.reference import Reference
from prefopt.objective.apply import Objective
from prefopt.train.optimizer import MasterOptimizer, learning_rate
from prefopt.train.record import PairValues, StepRecord

# Largest |log-ratio| per token (nats) of a response while policy == reference that is still rounding.
_STEP_ZERO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Observer(Protocol):
    """Sees every step after it was made."""

    def after_step(self, record: StepRecord) -> None: ...


@dataclass
class Training:
    """A policy, its rows, its reference and its optimizer, at optimizer step `step` (steps done so far)."""

    policy: LanguageModel
    groups: Sequence[TokenGroup]
    reference: Reference
    objective: Objective
    config: TrainConfig
    data_seed: int
    reference_is_initial: bool
    optimizer: MasterOptimizer = field(init=False)
    step: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.policy.disable_dropout()
        self.policy.model.train()
        if self.config.activation_checkpointing:
            self.policy.enable_activation_checkpointing()
        self.optimizer = MasterOptimizer(self.policy.model, self.config, self.policy.dtype)

    @property
    def total_steps(self) -> int:
        return total_steps(
            len(self.groups),
            epochs=self.config.epochs,
            groups_per_step=self.config.groups_per_step,
            max_steps=self.config.max_steps,
        )

    @property
    def _total_groups(self) -> int:
        if self.config.max_steps is not None:
            return self.config.max_steps * self.config.groups_per_step
        return round(len(self.groups) * self.config.epochs)

    def groups_of(self, step: int) -> list[TokenGroup]:
        """The groups of optimizer step `step`, counted from 0: a function of the seed, not of what ran before."""
        places = groups_of_step(
            step,
            groups=len(self.groups),
            groups_per_step=self.config.groups_per_step,
            total_groups=self._total_groups,
            seed=self.data_seed,
        )
        return [self.groups[place] for place in places]

    def run(self, observers: Sequence[Observer]) -> None:
        """Train to the last step. Observers may end it by raising."""
        while self.step < self.total_steps:
            record = self.train_step(self.groups_of(self.step))
            for observer in observers:
                observer.after_step(record)

    def train_step(self, groups: Sequence[TokenGroup]) -> StepRecord:
        """One optimizer step over `groups`; TrainingError before the update where something is not finite."""
        started = time.monotonic()
        values = self.accumulate_gradients(groups)
        if self.step == 0 and self.reference_is_initial:
            self._check_step_zero(values)
        grad_norm = self.optimizer.clip()
        self._check_finite(values, grad_norm)
        lr = learning_rate(self.step, total=self.total_steps, config=self.config)
        self.optimizer.step(lr)
        tokens = sum(group.unique_tokens for group in groups)
        self.step += 1
        self.num_tokens += tokens
        return StepRecord(
            step=self.step,
            epoch=min(self.step * self.config.groups_per_step, self._total_groups) / len(self.groups),
            pairs=values,
            beta=self.objective.beta,
            grad_norm=grad_norm,
            lr=lr,
            seconds=time.monotonic() - started,
            tokens=tokens,
            num_tokens=self.num_tokens,
            reference_is_initial=self.reference_is_initial,
        )

    def accumulate_gradients(self, groups: Sequence[TokenGroup]) -> PairValues:
        """Forward and backward over `groups` in micro-batches. Losses are divided by the step's count of groups,
        so how the groups fall into micro-batches does not change the gradient."""
        lengths = [self.policy.computed_tokens(group) for group in groups]
        parts = []
        order: list[int] = []
        for members in micro_batches(lengths, budget_tokens=self.config.micro_batch_tokens):
            parts.append(self._pair_losses([groups[place] for place in members], divide_by=len(groups)))
            order += members
        together = torch.cat(parts, dim=1).cpu().numpy()[:, np.argsort(order)]
        return PairValues(tuple(group.source for group in groups), *together)

    @torch.no_grad()
    def evaluate(self, groups: Sequence[TokenGroup]) -> PairValues:
        """The same values on other groups, without gradients."""
        self.policy.model.eval()
        lengths = [self.policy.computed_tokens(group) for group in groups]
        parts = []
        order: list[int] = []
        for members in micro_batches(lengths, budget_tokens=2 * self.config.micro_batch_tokens):
            parts.append(self._pair_losses([groups[place] for place in members], divide_by=None))
            order += members
        self.policy.model.train()
        together = torch.cat(parts, dim=1).cpu().numpy()[:, np.argsort(order)]
        return PairValues(tuple(group.source for group in groups), *together)

    def _pair_losses(self, groups: Sequence[TokenGroup], *, divide_by: int | None) -> torch.Tensor:
        """Rows of PairValues for one micro-batch, shape (7, G); with `divide_by` also its backward pass."""
        batch = self.policy.batch(groups)
        logp_N = self.policy.token_logps(batch)
        policy_S = sum_per_response(logp_N, batch)
        reference = [float(values.sum(dtype=np.float64)) for group in self.reference.of(groups) for values in group]
        reference_S = torch.tensor(reference, dtype=torch.float32, device=policy_S.device)
        tokens_S = sum_per_response(torch.ones_like(logp_N), batch)
        outcome = self.objective(policy_S, reference_S, tokens_S)
        if divide_by is not None:
            (outcome.loss_G.sum() / divide_by).backward()
        policy_S = policy_S.detach()
        return torch.stack(
            [
                outcome.loss_G.detach(),
                outcome.chosen_reward_G,
                outcome.rejected_reward_G,
                policy_S[0::2],
                policy_S[1::2],
                tokens_S[0::2],
                tokens_S[1::2],
            ]
        )

    def _check_step_zero(self, values: PairValues) -> None:
        """While policy == reference every log-ratio is 0 (and DPO's loss ln 2): this also proves the cache on its rows."""
        ratios = np.concatenate([values.chosen_reward / values.chosen_tokens, values.rejected_reward / values.rejected_tokens])
        sizes = np.where(np.isnan(ratios), np.inf, np.abs(ratios)) / self.objective.beta
        worst = float(sizes.max())
        if worst > _STEP_ZERO_TOLERANCE[self.policy.dtype]:
            place = int(sizes.argmax()) % len(values.sources)
            raise TrainingError(
                f"{values.sources[place]}: before the first update the policy differs from its reference by {worst:.3g} nats per token;"
                " they have the same weights, so the reference log-probs are not this model's",
                todo="Delete the reference cache (reference.cache_dir), or report it with `prefopt selfcheck`.",
            )

    def _check_finite(self, values: PairValues, grad_norm: float) -> None:
        bad = [source for source, loss in zip(values.sources, values.loss, strict=True) if not math.isfinite(loss)]
        if not bad and math.isfinite(grad_norm):
            return
        self.optimizer.clear()
        what = "loss" if bad else f"gradient norm ({grad_norm})"
        rows = ", ".join((bad or list(values.sources))[:8])
        raise TrainingError(
            f"Step {self.step + 1}: the {what} is not finite; rows: {rows}. The update was not made",
            todo="Look at these rows with `prefopt check`, lower train.lr, or try train.precision=fp32.",
        )
