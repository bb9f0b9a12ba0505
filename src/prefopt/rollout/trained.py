"""The score of a trained reward model as a reward of sampled responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from prefopt.core.errors import DataError
from prefopt.data.encode import encode_groups
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.tokens import TokenGroup
from prefopt.model.load import load_reward_model
from prefopt.rollout.prompts import Given, as_prompt


def trained_reward(name: str) -> Callable[[Sequence[Given], Sequence[str]], list[float]]:
    """A reward function that scores with the reward model `name` (see `load_reward_model`); ModelError where it is none.

    A response counts as finished: the model's end of turn is put behind its text. A prompt that comes several times in
    a row is computed once.
    """
    model = load_reward_model(name, require_trained=True)

    def scores(prompts: Sequence[Given], responses: Sequence[str]) -> list[float]:
        groups = response_groups(
            f"reward model {name}", prompts, responses, model.tokenizer, context_tokens=model.context_tokens
        )
        found = model.score_groups(groups, title="scoring with the reward model")
        return [float(value) for values in found for value in values]

    return scores


def response_groups(
    name: str,
    prompts: Sequence[Given],
    responses: Sequence[str],
    tokenizer: Any,
    *,
    context_tokens: int,
    template: str = "auto",
) -> Sequence[TokenGroup]:
    """Token ids of responses that came to their end, neighbours with the same prompt in one group, in their order.

    DataError, in which `name` says who reads them, for a prompt that cannot be written or is too long with a response.
    """
    groups: list[Group] = []
    for given, members in groupby(zip(prompts, responses, strict=True), key=lambda pair: pair[0]):
        prompt = as_prompt(given)
        answers = tuple((Turn("assistant", text),) for _, text in members)
        source = f"prompt {len(groups) + 1}"
        groups.append(Group(prompt.turns, answers, Feedback("demonstration"), prompt.form, source))
    tokens = encode_groups(GroupSet(tuple(groups), rows=len(groups), name=name), tokenizer, template=template)
    if tokens.bad:
        raise DataError(f"{name}: {tokens.bad[0]}", todo="Mend or remove this prompt.")
    for group in tokens.groups:
        length = len(group.prompt_ids) + max(len(ids) for ids in group.response_ids)
        if length > context_tokens:
            raise DataError(
                f"{name}: {group.source} with its longest response has {length} tokens",
                todo=f"The model reads at most {context_tokens}; sample shorter responses.",
            )
    return tokens.groups
