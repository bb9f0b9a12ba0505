"""Keys and values of the responses in progress, a prompt's kept once for all of its responses, and attention over both.

Registered with transformers under a name of its own, so that any decoder that follows the packed layout of
`prefopt.model.attention` can be sampled without padding: new prompts lie end to end on one token axis, and in a step every
row (a response in progress) has one token on it. A row's own tokens begin with the last token of its prompt, for that is
the first one whose logits are needed; the tokens before it are what a prompt keeps.

Shapes: S rows, G prompts, m rows of the prompt that has most, P and R columns of prompts and of rows, h key/value heads,
H = h * r query heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from prefopt.model.attention import attention as packed_attention
from prefopt.model.layout import GroupSpan, Layout, in_force, wanted_backend

NAME = "prefopt-sampling"


@dataclass
class _Layer:
    """`prompt_keys` (G, h, P, E), `own_keys` (S, h, R, E), and the values of both, for one attention layer."""

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor


@dataclass(frozen=True)
class Prefill:
    """Prompts end to end on the token axis, to be kept from prompt number `first` on."""

    first: int
    lengths: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        starts = accumulate(self.lengths, initial=0)
        return Layout(
            tuple(GroupSpan(start, 0, (length,)) for start, length in zip(starts, self.lengths, strict=False) if length)
        )


@dataclass(frozen=True)
class Step:
    """One token a row. `own_S`: how many own tokens came before it; `kept_S`: tokens that its prompt keeps.

    `members_Gm`: the rows of each prompt, filled up with any row; `place_S`: where each row is in its flattened form; `row_S`:
    0 to S - 1.
    """

    own_S: Tensor
    kept_S: Tensor
    members_Gm: Tensor
    place_S: Tensor
    row_S: Tensor
    own_columns: int
    prompt_columns: int
    masks: dict[int | None, Tensor] = field(default_factory=dict, compare=False)

    def hidden(self, window: int | None) -> Tensor:
        """True where a key must not be seen: (S, 1, 1, P + R). Columns of the prompt first, then those of the row."""
        if window not in self.masks:
            device, own, kept = self.own_S.device, self.own_S[:, None], self.kept_S[:, None]
            prompt, mine = torch.arange(self.prompt_columns, device=device), torch.arange(self.own_columns, device=device)
            hidden = torch.cat([prompt >= kept, mine > own], dim=1)
            if window is not None:
                distance = torch.cat([kept + own - prompt, own - mine], dim=1)
                hidden |= distance >= window
            self.masks[window] = hidden[:, None, None, :]
        return self.masks[window]


class KeysValues:
    """Room for `rows` responses of `row_tokens` tokens, and for prompts of `prompt_tokens`, as many as are held at once."""

    def __init__(self, *, rows: int, row_tokens: int, prompts: int, prompt_tokens: int) -> None:
        self.rows, self.row_tokens, self.prompts, self.prompt_tokens = rows, row_tokens, prompts, prompt_tokens
        self._layers: dict[int, _Layer] = {}

    def layer(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> _Layer:
        """What is kept for the attention `module`, made at its first call with the shapes of `key` and `value`."""
        if id(module) not in self._layers:
            rows, prompts = (self.rows, self.row_tokens), (self.prompts, self.prompt_tokens)
            # zeros, for what is masked has weight 0 and must be finite
            self._layers[id(module)] = _Layer(
                *(
                    like.new_zeros(count, like.shape[1], tokens, like.shape[3])
                    for count, tokens in (prompts, rows)
                    for like in (key, value)
                )
            )
        return self._layers[id(module)]

    def hold(self, prompts: int, *, at_most: int) -> None:
        """Make room for at least so many prompts; `at_most` are ever held."""
        if prompts <= self.prompts:
            return
        prompts = self.prompts = min(max(prompts, 2 * self.prompts), at_most)
        for layer in self._layers.values():
            layer.prompt_keys, layer.prompt_values = (
                torch.cat([old, old.new_zeros(prompts - len(old), *old.shape[1:])])
                for old in (layer.prompt_keys, layer.prompt_values)
            )

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy the first `columns` own tokens of rows to the places of others."""
        for layer in self._layers.values():
            _move((layer.own_keys, layer.own_values), sources, targets, columns)

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """The same for prompts."""
        for layer in self._layers.values():
            _move((layer.prompt_keys, layer.prompt_values), sources, targets, columns)


def _move(tensors: tuple[Tensor, Tensor], sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
    for tensor in tensors:
        for source, target in zip(sources, targets, strict=True):
            tensor[target, :, :columns] = tensor[source, :, :columns]


_active: tuple[KeysValues, Prefill | Step] | None = None


@contextmanager
def computing(store: KeysValues, work: Prefill | Step, *, backend: str | None = None) -> Iterator[None]:
    """Attention reads and fills `store` within the block; prompts by the attention `backend`, unless another is wanted."""
    global _active
    _active = (store, work)
    try:
        with in_force(work.layout if isinstance(work, Prefill) else None, wanted_backend() or backend):
            yield
    finally:
        _active = None


@contextmanager
def attends_to_store(model: Any) -> Iterator[None]:
    """The transformers model `model` attends through this module within the block."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (1, H, T, E) over what is kept and over `key`, `value` (1, h, T, E), which are kept too."""
    assert _active is not None
    store, work = _active
    layer = store.layer(module, key, value)
    if isinstance(work, Step):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return _step_attention(layer, work, query, key, value, scale, sliding_window, softcap, s_aux), None
    start = 0
    for number, length in enumerate(work.lengths, start=work.first):
        layer.prompt_keys[number, :, :length] = key[0, :, start : start + length]
        layer.prompt_values[number, :, :length] = value[0, :, start : start + length]
        start += length
    return packed_attention(
        module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux, **kwargs
    )


def _step_attention(
    layer: _Layer,
    step: Step,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Output (1, S, H, E). All rows of a prompt read its keys and values at once: one product a prompt, not one a row."""
    rows, columns = query.shape[2], step.prompt_columns
    layer.own_keys[step.row_S, :, step.own_S] = key[0].transpose(0, 1)
    layer.own_values[step.row_S, :, step.own_S] = value[0].transpose(0, 1)
    own_keys, own_values = (kept[:rows, :, : step.own_columns] for kept in (layer.own_keys, layer.own_values))
    query_Shre = query[0].transpose(0, 1).reshape(rows, key.shape[1], -1, query.shape[-1])
    scores = query_Shre @ own_keys.transpose(2, 3)
    if columns:
        prompts = len(step.members_Gm)
        from_prompt = _by_prompt(query_Shre, step) @ layer.prompt_keys[:prompts, :, :columns].transpose(2, 3)
        scores = torch.cat([_by_row(from_prompt, step), scores], dim=-1)
    weights = _weights(scores * scale, step.hidden(window), softcap, s_aux).to(value.dtype)
    output = weights[..., columns:] @ own_values
    if columns:
        output += _by_row(_by_prompt(weights[..., :columns], step) @ layer.prompt_values[:prompts, :, :columns], step)
    return output.reshape(1, rows, query.shape[1], -1)


def _weights(scores: Tensor, hidden: Tensor, softcap: float | None, s_aux: Tensor | None) -> Tensor:
    """Attention weights (S, h, r, P + R) in fp32."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill_(hidden, float("-inf"))
    if s_aux is None:
        return torch.softmax(scores, dim=-1)
    sinks = s_aux.float().reshape(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def _by_prompt(of_rows: Tensor, step: Step) -> Tensor:
    """(S, h, r, X) -> (G, h, m * r, X): the rows of each prompt side by side."""
    prompts, most = step.members_Gm.shape
    _, heads, repeats, width = of_rows.shape
    gathered = of_rows.index_select(0, step.members_Gm.flatten()).view(prompts, most, heads, repeats, width)
    return gathered.transpose(1, 2).reshape(prompts, heads, most * repeats, width)


def _by_row(of_prompts: Tensor, step: Step) -> Tensor:
    """(G, h, m * r, X) -> (S, h, r, X): back again."""
    prompts, most = step.members_Gm.shape
    heads, width = of_prompts.shape[1], of_prompts.shape[3]
    apart = of_prompts.view(prompts, heads, most, -1, width).transpose(1, 2)
    return apart.reshape(prompts * most, heads, -1, width).index_select(0, step.place_S)
