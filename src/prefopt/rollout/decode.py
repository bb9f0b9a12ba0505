"""Responses token by token with continuous batching: what has ended leaves the batch at once, and what waits takes its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.core.errors import ModelError
from prefopt.data.encode import Ids, TokenGroup
from prefopt.data.groups import Feedback
from prefopt.model.engine import LanguageModel
from prefopt.rollout.draw import Uniforms
from prefopt.rollout.keys_values import KeysValues, Prefill, Step, attends_to_store, computing

_PREFILL_TOKENS = 4096  # prompt tokens in one forward pass, unless a single prompt has more
_REFILL = 8  # waiting responses begin once an eighth of the batch is free: new prompts are computed together, not one by one

Choose = Callable[[Tensor, Uniforms], Tensor]
Done = Callable[[int, Ids], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A response to be drawn: its prompt, and the uniform numbers of its tokens, as many as it may have."""

    prompt_ids: Ids
    uniforms: Callable[[], Uniforms]


@dataclass(slots=True)
class _Row:
    number: int
    prompt: bytes
    prompt_ids: Ids
    uniforms: Uniforms
    tokens: list[int] = field(default_factory=list)

    @property
    def newest(self) -> int:
        return self.tokens[-1] if self.tokens else int(self.prompt_ids[-1])


def decode(
    model: LanguageModel,
    wanted: Sequence[Wanted],
    choose: Choose,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Done,
) -> None:
    """Draw all of `wanted`, and tell `done` (number in `wanted`, token ids) of each as it ends: by one of `ends`, which is
    kept, or at the limit.

    At most `batch_size` responses are in progress, longest prompts first, so that what does not fit into memory fails at
    once; equal prompts are computed once. `choose` gives the next tokens (S,) from logits (S, V) and uniform numbers (S,).
    The model must be in evaluation mode and follow packed batches (`LanguageModel.sharing`); no gradients are kept.
    """
    with torch.no_grad(), attends_to_store(model.model):
        batch = _Batch(model, wanted, max_new_tokens, batch_size)
        while batch.refill():
            tokens = choose(batch.logits(), np.array([row.uniforms[len(row.tokens)] for row in batch.rows])).tolist()
            for row, token in zip(batch.rows, tokens, strict=True):
                row.tokens.append(token)
            over = [at for at, row in enumerate(batch.rows) if row.tokens[-1] in ends or len(row.tokens) == max_new_tokens]
            for row in (batch.rows[at] for at in over):
                done(row.number, np.array(row.tokens, dtype=np.int32))
            batch.leave(over)


def follows(model: LanguageModel, prompts: Sequence[Ids], max_new_tokens: int) -> bool:
    """Whether `decode` computes this model exactly on rows of these lengths.

    It does where packed and plain forward agree. Rows longer than a window (sliding or chunked) are compared as well. Not
    where the rotary frequencies change with the longest row of a batch, which one kept key cannot follow.
    """
    config = model.model.config.get_text_config()
    if _changing_frequencies(getattr(config, "rope_parameters", None)):
        return False
    try:
        sharing = model.sharing
    except ModelError:  # a head that is not known here; transformers' own logits are all that sampling needs
        return False
    longest = max(prompts, key=len, default=None)
    windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
    if not sharing or longest is None or all(window is None or len(longest) + max_new_tokens <= window for window in windows):
        return sharing
    row = np.resize(longest, len(longest) + max_new_tokens)  # repeated to its full length
    responses = (row[1:], row[1:])
    scored = tuple(np.ones(len(response), dtype=np.bool_) for response in responses)
    model.confirm_sharing([TokenGroup(row[:1], responses, scored, Feedback("demonstration"))])
    return model.sharing


def _changing_frequencies(rope: Any) -> bool:
    """Whether rotary parameters, or those of a kind of layer among them, are of a type that looks at the sequence's length."""
    if not isinstance(rope, dict):
        return False
    return rope.get("rope_type") in ("dynamic", "longrope") or any(_changing_frequencies(value) for value in rope.values())


class _Batch:
    """The rows in progress and the prompts that they, or responses that wait, belong to; places are those in the store."""

    def __init__(self, model: LanguageModel, wanted: Sequence[Wanted], max_new_tokens: int, batch_size: int) -> None:
        self.model = model
        self.size = min(batch_size, len(wanted))
        keys = [one.prompt_ids.tobytes() for one in wanted]
        order = sorted(range(len(wanted)), key=lambda number: (-len(keys[number]), keys[number], number))
        self.waiting = deque((number, keys[number], wanted[number]) for number in order)
        self.rows: list[_Row] = []
        self.prompts: list[tuple[bytes, int]] = []  # with the number of tokens that are kept of it
        together = len({key for _, key, _ in list(self.waiting)[: self.size]})
        longest = max((len(one.prompt_ids) for one in wanted), default=1)
        self.store = KeysValues(rows=self.size, row_tokens=max_new_tokens, prompts=together, prompt_tokens=longest - 1)
        self._arranged: tuple[Tensor, Tensor] | None = None

    def refill(self) -> bool:
        """Let waiting responses begin where enough of the batch is free; False where all responses are done."""
        free = self.size - len(self.rows)
        if self.waiting and free and (free * _REFILL >= self.size or len(self.waiting) <= free or not self.rows):
            held, fresh = {key for key, _ in self.prompts}, dict[bytes, Ids]()
            for _ in range(min(free, len(self.waiting))):
                number, key, one = self.waiting.popleft()
                self.rows.append(_Row(number, key, one.prompt_ids, one.uniforms()))
                if key not in held:
                    fresh[key] = one.prompt_ids
            self.store.hold(len(self.prompts) + len(fresh), at_most=self.size)
            for part in _within_budget(list(fresh.items())):
                self._prefill(part)
            self._arranged = None
        return bool(self.rows)

    def _prefill(self, prompts: list[tuple[bytes, Ids]]) -> None:
        """Compute and keep all tokens but the last of prompts that are new."""
        first = len(self.prompts)
        self.prompts += [(key, len(ids) - 1) for key, ids in prompts]
        lengths = [len(ids) - 1 for _, ids in prompts]
        if not sum(lengths):
            return
        tokens = np.concatenate([ids[:-1] for _, ids in prompts])
        positions = np.concatenate([np.arange(length) for length in lengths])
        with computing(self.store, Prefill(first, tuple(lengths)), backend=self.model.attention_backend):
            self.model.model.base_model(input_ids=self._on_axis(tokens), position_ids=self._on_axis(positions), use_cache=False)

    def logits(self) -> Tensor:
        """Logits of the next token of every row, shape (S, V)."""
        kept = [len(row.prompt_ids) - 1 for row in self.rows]
        own = [len(row.tokens) for row in self.rows]
        members_Gm, place_S = self._members()
        step = Step(
            own_S=self._tensor(own),
            kept_S=self._tensor(kept),
            members_Gm=members_Gm,
            place_S=place_S,
            row_S=torch.arange(len(self.rows), device=self.model.device),
            own_columns=max(own) + 1,
            prompt_columns=max(length for _, length in self.prompts),
        )
        tokens = [row.newest for row in self.rows]
        positions = [before + mine for before, mine in zip(kept, own, strict=True)]
        with computing(self.store, step):
            output: Any = self.model.model(
                input_ids=self._on_axis(tokens), position_ids=self._on_axis(positions), use_cache=False, return_dict=True
            )
        logits: Tensor = output.logits[0]
        return logits

    def _members(self) -> tuple[Tensor, Tensor]:
        """`members_Gm` and `place_S` of the rows as they are; see Step."""
        if self._arranged is None:
            at = {key: place for place, (key, _) in enumerate(self.prompts)}
            rows_of: list[list[int]] = [[] for _ in self.prompts]
            for number, row in enumerate(self.rows):
                rows_of[at[row.prompt]].append(number)
            most = max(map(len, rows_of))
            place = [0] * len(self.rows)
            for prompt, members in enumerate(rows_of):
                for column, number in enumerate(members):
                    place[number] = prompt * most + column
            filled = [members + [0] * (most - len(members)) for members in rows_of]
            self._arranged = self._tensor(filled), self._tensor(place)
        return self._arranged

    def leave(self, over: Sequence[int]) -> None:
        """Take the rows at `over` out, and prompts that nobody needs any more; the last ones move into their places."""
        if not over:
            return
        columns = max(len(row.tokens) for row in self.rows)
        self.store.move_rows(*_close_gaps(self.rows, over), columns)
        needed = {row.prompt for row in self.rows} | ({self.waiting[0][1]} if self.waiting else set())
        unused = [place for place, (key, _) in enumerate(self.prompts) if key not in needed]
        columns = max(length for _, length in self.prompts)
        self.store.move_prompts(*_close_gaps(self.prompts, unused), columns)
        self._arranged = None

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def _on_axis(self, values: Any) -> Tensor:
        """One value a token, shape (1, T)."""
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.model.device)[None]


def _close_gaps(items: list[Any], gone: Sequence[int]) -> tuple[list[int], list[int]]:
    """Take the places `gone` out of `items`, in place: what is last moves into the gaps. Returns sources and targets."""
    left = len(items) - len(gone)
    out = set(gone)
    targets = sorted(place for place in out if place < left)
    sources = [place for place in range(left, len(items)) if place not in out]
    for source, target in zip(sources, targets, strict=True):
        items[target] = items[source]
    del items[left:]
    return sources, targets


def _within_budget(prompts: list[tuple[bytes, Ids]]) -> Iterator[list[tuple[bytes, Ids]]]:
    """Neighbours with at most _PREFILL_TOKENS tokens together, or a single one with more."""
    part: list[tuple[bytes, Ids]] = []
    for prompt in prompts:
        if part and sum(len(ids) for _, ids in [*part, prompt]) > _PREFILL_TOKENS:
            yield part
            part = []
        part.append(prompt)
    if part:
        yield part
