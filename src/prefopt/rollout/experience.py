"""A round of learning from the policy's own samples: responses, what they earn, and what is learned from them.

Shapes: S responses of the round, K responses to each prompt, neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from prefopt.core.errors import TrainingError
from prefopt.core.progress import silence
from prefopt.core.rollout_config import RolloutConfig
from prefopt.data.groups import Feedback
from prefopt.data.tokens import Experience, TokenGroup
from prefopt.model.engine import LanguageModel, TokenNumbers
from prefopt.model.reference import Reference
from prefopt.rollout import advantages
from prefopt.rollout.advantages import Floats
from prefopt.rollout.prompts import Prompt, prompt_text
from prefopt.rollout.rewards import Reward
from prefopt.rollout.sample import SampleRow, sample, scores_of

_SHOWN = 8  # samples of a round that are written down


@dataclass(frozen=True)
class Round:
    """What one round gave: groups to train on, metrics under TRL's names (docs/rlhf.md), the KL coefficient of the next
    round, and some samples with their scores for people to read."""

    groups: tuple[TokenGroup, ...]
    metrics: dict[str, float]
    next_kl_coefficient: float
    shown: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Learning:
    """What the samples of a round are made into, as the loss needs it: `advantages` (gae, leave_one_out, group_normalised)
    for policy gradients, or None for preferences, as settings.pairing says."""

    advantages: str | None
    settings: RolloutConfig


class DrawnReference:
    """A reference that does not move: samples keep the log-probs that it gave them when they were drawn."""

    def __init__(self, inner: Reference) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.model = inner.model

    def of(self, groups: Sequence[TokenGroup]) -> list[TokenNumbers]:
        known = [group.experience.reference_logps for group in groups if group.experience is not None]
        return known if len(known) == len(groups) else self.inner.of(groups)

    def scope(self) -> AbstractContextManager[None]:
        return self.inner.scope()


def make_round(
    policy: LanguageModel,
    reference: Reference,
    reward: Reward,
    prompts: Sequence[Prompt],
    learning: Learning,
    *,
    seed: int,
    kl_coefficient: float,
    template: str = "auto",
    micro_batch_tokens: int = 4096,
) -> Round:
    """Sample the policy on `prompts`, score, and make groups to train on.

    `seed` decides samples and drawn labels. `kl_coefficient`: price of a nat in this round. TrainingError where nothing can
    be learned from the round.
    """
    settings = learning.settings
    rows = sample(
        policy,
        prompts,
        n=settings.samples_per_prompt,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=seed,
        template=template,
        title="sampling a round",
    )
    raw = np.array(scores_of(reward, rows), dtype=np.float64)
    scores = raw - settings.missing_end_penalty * np.array([not row.finished for row in rows])
    groups = sampled_groups(rows, scores, settings.samples_per_prompt)
    with silence():
        values: list[TokenNumbers] = []
        if learning.advantages == "gae":
            logps, values = policy.score_with_values(groups, micro_batch_tokens=micro_batch_tokens)
        else:
            logps = policy.score(groups, micro_batch_tokens=micro_batch_tokens)
        theirs = reference.of(groups)
    groups = [
        replace(group, experience=Experience(old_logps=ours, reference_logps=tuple(other)))
        for group, ours, other in zip(groups, logps, theirs, strict=True)
    ]
    kl_S, metrics = _described(rows, groups, raw, scores, kl_coefficient)
    if learning.advantages is not None:
        made = with_advantages(groups, values, scores, learning, kl_coefficient)
    else:
        made, metrics["objective/groups"] = _preferences(groups, rows, learning, seed)
    after = kl_coefficient
    if settings.kl_target is not None:
        after = advantages.adapted(
            kl_coefficient, kl=float(kl_S.mean()), target=settings.kl_target, responses=len(rows), horizon=settings.kl_horizon
        )
    return Round(tuple(made), metrics, after, _shown(rows, raw, kl_S))


def sampled_groups(rows: Sequence[SampleRow], scores: Floats, samples: int) -> list[TokenGroup]:
    """Token groups of `samples` neighbours each, with every token scored and their scores as feedback."""
    found = []
    for start in range(0, len(rows), samples):
        members = rows[start : start + samples]
        found.append(
            TokenGroup(
                prompt_ids=members[0].prompt_ids,
                response_ids=tuple(row.response_ids for row in members),
                scored=tuple(np.ones(len(row.response_ids), dtype=np.bool_) for row in members),
                feedback=Feedback("scores", scores=tuple(scores[start : start + samples].tolist())),
                source=f"sample {start // samples + 1} of the round",
                finished=tuple(row.finished for row in members),
            )
        )
    return found


def with_advantages(
    groups: Sequence[TokenGroup], values: Sequence[TokenNumbers], scores: Floats, learning: Learning, kl_coefficient: float
) -> list[TokenGroup]:
    """`groups` with the advantage of each token, and for gae its value and its return, in their experience.

    `values`: of the value head, for gae only. `scores` (S,): what responses earned, penalties taken off.
    """
    settings = learning.settings
    ratios = _log_ratios(groups)
    if learning.advantages == "gae":
        flat_values = [np.asarray(part, dtype=np.float64) for of_group in values for part in of_group]
        rewards = [
            advantages.token_rewards(float(score), ratio, kl_coefficient) for score, ratio in zip(scores, ratios, strict=True)
        ]
        if settings.whiten_rewards:
            rewards = advantages.scaled(rewards)
        found = [
            advantages.gae(reward, value, discount=settings.discount, gae_lambda=settings.gae_lambda)
            for reward, value in zip(rewards, flat_values, strict=True)
        ]
        gained, returns = [advantage for advantage, _ in found], [of_return for _, of_return in found]
        if settings.normalise_advantages:
            gained = advantages.normalised(gained)
    else:
        compared = {"leave_one_out": advantages.leave_one_out, "group_normalised": advantages.group_normalised}
        earned = scores - kl_coefficient * np.array([ratio.sum() for ratio in ratios])
        of_response = compared[str(learning.advantages)](earned, settings.samples_per_prompt)
        gained = [np.full(len(ratio), value) for ratio, value in zip(ratios, of_response, strict=True)]
        flat_values, returns = [], []
    return _in_groups(groups, advantages=gained, old_values=flat_values, returns=returns)


def _in_groups(groups: Sequence[TokenGroup], **parts: Sequence[Floats]) -> list[TokenGroup]:
    """`groups` with one array a response, by name, in their experience."""
    made, start = [], 0
    for group in groups:
        end = start + len(group.response_ids)
        of_group = {name: tuple(part.astype(np.float32) for part in given[start:end]) for name, given in parts.items()}
        assert group.experience is not None
        made.append(replace(group, experience=replace(group.experience, **of_group)))
        start = end
    return made


def _log_ratios(groups: Sequence[TokenGroup]) -> list[Floats]:
    """log(policy / reference) of the tokens of each response, in nats."""
    found = []
    for group in groups:
        assert group.experience is not None
        pairs = zip(group.experience.old_logps, group.experience.reference_logps, strict=True)
        found += [ours.astype(np.float64) - theirs for ours, theirs in pairs]
    return found


def _described(
    rows: Sequence[SampleRow], groups: Sequence[TokenGroup], raw: Floats, scores: Floats, kl_coefficient: float
) -> tuple[Floats, dict[str, float]]:
    """(log(policy / reference) of each response in nats, metrics of the round)."""
    kl_S = np.array([ratio.sum() for ratio in _log_ratios(groups)])
    entropy_S = [-float(part.sum()) for group in groups if group.experience for part in group.experience.old_logps]
    return kl_S, {
        "objective/scores": float(raw.mean()),
        "objective/scores_std": float(raw.std()),
        "objective/kl": float(kl_S.mean()),
        "objective/kl_coefficient": kl_coefficient,
        "objective/non_score_reward": float(-kl_coefficient * kl_S.mean()),
        "objective/rlhf_reward": float(scores.mean() - kl_coefficient * kl_S.mean()),
        "objective/entropy": float(np.mean(entropy_S)),
        "objective/responses": float(len(rows)),
        "objective/length": float(np.mean([len(row.response_ids) for row in rows])),
        "objective/finished": float(np.mean([row.finished for row in rows])),
    }


def _preferences(
    groups: Sequence[TokenGroup], rows: Sequence[SampleRow], learning: Learning, seed: int
) -> tuple[list[TokenGroup], float]:
    """Pairs, or groups of scored responses, of the samples; and how many there are."""
    samples = learning.settings.samples_per_prompt
    random = np.random.default_rng([seed, 1])
    made: list[TokenGroup] = []
    for number, group in enumerate(groups):
        texts = [row.response.strip() for row in rows[number * samples : (number + 1) * samples]]
        made += preferences_of(group, texts, learning.settings.pairing, random)
    if not made:
        raise TrainingError(
            f"a round of {len(rows)} responses to {len(groups)} prompts gave no preference: all scores of a prompt are equal",
            todo="Draw more responses a prompt (rollout.samples_per_prompt), raise the temperature, or use a finer reward.",
        )
    return made, float(len(made))


def preferences_of(group: TokenGroup, texts: Sequence[str], pairing: str, random: np.random.Generator) -> list[TokenGroup]:
    """What the scores of a sampled group say of its responses, as `pairing` says; equal texts and equal scores say nothing."""
    scores = group.feedback.scores
    if pairing == "scores":
        return [group] if len(set(scores)) > 1 else []
    if pairing == "best-worst":
        wanted = [(int(np.argmax(scores)), int(np.argmin(scores)))]
    else:
        wanted = [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    made = []
    for better, worse in wanted:
        difference = scores[better] - scores[worse]
        if difference == 0 or texts[better] == texts[worse]:
            continue
        if pairing == "bradley-terry" and random.random() >= 1 / (1 + np.exp(-difference)):
            better, worse, difference = worse, better, -difference
        made.append(_pair(group, better, worse, difference))
    return made


def _pair(group: TokenGroup, chosen: int, rejected: int, margin: float) -> TokenGroup:
    def both(values: Sequence[Any]) -> tuple[Any, Any]:
        return values[chosen], values[rejected]

    drawn = group.experience
    assert drawn is not None
    return replace(
        group,
        response_ids=both(group.response_ids),
        scored=both(group.scored),
        finished=both(group.finished),
        feedback=Feedback("pair", margin=float(margin)),
        experience=Experience(old_logps=both(drawn.old_logps), reference_logps=both(drawn.reference_logps)),
    )


def _shown(rows: Sequence[SampleRow], scores: Floats, kl_S: Floats) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"prompt": prompt_text(row.prompt), "response": row.response, "score": float(score), "kl": float(kl)}
        for row, score, kl in zip(rows[:_SHOWN], scores, kl_S, strict=False)
    )
