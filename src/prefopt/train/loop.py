"""The loop. Its body is the pseudocode; metrics, logging, evaluation and saving are observers.

Shapes: G groups of a step, S responses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt.core.config import TrainConfig
from prefopt.core.errors import TrainingError
from prefopt.core.progress import say
from prefopt.data.encode import TokenGroup
from prefopt.data.merge import merged, prompt_numbers
from prefopt.data.pack import groups_of_step, total_steps
from prefopt.data.tokens import feedbacks_of
from prefopt.model.adapters import seed_dropout
from prefopt.model.allocator import release_freed_memory
from prefopt.model.engine import LanguageModel
from prefopt.model.reference import Reference, groups_digest
from prefopt.model.tables import gradients_into
from prefopt.objective.apply import Objective
from prefopt.train.activations import set_activations
from prefopt.train.flops import training_flops
from prefopt.train.gradients import WITHOUT_GRADIENTS, Gradients
from prefopt.train.memory import out_of_memory_noted, smaller_budget
from prefopt.train.moving_reference import MovingReference
from prefopt.train.optimizer import Optimizer, learning_rate, make_optimizer
from prefopt.train.record import StepRecord, StepValues

VALUE_HEAD = "value_head"  # begins the names of its weights

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
    optimizer: Optimizer = field(init=False)
    step: int = 0
    num_tokens: int = 0
    micro_batch_tokens: int = field(init=False)
    by_prompt: bool = False  # data.by_prompt
    matmul_flops: float | None = None  # operations a second of a matrix product here, for the MFU of each step

    def __post_init__(self) -> None:
        self.micro_batch_tokens = self.config.budget_tokens
        self.policy.disable_dropout()
        self.policy.model.train()
        set_activations(self.policy, self.config)
        head = self.policy.value_head
        own_head = None if head is None else {f"{VALUE_HEAD}.{name}": weight for name, weight in head.named_parameters()}
        self.optimizer = make_optimizer(
            self.policy.model, self.config, self.policy.dtype, seed=self.data_seed, own_head=own_head
        )

    @property
    def total_steps(self) -> int:
        return total_steps(
            len(self.groups),
            epochs=self.config.epochs,
            groups_per_step=self.config.groups_per_step,
            max_steps=self.config.max_steps,
        )

    @cached_property
    def data_identity(self) -> str:
        """Digest of the token ids and loss flags of all rows, which takes seconds for a hundred thousand."""
        return groups_digest(self.groups)

    @cached_property
    def _strata(self) -> list[int] | None:
        """Labelled rows: 1 for desirable ones, so that every step mixes both classes; None for other rows."""
        feedbacks = feedbacks_of(self.groups)
        if not all(feedback.kind == "label" for feedback in feedbacks):
            return None
        return [int(bool(feedback.label)) for feedback in feedbacks]

    @cached_property
    def _together(self) -> NDArray[np.int64] | None:
        """The prompt of each row by number, where rows with the same prompt follow each other."""
        return prompt_numbers(self.groups) if self.by_prompt else None

    def epoch_at(self, step: int) -> float:
        """Passes over the rows that are made behind optimizer step `step`."""
        return min(step * self.config.groups_per_step, self._total_groups) / len(self.groups)

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
            strata=self._strata,
            together=self._together,
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
        computed = merged(groups).groups
        tokens = sum(group.unique_tokens for group in computed)
        self.step += 1
        if isinstance(self.reference, MovingReference) and self.reference.follow(self.step, self.optimizer.masters):
            self.reference_is_initial = False
        self.num_tokens += tokens
        seconds = time.monotonic() - started
        return StepRecord(
            step=self.step,
            epoch=self.epoch_at(self.step),
            values=values,
            grad_norm=grad_norm,
            lr=lr,
            seconds=seconds,
            tokens=tokens,
            num_tokens=self.num_tokens,
            reference_is_initial=self.reference_is_initial,
            mfu=self.flops_of(computed) / seconds / self.matmul_flops if self.matmul_flops else None,
        )

    def flops_of(self, groups: Sequence[TokenGroup]) -> float:
        """The fewest floating-point operations of training once on `groups`."""
        model, lora = self.policy.model, self.policy.adapter is not None
        adapter = sum(weight.numel() for weight in self.optimizer.masters.values()) if lora else 0
        weights = model.num_parameters() - adapter
        return training_flops(model.config, weights, groups, adapter=adapter, head=not self.objective.trains_reward_model)

    def accumulate_gradients(self, groups: Sequence[TokenGroup]) -> StepValues:
        """Forward and backward over `groups` in micro-batches; how they are cut does not change the gradient."""

        def compute(gradients: Gradients) -> StepValues:
            with gradients_into(self.optimizer.table_gradients(self.policy.model)):
                return gradients.accumulate(groups)

        return self._in_memory(groups, compute, budgets=1)

    def evaluate(self, groups: Sequence[TokenGroup]) -> StepValues:
        """The same values on other groups, without gradients."""
        self.policy.model.eval()
        values = self._in_memory(groups, lambda gradients: gradients.evaluate(groups), budgets=WITHOUT_GRADIENTS)
        self.policy.model.train()
        release_freed_memory()
        return values

    def _in_memory(
        self, groups: Sequence[TokenGroup], compute: Callable[[Gradients], StepValues], *, budgets: int
    ) -> StepValues:
        """`compute`, again with half the budget where memory runs out: the cut into micro-batches does not change results.

        `budgets`: how many times micro_batch_tokens one of its passes takes. TrainingError where micro-batches of a single group are still too large.
        """
        lengths = [self.policy.computed_tokens(group) for group in groups]
        running = self.objective.state()
        while True:
            with out_of_memory_noted() as ran_out:
                return compute(self._gradients)
            assert ran_out  # everything else has been raised
            self.optimizer.clear()
            self.objective.load_state(running)
            smaller = smaller_budget(lengths, budgets * self.micro_batch_tokens)
            if smaller is None:
                raise TrainingError(
                    f"Step {self.step + 1}: memory ran out on a single group of {max(lengths)} tokens. The update was not made",
                    todo="`prefopt plan` shows what would fit: train.activation_checkpointing=full, model.lora, shorter rows"
                    " (data.max_prompt_tokens, data.max_response_tokens).",
                )
            self.micro_batch_tokens = max(1, smaller // budgets)
            say(f"step {self.step + 1}: out of memory; micro-batches of at most {self.micro_batch_tokens} tokens from here on")

    @property
    def _gradients(self) -> Gradients:
        adapter = self.policy.adapter
        has_dropout = adapter is not None and adapter.config.dropout > 0
        reseed = partial(seed_dropout, self.data_seed, self.step) if has_dropout else None
        return Gradients(self.policy, self.reference, self.objective, self.micro_batch_tokens, reseed)

    def _check_step_zero(self, values: StepValues) -> None:
        """While policy == reference every log-ratio is 0 (and DPO's loss ln 2): this also proves the cache on its rows."""
        if not self.objective.needs_reference:
            return
        per_token = np.abs(values.ratio) / values.tokens
        sizes = np.where(np.isnan(per_token), np.inf, per_token)
        worst = float(sizes.max())
        if worst > _STEP_ZERO_TOLERANCE[self.policy.dtype]:
            raise TrainingError(
                f"{values.sources[values.group[int(sizes.argmax())]]}: before the first update the policy differs from its"
                f" reference by {worst:.3g} nats per token; they have the same weights, so the reference log-probs are not this model's",
                todo="Delete the reference cache (reference.cache_dir), or report it with `prefopt selfcheck`.",
            )

    def _check_finite(self, values: StepValues, grad_norm: float) -> None:
        if math.isfinite(values.total) and math.isfinite(grad_norm):
            return
        self.optimizer.clear()
        unsound = np.zeros(len(values.sources), dtype=bool)
        for of_response in (values.reward, values.logp):
            if not np.isnan(of_response).all():
                np.logical_or.at(unsound, values.group, ~np.isfinite(of_response))
        if not np.isnan(values.loss).all():
            unsound |= ~np.isfinite(values.loss)
        bad = [source for source, wrong in zip(values.sources, unsound, strict=True) if wrong]
        what = "loss" if not math.isfinite(values.total) else f"gradient norm ({grad_norm})"
        rows = ", ".join((bad or list(values.sources))[:8])
        raise TrainingError(
            f"Step {self.step + 1}: the {what} is not finite; rows: {rows}. The update was not made",
            todo="Look at these rows with `prefopt check`, lower train.lr, or try train.precision=fp32.",
        )
