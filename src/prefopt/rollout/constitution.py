"""Responses that a model criticises and revises by principles (Constitutional AI, arXiv 2212.08073)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefopt.core.errors import ConfigError, DataError
from prefopt.rollout.judges.chat import Answer, ChatModel, Conversation
from prefopt.rollout.label import as_prompt_is
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given, Prompt, as_prompt

_ONLY_THE_RESPONSE = "Write only the new response, with nothing before it or after it."


@dataclass(frozen=True, slots=True)
class RevisedRows:
    """Demonstrations, and how many responses gave none, by reason. `unchanged` rows have the first response again."""

    rows: list[dict[str, Any]]
    skipped: dict[str, int]
    unchanged: int = 0


def revise(
    prompts: Sequence[Prompt | Given],
    model: ChatModel,
    principles: Sequence[Principle],
    *,
    first: Sequence[str] | None = None,
    rounds: int = 1,
    seed: int = 0,
) -> RevisedRows:
    """Rows {prompt, completion, first_response, critiques, principles, judge}: a response, criticised and revised.

    The first responses are the model's own unless given. In each of `rounds` the model is asked for a critique of the
    response by a principle, then for a revision in view of it. The principles of a prompt are drawn with `seed`, none again
    before all had their turn. Responses, critiques and revisions that are empty, and revisions that reached the limit of
    tokens, are left out and counted. Each answer is kept as it arrives: a run that was killed goes on where it stopped.
    """
    if rounds < 1 or not principles:
        raise ConfigError(f"rounds: {rounds}, principles: {len(principles)}", todo="At least one of each is needed.")
    if first is not None and len(first) != len(prompts):
        raise DataError(f"{len(prompts)} prompts and {len(first)} first responses", todo="Give one for each prompt.")
    asked = [as_prompt(prompt, source=f"prompt {at}") for at, prompt in enumerate(prompts)]
    turns = [[{"role": turn.role, "content": turn.content} for turn in prompt.turns] for prompt in asked]
    opening = [Answer(text) for text in first] if first is not None else model.answer(turns, unit="first responses")
    skipped: Counter[str] = Counter()
    drafts = [
        _Draft(number, turns[number], answer.text)
        for number, answer in enumerate(opening)
        if _usable(answer, "first response", skipped)
    ]
    orders = [np.random.default_rng([seed % 2**64, number]).permutation(len(principles)) for number in range(len(asked))]
    for at in range(rounds):
        by = {draft.number: principles[int(orders[draft.number][at % len(principles)])] for draft in drafts}
        drafts = _round(drafts, by, model, skipped)
    rows = [_row(asked[draft.number].given, opening[draft.number].text, draft, model.name) for draft in drafts]
    unchanged = sum(draft.response.strip() == opening[draft.number].text.strip() for draft in drafts)
    return RevisedRows(rows, dict(+skipped), unchanged)


@dataclass(frozen=True, slots=True)
class _Draft:
    """The response to prompt `number` as it stands, with the critiques that led to it."""

    number: int
    turns: Conversation
    response: str
    critiques: tuple[str, ...] = ()
    principles: tuple[str, ...] = ()


def _round(drafts: list[_Draft], by: Mapping[int, Principle], model: ChatModel, skipped: Counter[str]) -> list[_Draft]:
    """A critique and a revision of every draft, by the principle of its prompt."""
    asked = [[*draft.turns, _assistant(draft.response), _user(by[draft.number].critique)] for draft in drafts]
    criticised: list[tuple[_Draft, Conversation]] = []
    for draft, turns, answer in zip(drafts, asked, model.answer(asked, unit="critiques"), strict=True):
        if _usable(answer, "critique", skipped):
            said, principle = answer.text.strip(), by[draft.number]
            critiques, names = (*draft.critiques, said), (*draft.principles, principle.name)
            wanted = [*turns, _assistant(said), _user(f"{principle.revision}\n\n{_ONLY_THE_RESPONSE}")]
            criticised.append((replace(draft, critiques=critiques, principles=names), wanted))
    answers = model.answer([wanted for _, wanted in criticised], unit="revisions")
    revised = []
    for (draft, _), answer in zip(criticised, answers, strict=True):
        if _usable(answer, "revision", skipped, whole=True):
            revised.append(replace(draft, response=answer.text.strip()))
    return revised


def _usable(answer: Answer, what: str, skipped: Counter[str], *, whole: bool = False) -> bool:
    """Whether `answer` can be gone on with; if not, why is counted. With `whole` it has to have come to its end."""
    if answer.too_long:
        skipped[f"no room for the {what} in the context"] += 1
    elif whole and not answer.finished:
        skipped[f"{what} cut at the limit of tokens"] += 1
    elif not answer.text.strip():
        skipped[f"empty {what}"] += 1
    else:
        return True
    return False


def _row(prompt: Given, first: str, draft: _Draft, judge: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion": as_prompt_is(prompt, draft.response),
        "first_response": first,
        "critiques": list(draft.critiques),
        "principles": list(draft.principles),
        "judge": judge,
    }


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
