"""Responses of a model to prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.core.files import whole_file
from prefopt.core.progress import progress
from prefopt.data.encode import Ids, end_of_turn_ids, prompt_ids
from prefopt.data.render import UnusableTemplate
from prefopt.model.engine import LanguageModel
from prefopt.rollout.decode import Wanted, decode, follows
from prefopt.rollout.draw import next_tokens, uniforms_of
from prefopt.rollout.generate import generate
from prefopt.rollout.prompts import Given, Prompt, as_prompt
from prefopt.rollout.rewards import Reward


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One response. `prompt` is as it was given; `response` has no special tokens; `response_ids` has the end-of-turn
    token where the model ended its turn by itself (`finished`), and stops at the token limit otherwise."""

    prompt: Given
    prompt_ids: Ids
    response: str
    response_ids: Ids
    finished: bool


def sample(
    model: LanguageModel,
    prompts: Sequence[Prompt | Given],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    template: str = "auto",
    title: str = "sampling",
) -> list[SampleRow]:
    """`n` responses to every prompt, in the order of `prompts`: response k of prompt i is at `i * n + k`.

    Temperature 0 is greedy. Nothing but temperature and top_p shapes the distribution: the model's own generation
    settings (top-k, penalties ...) are set aside, so that at temperature 1 these are samples of the policy itself.
    Response k of prompt i has a random stream of its own, made of `seed`, i and k: it stays the same whatever the
    batch size, `n` and the prompts behind it, up to rounding, by which matrix products of other sizes can differ.
    torch's global random state is left alone. `batch_size` responses are in progress at once; one that ends makes room
    for the next (see `prefopt.rollout.decode`). Models that cannot follow packed batches go through transformers'
    generate() in batches. ConfigError for settings out of range, ModelError where a prompt leaves no room in the context
    for max_new_tokens.
    """
    check_settings(n=n, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=batch_size)
    asked = [as_prompt(prompt, source=f"prompt {at}") for at, prompt in enumerate(prompts)]
    ids = tokens_of(asked, model.tokenizer, template=template)
    check_room(asked, ids, context_tokens=model.context_tokens, max_new_tokens=max_new_tokens)
    ends = end_of_turn_ids(model.tokenizer, template=template)
    wanted = [
        Wanted(prompt_ids, partial(uniforms_of, seed, i, k, max_new_tokens))
        for i, prompt_ids in enumerate(ids)
        for k in range(n)
    ]
    choose = partial(next_tokens, temperature=temperature, top_p=top_p)
    responses: list[Ids | None] = [None] * len(wanted)
    training = model.model.training
    model.model.eval()
    try:
        draw = decode if follows(model, ids, max_new_tokens) else generate
        with progress(title, len(wanted), "responses") as shown:

            def done(number: int, response: Ids) -> None:
                responses[number] = response
                shown.advance(1)

            limits: dict[str, Any] = {"ends": ends, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
            draw(model, wanted, choose, **limits, done=done)
    finally:
        model.model.train(training)
    return [
        row_of(asked[number // n], ids[number // n], response, model.tokenizer, ends)
        for number, response in enumerate(responses)
        if response is not None
    ]


def scores_of(reward: Reward, rows: Sequence[SampleRow]) -> list[float]:
    """What `reward` gives each of `rows`."""
    return reward([row.prompt for row in rows], [row.response for row in rows], [row.finished for row in rows])


def samples_of(rows: Sequence[SampleRow]) -> list[dict[str, Any]]:
    """Rows of one prompt each, as `write_samples` writes them: neighbours with the same prompt are put together."""
    grouped: list[dict[str, Any]] = []
    for row in rows:
        if not grouped or grouped[-1]["prompt"] != row.prompt:
            grouped.append({"prompt": row.prompt, "responses": [], "finished": [], "response_tokens": []})
        grouped[-1]["responses"].append(row.response)
        grouped[-1]["finished"].append(row.finished)
        grouped[-1]["response_tokens"].append(len(row.response_ids))
    return grouped


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Write a JSON line per prompt to `path`, whole or not at all: prompt, responses, finished, response_tokens."""
    write_lines(path, samples_of(rows))


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write `lines` as JSON lines to `path`, whole or not at all."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines that `write_samples` wrote; DataError names a line without `prompt` and `responses`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", todo="Give a file written by prefopt sample.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        responses = row.get("responses") if isinstance(row, dict) and "prompt" in row else None
        if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
            raise DataError(
                f"{path}:{number}: is not a line of samples, found {line[:80]}",
                todo='A line is {"prompt": ..., "responses": [text, ...]}, as prefopt sample writes it.',
            )
        rows.append(row)
    return rows


def check_settings(*, n: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int = 1) -> None:
    """ConfigError names a setting that is out of range."""
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}: found {value}, at least 1 is needed", todo=f"For example {name}=8.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: found {temperature}", todo="Use 0 for greedy decoding, 1 for the policy itself.")
    if n > 1 and temperature == 0:
        raise ConfigError(f"temperature 0 gives the same response {n} times", todo="Use n=1 or a temperature above 0.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: found {top_p}, outside (0, 1]", todo="Use 1 for the whole distribution.")


def tokens_of(prompts: Sequence[Prompt], tokenizer: Any, *, template: str) -> list[Ids]:
    """Token ids of each prompt with the opening of the response; DataError names one that the template cannot write."""
    found = []
    for prompt in prompts:
        try:
            found.append(prompt_ids(prompt.turns, tokenizer, template=template, form=prompt.form))
        except UnusableTemplate as error:
            raise DataError(
                f"{prompt.source}: {error.reason} (found {error.found}, expected {error.expected})",
                todo="Mend or remove this prompt, or choose another data.template.",
            ) from error
    return found


def check_room(prompts: Sequence[Prompt], ids: Sequence[Ids], *, context_tokens: int, max_new_tokens: int) -> None:
    """ModelError names the first prompt that leaves no room for `max_new_tokens` in a context of `context_tokens`."""
    room = context_tokens - max_new_tokens
    over = [at for at, tokens in enumerate(ids) if len(tokens) > room]
    if over:
        first, longest = over[0], max(map(len, ids))
        shorter = f", or lower max_new_tokens to at most {context_tokens - longest}" if longest < context_tokens else ""
        raise ModelError(
            f"{prompts[first].source or f'prompt {first}'}: {len(ids[first])} prompt tokens and {max_new_tokens} new ones do"
            f" not fit the model's context of {context_tokens} tokens ({len(over)} of {len(ids)} prompts are too long)",
            todo=f"Remove or shorten these prompts{shorter}.",
        )


def row_of(prompt: Prompt, ids: Ids, response: Ids, tokenizer: Any, ends: Sequence[int]) -> SampleRow:
    """The SampleRow of the tokens `response`, of which one of `ends` can only be the last."""
    finished = bool(len(response)) and int(response[-1]) in ends
    words = response[:-1] if finished else response
    return SampleRow(prompt.given, ids, _continuation_text(tokenizer, ids, words), response, finished)


def _continuation_text(tokenizer: Any, ids: Ids, words: Ids) -> str:
    """The text of `words` behind the prompt `ids`: SentencePiece drops the first space of what is decoded alone."""
    before = ids[-8:].tolist()
    start, whole = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (before, before + words.tolist()))
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(words.tolist(), skip_special_tokens=True))
