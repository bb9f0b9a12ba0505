"""Responses of a model to prompts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.core.files import whole_file
from prefopt.core.progress import progress
from prefopt.data.encode import Ids, end_of_turn_ids, prompt_ids
from prefopt.data.render import UnusableTemplate
from prefopt.model.engine import LanguageModel
from prefopt.rollout.prompts import Given, Prompt, as_prompt

_SETTINGS: Any = GenerationConfig  # its constructor has no types


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
    settings (top-k, penalties ...) are set aside, so that at temperature 1 these are samples of the policy itself. The
    same seed, prompts and batch_size give the same responses; torch's global random state is left as it was.
    ConfigError for settings out of range, ModelError where a prompt leaves no room in the context for max_new_tokens.
    """
    _check_settings(n=n, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=batch_size)
    asked = [as_prompt(prompt, source=f"prompt {at}") for at, prompt in enumerate(prompts)]
    ids = [_prompt_ids(model, prompt, template) for prompt in asked]
    _check_room(model, asked, ids, max_new_tokens)
    ends = tuple(end_of_turn_ids(model.tokenizer, template=template))
    settings = _generation_config(model, ends, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    # longest first: what does not fit in memory fails in the first batch
    order = sorted((i for i in range(len(asked)) for _ in range(n)), key=lambda i: -len(ids[i]))
    responses: dict[int, list[Ids]] = {i: [] for i in range(len(asked))}
    with progress(title, len(order), "responses") as shown, _ready_to_generate(model):
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            torch.manual_seed(_stream(seed, at // batch_size))
            for i, new in zip(batch, _generate(model, [ids[i] for i in batch], settings), strict=True):
                responses[i].append(_until_end(new, ends))
            shown.advance(len(batch))
    return [_row(model, asked[i], ids[i], response, ends) for i in range(len(asked)) for response in responses[i]]


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
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for line in samples_of(rows):
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


def _check_settings(*, n: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int) -> None:
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}: found {value}, at least 1 is needed", todo=f"For example {name}=8.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature: found {temperature}", todo="Use 0 for greedy decoding, 1 for the policy itself.")
    if n > 1 and temperature == 0:
        raise ConfigError(f"temperature 0 gives the same response {n} times", todo="Use n=1 or a temperature above 0.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: found {top_p}, outside (0, 1]", todo="Use 1 for the whole distribution.")


def _prompt_ids(model: LanguageModel, prompt: Prompt, template: str) -> Ids:
    try:
        return prompt_ids(prompt.turns, model.tokenizer, template=template, form=prompt.form)
    except UnusableTemplate as error:
        raise DataError(
            f"{prompt.source}: {error.reason} (found {error.found}, expected {error.expected})",
            todo="Mend or remove this prompt, or choose another data.template.",
        ) from error


def _check_room(model: LanguageModel, prompts: Sequence[Prompt], ids: Sequence[Ids], max_new_tokens: int) -> None:
    room = model.context_tokens - max_new_tokens
    over = [at for at, tokens in enumerate(ids) if len(tokens) > room]
    if over:
        first, longest = over[0], max(map(len, ids))
        shorter = (
            f", or lower max_new_tokens to at most {model.context_tokens - longest}" if longest < model.context_tokens else ""
        )
        raise ModelError(
            f"{prompts[first].source or f'prompt {first}'}: {len(ids[first])} prompt tokens and {max_new_tokens} new ones do"
            f" not fit the model's context of {model.context_tokens} tokens ({len(over)} of {len(ids)} prompts are too long)",
            todo=f"Remove or shorten these prompts{shorter}.",
        )


def _generation_config(
    model: LanguageModel, ends: tuple[int, ...], *, temperature: float, top_p: float, max_new_tokens: int
) -> GenerationConfig:
    pad = model.tokenizer.pad_token_id
    if pad is None or not 0 <= pad < model.model.get_input_embeddings().num_embeddings:
        pad = ends[0]  # only ever seen behind the attention mask and behind an end of turn
    choice = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    )
    settings: GenerationConfig = _SETTINGS(
        max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=pad, use_cache=True, **choice
    )
    return settings


@contextlib.contextmanager
def _ready_to_generate(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode, no generation settings of the model's own, and a private random state; all put back after."""
    inner = model.model
    training, own, use_cache = inner.training, inner.generation_config, getattr(inner.config, "use_cache", None)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            inner.eval()
            inner.generation_config = _SETTINGS()  # generate() fills what a call leaves open from this
            inner.config.use_cache = True
            yield
        finally:
            inner.config.use_cache = use_cache
            inner.generation_config = own
            inner.train(training)


def _generate(model: LanguageModel, prompts: Sequence[Ids], settings: GenerationConfig) -> list[Ids]:
    width = max(map(len, prompts))
    assert isinstance(settings.pad_token_id, int)
    tokens = torch.full((len(prompts), width), settings.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
        mask[row, width - len(ids) :] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    cache = _shared_prefill(model, prompts, tokens, mask)
    known = {} if cache is None else {"past_key_values": cache}
    output = model.model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings, **known)
    return list(output[:, width:].cpu().numpy().astype(np.int32))


def _shared_prefill(model: LanguageModel, prompts: Sequence[Ids], tokens: Tensor, mask: Tensor) -> Any | None:
    """Keys and values of all prompt tokens but the last, each distinct prompt computed once for all of its rows.

    None where that saves nothing or the model keeps another kind of state.
    """
    numbers: dict[bytes, int] = {}
    row_to_distinct = [numbers.setdefault(ids.tobytes(), len(numbers)) for ids in prompts]
    if len(numbers) == len(prompts) or tokens.shape[1] < 2 or not model.sharing:
        return None
    first_rows = [row_to_distinct.index(number) for number in range(len(numbers))]
    seen = mask[first_rows, :-1]
    cache = DynamicCache(config=model.model.config)
    model.model.base_model(
        input_ids=tokens[first_rows, :-1],
        attention_mask=seen,
        position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(torch.tensor(row_to_distinct, device=tokens.device))
    return cache


def _until_end(tokens: Ids, ends: tuple[int, ...]) -> Ids:
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] + 1] if len(found) else tokens


def _row(model: LanguageModel, prompt: Prompt, ids: Ids, response: Ids, ends: tuple[int, ...]) -> SampleRow:
    finished = bool(len(response)) and int(response[-1]) in ends
    words = response[:-1] if finished else response
    return SampleRow(prompt.given, ids, _continuation_text(model.tokenizer, ids, words), response, finished)


def _continuation_text(tokenizer: Any, ids: Ids, words: Ids) -> str:
    """The text of `words` behind the prompt `ids`: SentencePiece drops the first space of what is decoded alone."""
    before = ids[-8:].tolist()
    start, whole = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (before, before + words.tolist()))
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(words.tolist(), skip_special_tokens=True))


def _stream(seed: int, batch: int) -> int:
    return int(np.random.SeedSequence([seed % 2**32, batch]).generate_state(1, np.uint64)[0] >> 1)
