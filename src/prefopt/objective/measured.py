"""What a model said about the responses of some groups, and what is known about them: the input of every objective.

Shapes: G groups, S responses, N scored tokens, K responses of the largest group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.data.projections import best_first
from prefopt.model.transfer import to_device


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known about the responses of some groups, as tensors.

    `group_S`: group of each response. `first_G`: first response of each group. `order_GK`: places of responses from
    best to worst, -1 beyond the last. `target_S`: how good the response is said to be, comparable within a group (and,
    for labels, between groups); NaN for demonstrations.
    """

    kinds: tuple[str, ...]
    group_S: Tensor
    first_G: Tensor
    order_GK: Tensor
    target_S: Tensor
    weight_G: Tensor
    margin_G: Tensor
    probability_G: Tensor
    tie_G: Tensor


def rows_of(feedbacks: Sequence[Feedback], responses_per_group: Sequence[int], like: Tensor) -> Rows:
    """The rows of these groups, on the device and in the dtype of `like`."""
    counts = np.asarray(responses_per_group)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    order = np.full((len(counts), int(counts.max())), -1)
    for number, (feedback, count) in enumerate(zip(feedbacks, counts, strict=True)):
        order[number, :count] = first[number] + np.asarray(best_first(feedback, int(count)))

    def column(values: Sequence[float | None], missing: float) -> Tensor:
        known = [missing if value is None else float(value) for value in values]
        return to_device(np.array(known), like.device).to(like.dtype)

    def places(values: np.ndarray) -> Tensor:
        return to_device(values.astype(np.int64), like.device)

    targets = [value for feedback, count in zip(feedbacks, counts, strict=True) for value in targets_of(feedback, int(count))]
    return Rows(
        kinds=tuple(feedback.kind for feedback in feedbacks),
        group_S=places(np.repeat(np.arange(len(counts)), counts)),
        first_G=places(first),
        order_GK=places(order),
        target_S=column(targets, float("nan")),
        weight_G=column([feedback.weight for feedback in feedbacks], 1.0),
        margin_G=column([feedback.margin for feedback in feedbacks], 0.0),
        probability_G=column([feedback.probability for feedback in feedbacks], 1.0),
        tie_G=column([feedback.tie for feedback in feedbacks], 0.0),
    )


def targets_of(feedback: Feedback, responses: int) -> tuple[float, ...]:
    """How good each response is said to be: 1 and 0 for pairs and labels, the scores, or K - rank; NaN where unknown."""
    if feedback.kind == "pair":
        return (0.5, 0.5) if feedback.tie else (1.0, 0.0)
    if feedback.kind == "label":
        return (float(bool(feedback.label)),)
    if feedback.kind == "scores":
        return feedback.scores
    if feedback.kind == "ranking":
        return tuple(float(responses - rank) for rank in feedback.ranking)
    return (float("nan"),) * responses


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was known of sampled tokens when they were drawn, shape (N,) each; values are None without a value head."""

    old_logp_N: Tensor
    advantage_N: Tensor
    old_value_N: Tensor | None
    return_N: Tensor | None

    @classmethod
    def of(cls, groups: Sequence[TokenGroup], like: Tensor) -> Drawn:
        """That of `groups`, each of which has an experience, on the device and in the dtype of `like`."""

        def flat(name: str) -> Tensor | None:
            values = [part for group in groups for part in getattr(group.experience, name)]
            return to_device(np.concatenate(values), like.device).to(like.dtype) if values else None

        old_logp_N, advantage_N = flat("old_logps"), flat("advantages")
        assert old_logp_N is not None and advantage_N is not None, "these groups are no samples"
        return cls(old_logp_N, advantage_N, flat("old_values"), flat("returns"))


@dataclass(frozen=True, slots=True)
class Measured:
    """Log-probs of the scored tokens of some groups (nats), or scores of a reward model.

    `tokens_S` counts scored tokens. `log_square_N`: log of the sum of squared probabilities, for WPO's weights.
    `kl_N`: KL(reference || policy) of the next token. `score_S`: a reward model's score, and then log-probs are empty.
    `value_N`: what the value head predicts before each token. `drawn`: what was known of samples of the policy.
    `mismatch`: mean log(policy / reference) of the step's responses under other prompts, a number in nats.
    """

    feedbacks: tuple[Feedback, ...]
    responses_per_group: tuple[int, ...]
    response_N: Tensor
    policy_N: Tensor
    reference_N: Tensor | None = None
    log_square_N: Tensor | None = None
    kl_N: Tensor | None = None
    score_S: Tensor | None = None
    value_N: Tensor | None = None
    drawn: Drawn | None = None
    mismatch: float | None = None

    @property
    def rows(self) -> Rows:
        return rows_of(self.feedbacks, self.responses_per_group, self.policy_N)

    @property
    def differentiable(self) -> list[Tensor]:
        """What gradients flow through, in a fixed order."""
        return [value for value in (self.policy_N, self.kl_N, self.score_S, self.value_N) if value is not None]


def measured(
    groups: Sequence[TokenGroup], response_N: Tensor, policy_N: Tensor, **more: Tensor | Drawn | float | None
) -> Measured:
    """A Measured of `groups`; `more` are its optional fields."""
    return Measured(
        tuple(group.feedback for group in groups),
        tuple(len(group.response_ids) for group in groups),
        response_N,
        policy_N,
        **more,  # type: ignore[arg-type]
    )


def joined(parts: Sequence[Measured]) -> Measured:
    """Several micro-batches as one, detached, its differentiable tensors as leaves: for formulas that need a whole step."""
    offsets = np.concatenate([[0], np.cumsum([sum(part.responses_per_group) for part in parts])[:-1]])

    def cat(name: str, *, leaf: bool = False) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        whole = torch.cat([value.detach() for value in values])
        return whole.requires_grad_() if leaf else whole

    policy_N = cat("policy_N", leaf=True)
    assert policy_N is not None
    return Measured(
        feedbacks=tuple(feedback for part in parts for feedback in part.feedbacks),
        responses_per_group=tuple(count for part in parts for count in part.responses_per_group),
        response_N=torch.cat([part.response_N + int(offset) for part, offset in zip(parts, offsets, strict=True)]),
        policy_N=policy_N,
        reference_N=cat("reference_N"),
        log_square_N=cat("log_square_N"),
        kl_N=cat("kl_N", leaf=True),
        score_S=cat("score_S", leaf=True),
        value_N=cat("value_N", leaf=True),
        drawn=_joined_drawn([part.drawn for part in parts if part.drawn is not None]),
        mismatch=parts[0].mismatch,
    )


def _joined_drawn(parts: Sequence[Drawn]) -> Drawn | None:
    if not parts:
        return None

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    old_logp_N, advantage_N = cat("old_logp_N"), cat("advantage_N")
    assert old_logp_N is not None and advantage_N is not None
    return Drawn(old_logp_N, advantage_N, cat("old_value_N"), cat("return_N"))
