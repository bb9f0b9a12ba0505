"""Which token pads the rows of a reward model.

A transformers sequence classifier keeps no length of a row: it reads the score at the last token that is not the padding
token. Where that token also ends responses (SmolLM2 pads with its end-of-turn token) it reads in front of the end.
"""

from __future__ import annotations

from typing import Any

from prefopt.core.errors import ModelError
from prefopt.data.render import make_renderer


def set_padding(tokenizer: Any, config: Any, *, trained: bool) -> None:
    """Give `tokenizer` and `config` one padding token, on the right, that ends no response.

    A `trained` reward model keeps its own. ModelError where that ends responses, or where no special token is free.
    """
    text = config.get_text_config()
    if trained and text.pad_token_id is not None:
        found = int(text.pad_token_id)
        if found in _ends(tokenizer):
            raise ModelError(
                f"This reward model pads with {tokenizer.convert_ids_to_tokens(found)!r}, which also ends responses:"
                " transformers reads its scores in front of the last token, and here they are read at it",
                todo="If it was trained to be read at the last token, write another pad_token_id into its config.json.",
            )
    else:
        found = padding_token(tokenizer, int(text.vocab_size))
    config.pad_token_id = text.pad_token_id = found
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)
    tokenizer.padding_side = "right"


def padding_token(tokenizer: Any, vocabulary: int) -> int:
    """A special token below `vocabulary` that no response ends with: the tokenizer's own padding token where that is one.

    Special tokens in a row's text are spelled out and never obeyed, so a response can end only with a token that the
    chat template writes, with the end-of-turn token, or with end-of-sequence. An unknown-word token or the
    beginning-of-text token is the last choice.
    """
    special = {int(token): content.content for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    template = _template_text(tokenizer)
    ends = _ends(tokenizer)
    free = [
        token for token, text in sorted(special.items()) if token < vocabulary and token not in ends and text not in template
    ]
    if "bos_token" in template:
        free = [token for token in free if token != tokenizer.bos_token_id]
    if tokenizer.pad_token_id in free:
        return int(tokenizer.pad_token_id)
    last = (tokenizer.unk_token_id, tokenizer.bos_token_id)
    for token in (*(token for token in free if token not in last), *last):
        if token in free:
            return int(token)
    raise ModelError(
        f"No special token of the tokenizer can pad the rows of a reward model; all may end a response: {sorted(special.values())}",
        todo="Add one: tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), model.resize_token_embeddings(len(tokenizer)); save both.",
    )


def _ends(tokenizer: Any) -> set[int]:
    """End-of-sequence, and the end of turn of the tokenizer's own template."""
    renderer = make_renderer(tokenizer, template="auto", form="text")
    return {token for token in (renderer.end_of_turn, tokenizer.eos_token_id) if token is not None and token >= 0}


def _template_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)
