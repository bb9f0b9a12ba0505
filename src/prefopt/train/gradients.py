"""Loss, gradients and values of the groups of a step, however they fall into micro-batches.

A loss that is a sum over groups is differentiated micro-batch by micro-batch, divided by the totals of the step. One that
couples all groups of a step (quantiles, running means) is computed on the log-probs of the whole step first; its gradient
with respect to them then goes through each micro-batch. Both give the same numbers for every way of cutting the step.

Shapes: G groups, S responses, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefopt.core import progress
from prefopt.data.encode import TokenGroup
from prefopt.data.merge import merged, merged_batches
from prefopt.model.engine import LanguageModel
from prefopt.model.reference import Reference
from prefopt.model.reward_model import RewardModel
from prefopt.model.transfer import to_device
from prefopt.objective.apply import Objective, Outcome
from prefopt.objective.measured import Drawn, Measured, joined, measured, targets_of
from prefopt.train.record import StepValues

WITHOUT_GRADIENTS = 2  # budgets of a pass that keeps nothing for a backward pass


@dataclass
class Gradients:
    """A policy under an objective against a reference, in micro-batches of `micro_batch_tokens` unique tokens.

    `reseed` is called with the number of each micro-batch before its forward while training: where the policy has
    dropout, both forwards of a micro-batch must draw the same.
    """

    policy: LanguageModel
    reference: Reference
    objective: Objective
    micro_batch_tokens: int
    reseed: Callable[[int], None] | None = None

    def accumulate(self, groups: Sequence[TokenGroup]) -> StepValues:
        """Forward and backward over the groups of one step; gradients are added to those of the weights."""
        cuts = self._cut(groups, self.micro_batch_tokens)
        totals = self.objective.totals(groups)
        mismatch = self._mismatch(groups)
        if self.objective.step_wide and len(cuts) > 1:
            outcomes = [self._through_whole_step([[groups[place] for place in cut] for cut in cuts], totals, mismatch)]
            cuts = [[place for cut in cuts for place in cut]]
        else:
            outcomes = [
                self._through_micro_batch([groups[place] for place in cut], totals, mismatch, number)
                for number, cut in enumerate(cuts)
            ]
        return self._values(groups, cuts, outcomes, mismatch)

    @torch.no_grad()
    def evaluate(self, groups: Sequence[TokenGroup]) -> StepValues:
        """The same values without gradients; all groups count as one step, and running statistics stay as they are."""
        cuts = self._cut(groups, WITHOUT_GRADIENTS * self.micro_batch_tokens)
        mismatch = self._mismatch(groups)
        whole = joined([self._measure([groups[place] for place in cut], mismatch) for cut in cuts])
        outcome = self.objective(whole, totals=self.objective.totals(groups))
        return self._values(groups, [[place for cut in cuts for place in cut]], [outcome], mismatch)

    def _cut(self, groups: Sequence[TokenGroup], budget_tokens: int) -> list[list[int]]:
        return merged_batches(groups, self.policy.computed_tokens, budget_tokens=budget_tokens)

    def _through_micro_batch(
        self, groups: Sequence[TokenGroup], totals: Sequence[float], mismatch: float | None, number: int
    ) -> Outcome:
        """Its loss is detached: a graph that lived on would lie, in small pieces, all over the room of the next one's activations."""
        outcome = self.objective(self._measure(groups, mismatch, number), totals=totals, learn=True)
        outcome.loss.backward()
        return replace(outcome, loss=outcome.loss.detach())

    def _through_whole_step(
        self, parts: Sequence[Sequence[TokenGroup]], totals: Sequence[float], mismatch: float | None
    ) -> Outcome:
        with torch.no_grad():
            seen = [self._measure(part, mismatch, number) for number, part in enumerate(parts)]
        whole = joined(seen)
        outcome = self.objective(whole, totals=totals, learn=True)
        outcome.loss.backward()
        pieces = [
            torch.split(leaf.grad, [len(values) for values in sizes])
            for leaf, sizes in zip(whole.differentiable, zip(*(one.differentiable for one in seen), strict=True), strict=True)
            if leaf.grad is not None
        ]
        used = [place for place, leaf in enumerate(whole.differentiable) if leaf.grad is not None]
        for number, (part, grads) in enumerate(zip(parts, zip(*pieces, strict=True), strict=True)):
            again = self._measure(part, mismatch, number).differentiable
            torch.autograd.backward([again[place] for place in used], list(grads))
            del again
        return outcome

    def _measure(self, groups: Sequence[TokenGroup], mismatch: float | None, number: int | None = None) -> Measured:
        """What the policy and its reference say about one micro-batch, the `number`th of a training step."""
        reference_N: Tensor | None = None
        if self.objective.needs_reference:  # first: a live one needs memory that the policy's activations then take
            flat = np.concatenate([values for group in self.reference.of(groups) for values in group])
            reference_N = to_device(flat, self.policy.device)
        unique = merged(groups)
        batch = self.policy.batch(unique.groups)
        if self.reseed is not None and number is not None:
            self.reseed(number)
        response_N = batch.response_N if unique.response_S is None else _response_of_tokens(groups, batch.response_N.device)
        if isinstance(self.policy, RewardModel):
            unknown_N = torch.full(response_N.shape, torch.nan, device=response_N.device)
            score_S = self.policy.scores(batch)
            if unique.response_S is not None:
                score_S = score_S[to_device(unique.response_S, score_S.device)]
            return measured(groups, response_N, unknown_N, score_S=score_S)
        live = self.reference.model if self.objective.needs_token_kl else None
        said = self.policy.token_statistics(
            batch,
            log_square=self.objective.needs_log_square,
            values=self.objective.needs_value_head,
            reference=live,
            reference_scope=self.reference.scope() if live is not None else None,
        ).taken(unique.token_N)
        return measured(
            groups,
            response_N,
            said.logp_N,
            reference_N=reference_N,
            log_square_N=said.log_square_N,
            kl_N=said.kl_N,
            value_N=said.value_N,
            drawn=Drawn.of(groups, said.logp_N) if self.objective.needs_samples else None,
            mismatch=mismatch,
        )

    def _mismatch(self, groups: Sequence[TokenGroup]) -> float | None:
        """Mean log(policy / reference) in nats of the responses of `groups` under other prompts, by the weights of their rows.

        None where it is not needed, 0 where all rows weigh nothing.
        """
        if not self.objective.needs_mismatched:
            return None
        others = [group.mismatched for group in groups if group.mismatched is not None]
        assert len(others) == len(groups), "groups have not been given mismatched prompts"
        with progress.silence():
            ours = self.policy.score(others, micro_batch_tokens=WITHOUT_GRADIENTS * self.micro_batch_tokens)
        theirs = self.reference.of(others)
        ratios = [
            float((policy.astype(np.float64) - reference).sum())
            for of_policy, of_reference in zip(ours, theirs, strict=True)
            for policy, reference in zip(of_policy, of_reference, strict=True)
        ]
        weights = [other.feedback.weight for other in others for _ in other.response_ids]
        return float(np.average(ratios, weights=weights)) if any(weights) else 0.0

    def _values(
        self, groups: Sequence[TokenGroup], cuts: Sequence[Sequence[int]], outcomes: Sequence[Outcome], mismatch: float | None
    ) -> StepValues:
        """Results of the micro-batches in the order of `groups`."""
        order = np.argsort([place for cut in cuts for place in cut])
        counts = np.array([len(groups[place].response_ids) for cut in cuts for place in cut])

        def of_groups(name: str) -> np.ndarray:
            return torch.cat([getattr(outcome, name) for outcome in outcomes]).double().cpu().numpy()[order]

        def of_responses(name: str) -> np.ndarray:
            flat = torch.cat([getattr(outcome, name) for outcome in outcomes]).double().cpu().numpy()
            pieces = np.split(flat, np.cumsum(counts)[:-1])
            return np.concatenate([pieces[place] for place in order])

        statistics = {} if mismatch is None else {"kl": max(0.0, mismatch)}
        for name in outcomes[0].watched:
            statistics[name] = float(sum(outcome.watched[name] for outcome in outcomes))
        for part in self.objective.parts:
            statistics.update({name: running.value for name, running in part.running.items()})
        return StepValues(
            sources=tuple(group.source for group in groups),
            kinds=tuple(group.feedback.kind for group in groups),
            responses=counts[order],
            target=np.array([value for group in groups for value in targets_of(group.feedback, len(group.response_ids))]),
            total=float(sum(outcome.loss.detach() for outcome in outcomes)),
            parts={name: float(sum(outcome.parts[name] for outcome in outcomes)) for name in outcomes[0].parts},
            loss=of_groups("loss_G"),
            ratio=of_responses("ratio_S"),
            reward=of_responses("reward_S"),
            logp=of_responses("logp_S"),
            tokens=of_responses("tokens_S"),
            statistics=statistics,
            compares=not self.objective.needs_samples,
        )


def _response_of_tokens(groups: Sequence[TokenGroup], device: torch.device) -> Tensor:
    """The response of each scored token, counted over `groups`."""
    counts = [int(flags.sum()) for group in groups for flags in group.scored]
    return to_device(np.repeat(np.arange(len(counts)), counts), device)
