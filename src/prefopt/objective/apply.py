"""From log-probs of responses to the loss of a step, by the facts of the chosen losses.

Shapes: G groups, S responses, N scored tokens.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefopt.core.errors import ConfigError
from prefopt.core.losses.facts import LossFacts, Value
from prefopt.core.losses.table import Part, resolve_parts
from prefopt.data.encode import TokenGroup
from prefopt.model.transfer import to_device
from prefopt.objective.measured import Measured, Rows, targets_of
from prefopt.objective.pairs import dpo
from prefopt.objective.quantities import Quantities, Reading
from prefopt.objective.running import Running, running_of

_READING_KNOBS = ("reduce", "ld_alpha", "divergence", "divergence_alpha")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an objective says of some groups.

    `loss`: what is differentiated, already divided by the step's totals. `parts`: the loss of each part by name,
    unweighted, divided likewise; they add up over micro-batches. `loss_G`: the value of each group, before that division;
    NaN for a formula whose values belong to no group. `ratio_S`: log(policy / reference), NaN without a reference. `reward_S`:
    the implicit reward, NaN where the loss has none. The last four of these are detached. `watched`: what else is logged
    (see `prefopt.objective.policy_gradient.WATCHED`), divided like `parts`.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    loss_G: Tensor
    ratio_S: Tensor
    reward_S: Tensor
    logp_S: Tensor
    tokens_S: Tensor
    watched: dict[str, Tensor] = field(default_factory=dict)


class LossPart:
    """One loss of an objective: its formula, its options and its weight."""

    def __init__(self, part: Part) -> None:
        self.facts: LossFacts = part.facts
        self.weight = part.weight
        knobs = dict(part.knobs)
        self.all_knobs: dict[str, Value] = dict(knobs)
        reading = {name: knobs.pop(name) for name in _READING_KNOBS if name in knobs}
        self.reading = Reading(**{"reduce": self.facts.reduce, **reading})  # type: ignore[arg-type]
        self.on_policy_weighting = bool(knobs.pop("wpo", False))
        self.knobs = knobs
        module_name, _, function = self.facts.function.partition(":")
        module = importlib.import_module(module_name)
        self.function: Callable[..., Tensor] = getattr(module, function)
        self.watch: Callable[..., dict[str, Tensor]] | None = getattr(module, "WATCHED", {}).get(function)
        self.running: dict[str, Running] = running_of(self.facts.inputs, self.beta, knobs)

    @property
    def beta(self) -> float:
        return float(self.all_knobs.get("beta", 1.0))

    def values(self, measured: Measured, *, learn: bool) -> tuple[Tensor, Quantities]:
        """Values of the formula, one a unit (see LossFacts.unit), and the quantities they were made of.

        With `learn` the running statistics take in this step first.
        """
        state: dict[str, float] = {}
        if self.running:
            seen = Quantities(measured, self.reading)
            for name, running in self.running.items():
                state[name] = running.update(seen) if learn else running.value
        quantities = Quantities(measured, self.reading, state)
        values = self.function(*(quantities[name] for name in self.facts.inputs), **self.knobs)
        self._check_shape(values, measured)
        if self.on_policy_weighting:
            values = values * quantities.on_policy_weight_G
        return values, quantities

    def _check_shape(self, values: object, measured: Measured) -> None:
        """ConfigError unless there is one value a unit: a mean over the groups would be averaged again, in silence."""
        tokens, responses = len(measured.policy_N), sum(measured.responses_per_group)
        wanted = {"response": (responses,), "every token": (tokens,)}.get(self.facts.unit, (len(measured.feedbacks),))
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if self.facts.unit != "step" and found != wanted:
            raise ConfigError(
                f'the loss "{self.facts.name}" gave {found}, and it must be a tensor of shape {wanted}',
                todo=f"Return one loss a {'response' if self.facts.unit == 'response' else 'group'}, without a mean.",
            )

    def weighted(self, values: Tensor, rows: Rows, measured: Measured) -> tuple[Tensor, Tensor]:
        """(values times the weights of their rows, the same summed for each group; NaN where they belong to none)."""
        if self.facts.unit == "step":
            return values, torch.full_like(rows.weight_G, math.nan)
        if self.facts.unit == "every token":
            group_N = rows.group_S[measured.response_N]
            weighted = values * rows.weight_G[group_N]
            return weighted, torch.zeros_like(rows.weight_G).index_add(0, group_N, weighted.detach())
        if self.facts.unit == "response":
            weighted = values * rows.weight_G[rows.group_S]
            return weighted, torch.zeros_like(rows.weight_G).index_add(0, rows.group_S, weighted.detach())
        weight_G = rows.weight_G * _imitable(rows) if self.facts.unit == "token" else rows.weight_G
        return values * weight_G, (values * weight_G).detach()

    def total(self, groups: Sequence[TokenGroup]) -> float:
        """What the values of these groups are divided by: their weights, added up over the units of the loss."""
        unit = self.facts.unit
        weights = [group.feedback.weight for group in groups]
        if unit == "response":
            weights = [weight * len(group.response_ids) for weight, group in zip(weights, groups, strict=True)]
        if unit == "every token":
            tokens = [sum(int(flags.sum()) for flags in group.scored) for group in groups]
            weights = [weight * count for weight, count in zip(weights, tokens, strict=True)]
        if unit == "token":
            weights = [
                weight * imitated_tokens(group.feedback, [int(flags.sum()) for flags in group.scored])
                for weight, group in zip(weights, groups, strict=True)
            ]
        return math.fsum(weights) or 1.0


def _imitable(rows: Rows) -> Tensor:
    """1 for groups whose best response is good, 0 for an undesirable one and for ties."""
    best_S = rows.target_S[rows.order_GK[:, 0]]
    labels = to_device(np.array([kind in ("label", "pair") for kind in rows.kinds]), best_S.device)
    return (~labels | (best_S > 0.5)).to(rows.weight_G.dtype)


def imitated_tokens(feedback: object, tokens: Sequence[int]) -> int:
    """Scored tokens of the response that `sft` imitates in a group with these counts; 0 where there is none."""
    from prefopt.data.groups import Feedback
    from prefopt.data.projections import best_first

    assert isinstance(feedback, Feedback)
    best = best_first(feedback, len(tokens))[0]
    bad = feedback.kind in ("label", "pair") and targets_of(feedback, len(tokens))[best] <= 0.5
    return 0 if bad else tokens[best]


class Objective:
    """One loss, or a weighted sum of several, with their options, as a function of what a model said.

    `options` is a loss section of the configuration (`{"name": "dpo", "beta": 0.1}`, `{"dpo": 1.0, "sft": 0.2}`).
    Raises ConfigError for names and options that are not known.
    """

    def __init__(self, options: Mapping[str, Value | Mapping[str, Value]]) -> None:
        self.parts = tuple(LossPart(part) for part in resolve_parts(options))
        rewarding = [part for part in self.parts if part.facts.implicit_reward != "none"]
        self.rewarding = rewarding[0] if rewarding else None
        self.beta = self.rewarding.beta if self.rewarding else 1.0

    @property
    def name(self) -> str:
        return " + ".join(part.facts.name for part in self.parts)

    @property
    def step_wide(self) -> bool:
        """Whether all groups of a step must be seen at once."""
        return any(part.facts.step_wide for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(part.facts.needs_reference for part in self.parts)

    @property
    def needs_samples(self) -> bool:
        return any(part.facts.needs_samples for part in self.parts)

    @property
    def needs_value_head(self) -> bool:
        return any(part.facts.needs_value_head for part in self.parts)

    @property
    def needs_token_kl(self) -> bool:
        return any(part.facts.needs_live_reference for part in self.parts)

    @property
    def needs_mismatched(self) -> bool:
        return any(part.facts.needs_mismatched for part in self.parts)

    @property
    def needs_log_square(self) -> bool:
        return any(part.on_policy_weighting for part in self.parts)

    @property
    def trains_reward_model(self) -> bool:
        return any(part.facts.trains_reward_model for part in self.parts)

    def totals(self, groups: Sequence[TokenGroup]) -> tuple[float, ...]:
        """What each part is divided by in a step of `groups`: micro-batches of the step share it."""
        return tuple(part.total(groups) for part in self.parts)

    def __call__(self, measured: Measured, *, totals: Sequence[float], learn: bool = False) -> Outcome:
        """The loss of `measured`, divided by `totals`. With `learn`, running statistics take this step in."""
        rows = measured.rows
        zero = measured.policy_N.new_zeros(())
        loss = zero
        loss_G = torch.zeros_like(rows.weight_G)
        shares: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        kept: dict[int, Quantities] = {}
        for number, (part, total) in enumerate(zip(self.parts, totals, strict=True)):
            values, kept[number] = part.values(measured, learn=learn)
            weighted, of_group_G = part.weighted(values, rows, measured)
            divide_by = len(values) if part.facts.unit == "step" else total
            share = weighted.sum() / divide_by
            loss = loss + part.weight * share
            loss_G = loss_G + part.weight * of_group_G
            shares[part.facts.name] = share.detach()
            if part.watch is not None:
                with torch.no_grad():
                    seen = part.watch(kept[number], **part.knobs)
                    watched |= {name: part.weighted(value, rows, measured)[0].sum() / divide_by for name, value in seen.items()}
        rewarding = self.parts.index(self.rewarding) if self.rewarding else 0
        return Outcome(loss, shares, loss_G, *_described(kept[rewarding], self.rewarding), watched)

    def state(self) -> dict[str, dict[str, float]]:
        """Running statistics by loss and name, as kept in a checkpoint."""
        return {f"{part.facts.name}.{name}": running.state() for part in self.parts for name, running in part.running.items()}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what `state()` gave."""
        for part in self.parts:
            for name, running in part.running.items():
                running.load(state[f"{part.facts.name}.{name}"])

    def described(self) -> dict[str, object]:
        """Names, weights and options of all parts: what makes two objectives the same."""
        return {part.facts.name: {"weight": part.weight, **part.all_knobs} for part in self.parts}


def _described(quantities: Quantities, rewarding: LossPart | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-ratio, implicit reward, log-prob, scored tokens) of each response, detached; NaN where there is none."""
    with torch.no_grad():
        tokens_S, logp_S = quantities.tokens_S, quantities.logp_S
        unknown_S = torch.full_like(tokens_S, math.nan)
        ratio_S = quantities.plain_ratio_S.detach() if quantities.measured.reference_N is not None else unknown_S
        if rewarding is None:
            return ratio_S, unknown_S, logp_S.detach(), tokens_S
        kind = rewarding.facts.implicit_reward
        if kind == "score":
            return ratio_S, quantities.score_S.detach(), logp_S.detach(), tokens_S
        reward_S = {"ratio": ratio_S, "logp": logp_S, "mean_logp": logp_S / tokens_S}[kind]
        return ratio_S, rewarding.beta * reward_S.detach(), logp_S.detach(), tokens_S


def dpo_loss(
    policy_logps: tuple[Tensor, Tensor],
    reference_logps: tuple[Tensor, Tensor],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO on log-probs that are already there: (loss, rewards of the chosen, rewards of the rejected).

    Each argument is (chosen, rejected): log-probs in nats summed over the response's tokens, shape (G,) or scalars.
    `reduction` is "mean" or "none" (loss per pair). Rewards are beta * (policy - reference), detached.
    Raises ValueError for another reduction, a beta that is not positive or a label_smoothing outside [0, 0.5]. arXiv 2305.18290 eq. 7.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is "{reduction}"; it must be "mean" or "none"')
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be from 0 to 0.5")
    chosen, rejected = (
        torch.as_tensor(policy) - torch.as_tensor(reference)
        for policy, reference in zip(policy_logps, reference_logps, strict=True)
    )
    loss = dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return (loss.mean() if reduction == "mean" else loss), beta * chosen.detach(), beta * rejected.detach()
