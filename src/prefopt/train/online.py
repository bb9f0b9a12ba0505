"""The loop over the policy's own samples: each round draws new ones from the policy as it then is, and trains on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from prefopt.core.errors import TrainingError
from prefopt.core.files import digest
from prefopt.core.progress import say
from prefopt.data.merge import prompt_numbers
from prefopt.data.mismatch import with_mismatched
from prefopt.data.pack import groups_of_step, in_order_of
from prefopt.data.tokens import TokenGroup
from prefopt.model.allocator import release_freed_memory
from prefopt.rollout.experience import Learning, Round, make_round
from prefopt.rollout.prompts import Prompt
from prefopt.rollout.rewards import Reward
from prefopt.rollout.rounds import read_round, round_path, write_round
from prefopt.train.loop import Observer, Training
from prefopt.train.record import StepRecord, StepValues

# Largest estimate of KL(old || policy), nats a token or response, of the first step of a round that is still rounding.
_SAME_POLICY = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_STREAM = 2**31 + 7  # of sampling, apart from the other draws of the same seed


@dataclass(kw_only=True)
class OnlineTraining(Training):
    """A Training whose groups are drawn in rounds of `steps_per_round` optimizer steps.

    `folder`: where rounds are kept, so that a resumed run goes on with the samples it had. `on_round` is told of each new
    round. `saved_step` gives the step of the newest checkpoint, behind which rounds must stay.
    """

    prompts: Sequence[Prompt]
    reward: Reward
    learning: Learning
    steps_per_round: int
    folder: Path
    template: str = "auto"
    on_round: Callable[[int, Round], None] = field(default=lambda number, made: None)
    saved_step: Callable[[], int] = field(default=lambda: 0)
    _number: int = -1
    _round: Round | None = None
    _steps: list[list[TokenGroup]] = field(default_factory=list)
    _ended_at: int | None = None

    @property
    def total_steps(self) -> int:
        planned = self.learning.settings.rounds * self.steps_per_round
        limits = (planned, self.config.max_steps, self._ended_at)
        return min(limit for limit in limits if limit is not None)

    @cached_property
    def data_identity(self) -> str:
        """Digest of prompts, reward and settings of the rounds."""
        given = [json.dumps(prompt.given) for prompt in self.prompts]
        return digest(*given, self.reward.name, self.learning.settings.model_dump_json(exclude={"rounds", "batch_size"}))

    def epoch_at(self, step: int) -> float:
        """Passes over the prompts that are begun behind optimizer step `step`."""
        return math.ceil(step / self.steps_per_round) * self.learning.settings.prompts_per_round / len(self.prompts)

    def run(self, observers: Sequence[Observer]) -> None:
        """Train to the last step, or until a round is further from the reference than rollout.stop_at_kl."""
        while self.step < self.total_steps:
            groups = self.groups_of(self.step)
            if self._ended_at is not None:
                return
            record = self.train_step(groups)
            for observer in observers:
                observer.after_step(record)

    def groups_of(self, step: int) -> list[TokenGroup]:
        """The groups of optimizer step `step` from 0, of the round that it lies in, which is drawn where it is not there yet."""
        number, place = divmod(step, self.steps_per_round)
        if number != self._number:
            self._enter(number)
        return self._steps[place]

    def forget_rounds_after(self, step: int) -> None:
        """Remove rounds that were drawn behind optimizer step `step`: by a policy that is not there any more."""
        for path in self.folder.glob("round-*.npz"):
            if int(path.stem.removeprefix("round-")) * self.steps_per_round > step:
                path.unlink()

    def train_step(self, groups: Sequence[TokenGroup]) -> StepRecord:
        """One optimizer step; the first of a round also carries what the round's samples were like."""
        begins = self.step % self.steps_per_round == 0
        record = super().train_step(groups)
        if not begins or self._round is None:
            return record
        statistics = {**record.values.statistics, **self._round.metrics}
        return replace(record, values=replace(record.values, statistics=statistics))

    def accumulate_gradients(self, groups: Sequence[TokenGroup]) -> StepValues:
        values = super().accumulate_gradients(groups)
        moved = values.statistics.get("policy/approxkl_avg", 0.0)
        if self.step % self.steps_per_round == 0 and not abs(moved) <= _SAME_POLICY[self.policy.dtype]:
            self.optimizer.clear()
            raise TrainingError(
                f"Step {self.step + 1}: the policy differs from the one that drew these samples by {moved:.3g} nats, and it has"
                " not been trained since: the log-probs of sampling and training do not agree. The update was not made",
                todo="Report it with `prefopt selfcheck`; train.precision=fp32 may serve meanwhile.",
            )
        return values

    def _enter(self, number: int) -> None:
        """Make round `number` the current one: as it was kept, or drawn from the policy as it is."""
        path, before = round_path(self.folder, number), round_path(self.folder, number - 1)
        if path.exists():
            made = read_round(path)
        else:
            made = self._drawn(
                number, self._round if self._number == number - 1 and self._round else self._read(before, number)
            )
            write_round(path, made)
            self.on_round(number, made)
            self._forget_old(number)
        self._number, self._round = number, made
        self._steps = self._cut(number, made)
        stop_at = self.learning.settings.stop_at_kl
        if stop_at is not None and made.metrics["objective/kl"] > stop_at and self.step == number * self.steps_per_round:
            say(
                f"round {number + 1}: {made.metrics['objective/kl']:.2f} nats from the reference, above rollout.stop_at_kl={stop_at:g}"
            )
            self._ended_at = self.step

    @staticmethod
    def _read(before: Path, number: int) -> Round | None:
        return read_round(before) if number > 0 else None

    def _drawn(self, number: int, before: Round | None) -> Round:
        settings = self.learning.settings
        places = groups_of_step(
            number,
            groups=len(self.prompts),
            groups_per_step=settings.prompts_per_round,
            total_groups=2**62,
            seed=self.data_seed,
        )
        try:
            return make_round(
                self.policy,
                self.reference,
                self.reward,
                [self.prompts[place] for place in places],
                self.learning,
                seed=int(np.random.SeedSequence([self.data_seed, _STREAM, number]).generate_state(1, np.uint64)[0]),
                kl_coefficient=settings.kl_coefficient if before is None else before.next_kl_coefficient,
                template=self.template,
                micro_batch_tokens=2 * self.micro_batch_tokens,
            )
        finally:
            self.policy.model.train()
            release_freed_memory()

    def _cut(self, number: int, made: Round) -> list[list[TokenGroup]]:
        """The groups of each step of the round: `epochs_per_round` passes, each in an order of its own, cut evenly."""
        settings = self.learning.settings
        replayed = [read_round(path) for path in self._earlier(number)]
        groups: Sequence[TokenGroup] = [group for one in (*replayed, made) for group in one.groups]
        if self.objective.needs_mismatched:
            groups = with_mismatched(groups, seed=self.data_seed)
        random = np.random.default_rng([self.data_seed, _STREAM, number, 1])
        together = prompt_numbers(groups) if self.by_prompt else np.arange(len(groups))
        order = np.concatenate([in_order_of(together, random) for _ in range(settings.epochs_per_round)])
        repeats = -(-self.steps_per_round // len(order))  # more steps than groups: some are seen again
        return [
            [groups[place] for place in part.tolist()] for part in np.array_split(np.tile(order, repeats), self.steps_per_round)
        ]

    def _earlier(self, number: int) -> list[Path]:
        """Files of the rounds whose groups are trained on again in round `number`."""
        first = max(0, number - self.learning.settings.replay_rounds)
        return [round_path(self.folder, earlier) for earlier in range(first, number)]

    def _forget_old(self, number: int) -> None:
        """Remove rounds that neither this one nor a run resumed from the newest checkpoint needs."""
        oldest = min(number, self.saved_step() // self.steps_per_round) - 1 - self.learning.settings.replay_rounds
        for path in self.folder.glob("round-*.npz"):
            if int(path.stem.removeprefix("round-")) < oldest:
                path.unlink()
