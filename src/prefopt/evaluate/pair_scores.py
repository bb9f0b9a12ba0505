"""Scores of the responses of preference rows, by the implicit reward of a policy, a reward model, or a reward of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.core.progress import say
from prefopt.data.encode import TokenGroup, encode_groups
from prefopt.data.groups import Group, GroupSet
from prefopt.evaluate.heldout import response_sums
from prefopt.evaluate.intervals import Floats
from prefopt.evaluate.subject import Subject, run_config
from prefopt.model.engine import LanguageModel
from prefopt.model.load import load_model, load_reward_model
from prefopt.rollout.prompts import Prompt
from prefopt.rollout.rewards import Reward

Scores = list[NDArray[Any]]  # of each group one score a response


def implicit_scores(subject: Subject, groups: GroupSet, *, template: str = "auto") -> tuple[Scores, list[TokenGroup]]:
    """beta * log(policy / reference) of every response, and the groups that fit the context of both models."""
    policy = load_model(subject.policy)
    encoded = encode_groups(groups, policy.tokenizer, **_as_trained(subject.policy, template)).groups
    reference = load_model(subject.reference)
    kept = _fitting(encoded, min(policy.context_tokens, reference.context_tokens))
    return _log_ratios(policy, reference, kept, subject.beta), kept


def trained_scores(name: str, groups: GroupSet, *, template: str = "auto") -> tuple[Scores, list[TokenGroup]]:
    """Scores of the reward model `name`, and the groups that fit its context."""
    model = load_reward_model(name, require_trained=True)
    encoded = encode_groups(groups, model.tokenizer, **_as_trained(name, template)).groups
    kept = _fitting(encoded, model.context_tokens)
    return list(model.score_groups(kept, title="scoring with the reward model")), kept


def text_scores(reward: Reward, groups: GroupSet) -> tuple[Scores, list[Group]]:
    """Scores of a reward that reads texts, and the groups whose responses are one text each."""
    kept = [group for group in groups.groups if not group.tools and all(map(_is_text, group.responses))]
    if left_out := len(groups.groups) - len(kept):
        say(f"{left_out} rows with tools or responses of several turns are left out: {reward.name} reads one text")
    prompts = [Prompt(group.prompt, group.form, group.source).given for group in kept for _ in group.responses]
    flat = iter(reward(prompts, [response[0].content for group in kept for response in group.responses]))
    return [np.array([next(flat) for _ in group.responses]) for group in kept], kept


def implicit_margins(subject: Subject, policy: LanguageModel, pairs: Sequence[TokenGroup]) -> Floats:
    """beta * (log-ratio of chosen - log-ratio of rejected) of pairs, shape (pairs,)."""
    scores = _log_ratios(policy, load_model(subject.reference), pairs, subject.beta)
    return np.array([chosen - rejected for chosen, rejected in scores], dtype=np.float64)


def _log_ratios(policy: LanguageModel, reference: LanguageModel, groups: Sequence[TokenGroup], beta: float) -> Scores:
    ours = policy.score(groups, title="scoring with the policy")
    theirs = reference.score(groups, title="scoring with the reference")
    return [beta * (response_sums([own])[0] - response_sums([their])[0]) for own, their in zip(ours, theirs, strict=True)]


def _fitting(groups: Sequence[TokenGroup], context_tokens: int) -> list[TokenGroup]:
    kept = [group for group in groups if len(group.prompt_ids) + max(map(len, group.response_ids)) <= context_tokens]
    if over := len(groups) - len(kept):
        say(f"{over} rows longer than the context of {context_tokens} tokens are left out")
    return kept


def _is_text(response: Sequence[Any]) -> bool:
    return len(response) == 1 and not response[0].tool_calls


def _as_trained(name: str, template: str) -> dict[str, Any]:
    """How rows become tokens: as in the run that `name` is, unless a template is given."""
    config = run_config(name)
    if config is None:
        return {"template": template}
    return {"template": config.data.template if template == "auto" else template, "train_on": config.data.train_on}
