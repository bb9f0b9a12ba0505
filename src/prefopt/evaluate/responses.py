"""Responses to compare: sampled from a model, written earlier to a file, or those that preference rows prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.core.progress import say
from prefopt.data.groups import Group, Turn
from prefopt.data.load import load_groups
from prefopt.data.read import TEXT_SUFFIXES, read_rows
from prefopt.evaluate.evaluation import SampleSettings, draw_samples
from prefopt.evaluate.win_rate import Match
from prefopt.model.load import load_model
from prefopt.rollout.prompts import Prompt, as_prompt

Turns = tuple[Turn, ...]
_FILES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
_WANTED = "prompt and responses, as prefopt sample writes them; prompt and response; or preference rows, whose preferred response is taken"


@dataclass(frozen=True, slots=True)
class Responses:
    """`texts[i]`: the responses of `name` to `prompts[i]`, at least one; no prompt is there twice."""

    name: str
    prompts: list[Prompt]
    texts: list[list[str]]


def is_stored(name: str) -> bool:
    """Whether `name` is a file of rows, and so not a model."""
    return name.lower().endswith(_FILES)


def stored_responses(path: str) -> Responses:
    """Responses of a file: `responses` or `response` to a `prompt`, or the preferred response of preference rows.

    Responses to one prompt are put together. Rows that prefer nothing, or whose response is not one text, are counted and
    left out. DataError where nothing is left.
    """
    raw = read_rows(path)
    if raw.bad:
        raise DataError(str(raw.bad[0]), todo=f"Mend or remove this row. A row has {_WANTED}.")
    listed = "responses" in raw.rows[0] and not {"scores", "ranking"} & set(raw.rows[0])
    found: dict[Turns, tuple[Prompt, list[str]]] = {}
    left_out = 0
    for prompt, texts in _listed(raw.rows, raw.sources) if listed else _of_groups(load_groups(path).groups):
        if texts:
            found.setdefault(prompt.turns, (prompt, []))[1].extend(texts)
        else:
            left_out += 1
    if not found:
        raise DataError(f"{path}: none of its {raw.total} rows has a response to compare", todo=f"A row has {_WANTED}.")
    if left_out:
        say(f"{path}: {left_out} rows without one preferred text are left out")
    return Responses(path, [prompt for prompt, _ in found.values()], [texts for _, texts in found.values()])


def _listed(rows: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[tuple[Prompt, list[str]]]:
    found = []
    for row, source in zip(rows, sources, strict=True):
        texts = row.get("responses")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or row.get("prompt") is None:
            raise DataError(f"{source}: has no prompt with a list of texts as responses", todo=f"A row has {_WANTED}.")
        found.append((as_prompt(row["prompt"], source=source), texts))
    return found


def _of_groups(groups: Sequence[Group]) -> list[tuple[Prompt, list[str]]]:
    """The prompt of every group with its preferred response, or with none."""
    found = []
    for group in groups:
        place = _preferred(group)
        response = group.responses[place] if place is not None else ()
        text = [response[0].content] if len(response) == 1 and not response[0].tool_calls and not group.tools else []
        found.append((Prompt(group.prompt, group.form, group.source), text))
    return found


def _preferred(group: Group) -> int | None:
    """The place of the best response of a group; None where none is better than all others, or none is known to be good."""
    feedback = group.feedback
    if feedback.kind in ("scores", "ranking"):
        values = np.array(feedback.scores or [-rank for rank in feedback.ranking])
        return int(values.argmax()) if (values == values.max()).sum() == 1 else None
    return None if feedback.tie or feedback.label is False else 0


def sampled_responses(name: str, prompts: Sequence[Prompt], settings: SampleSettings, *, seed: int, title: str) -> Responses:
    """Samples of the model `name` to every one of `prompts`; the model is let go afterwards."""
    rows = draw_samples(load_model(name), prompts, settings, seed=seed, title=title)
    n = settings.samples_per_prompt
    texts = [[row.response for row in rows[at : at + n]] for at in range(0, len(rows), n)]
    return Responses(name, list(prompts), texts)


def only(responses: Responses, prompts: Sequence[Prompt]) -> Responses:
    """The responses to `prompts` alone, in their order. DataError names the first prompt without any."""
    texts = {prompt.turns: answers for prompt, answers in zip(responses.prompts, responses.texts, strict=True)}
    missing = [prompt for prompt in prompts if prompt.turns not in texts]
    if missing:
        raise DataError(
            f"{responses.name}: has no response to {len(missing)} of {len(prompts)} prompts; the first: {missing[0].text[:80]!r}",
            todo="Give a file with a response to each prompt, or leave out --prompts to use the prompts of the file.",
        )
    return Responses(responses.name, list(prompts), [texts[prompt.turns] for prompt in prompts])


def distinct_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """`prompts` without repeats, in order of appearance."""
    first: dict[Turns, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.turns, prompt)
    return list(first.values())


def matches_of(policy: Responses, opponent: Responses) -> list[Match]:
    """Response k of the policy meets response k of the opponent to the same prompt, which begin anew where they are fewer.

    Both hold the same prompts in the same order; ValueError where they do not.
    """
    if [prompt.turns for prompt in policy.prompts] != [prompt.turns for prompt in opponent.prompts]:
        raise ValueError("responses to different prompts cannot be compared")
    return [
        Match(prompt.given, text, theirs[at % len(theirs)])
        for prompt, ours, theirs in zip(policy.prompts, policy.texts, opponent.texts, strict=True)
        for at, text in enumerate(ours)
    ]
