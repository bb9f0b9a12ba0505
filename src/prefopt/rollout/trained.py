"""The score of a trained reward model as a reward of sampled responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from prefopt.core.errors import DataError
from prefopt.core.past_run import run_config
from prefopt.data.encode import encode_groups
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.tokens import TokenGroup
from prefopt.model.load import load_reward_model
from prefopt.rollout.prompts import Given, as_prompt


def trained_reward(name: str) -> Callable[..., list[float]]:
    """A reward function that scores with the reward model `name` (see `load_reward_model`); ModelError where it is none.

    The model's end of turn is put behind the text of a response, unless `finished` says that it was cut. Prompts are written
    as in the run that trained the model. A prompt that comes several times in a row is computed once.
    """
    model = load_reward_model(name, require_trained=True)
    config = run_config(name)
    template = "auto" if config is None else config.data.template

    def scores(prompts: Sequence[Given], responses: Sequence[str], finished: Sequence[bool] | None = None) -> list[float]:
        groups = response_groups(
            f"reward model {name}",
            prompts,
            responses,
            model.tokenizer,
            finished=finished,
            context_tokens=model.context_tokens,
            template=template,
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
    finished: Sequence[bool] | None = None,
    context_tokens: int,
    template: str = "auto",
) -> Sequence[TokenGroup]:
    """Token ids of responses, neighbours with the same prompt in one group, in their order.

    All came to their end, unless `finished` says otherwise; one without text ends at once, for it has no other token.
    DataError, in which `name` says who reads them, for a prompt that cannot be written or is too long with a response.
    """
    groups: list[Group] = []
    ends = [True] * len(responses) if finished is None else finished
    for given, neighbours in groupby(zip(prompts, responses, ends, strict=True), key=lambda one: one[0]):
        prompt, members = as_prompt(given), list(neighbours)
        answers = tuple((Turn("assistant", text),) for _, text, _ in members)
        done = tuple(end or not text.strip() for _, text, end in members)
        source = f"prompt {len(groups) + 1}"
        groups.append(Group(prompt.turns, answers, Feedback("demonstration"), prompt.form, source, finished=done))
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
