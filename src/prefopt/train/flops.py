"""The floating-point operations that a step cannot do without, for model FLOPs utilisation (MFU) and expected time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.data.encode import TokenGroup


def training_flops(
    model_config: Any, weights: int, groups: Sequence[TokenGroup], *, adapter: int = 0, head: bool = True
) -> float:
    """Operations of one forward and one backward pass over `groups` for a decoder of this transformers configuration.

    Counted over unique tokens: 6 for each of the `weights` that multiplies and each token, of the vocabulary head only for
    scored tokens; 12 for each dimension of a head and pair of tokens that attend to each other, in each layer. With
    LoRA (`adapter`: its weights) the frozen ones have no gradient of their own: 4. What is computed beyond that (a
    prompt once more, padding, recomputed activations) is no useful work. Windows of sliding attention are not looked at.
    `head`: whether there is a vocabulary head; a reward model has none.
    """
    text = model_config.get_text_config()
    table = int(text.vocab_size) * int(text.hidden_size)
    tied = not head or bool(getattr(text, "tie_word_embeddings", False))
    decoder = weights - (table if tied else 2 * table)
    unique = sum(group.unique_tokens for group in groups)
    scored = sum(int(flags.sum()) for group in groups for flags in group.scored)
    per_weight = 4.0 if adapter else 6.0
    return (
        per_weight * (decoder * unique + (table * scored if head else 0))
        + 6.0 * adapter * unique
        + 12.0 * _attention_width(text) * sum(attended_pairs(group) for group in groups)
    )


def _attention_width(text: Any) -> int:
    """Layers x heads x head size; 0 where the configuration names them otherwise."""
    layers, heads = (getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int) or not isinstance(heads, int):
        return 0
    return layers * heads * int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads)


def attended_pairs(group: TokenGroup) -> float:
    """(query, key) pairs of a group whose prompt is shared: causal within the prompt; prompt and itself for a response."""
    prompt = len(group.prompt_ids)
    own = sum(len(ids) * (prompt + (len(ids) + 1) / 2) for ids in group.response_ids)
    return prompt * (prompt + 1) / 2 + own
