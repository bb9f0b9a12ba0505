"""A random model over seven words, small enough to enumerate what it can say."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.model.engine import LanguageModel


def language_model(*, pad: bool = True, seed: int = 0) -> LanguageModel:
    """A random Llama with seven tokens, of which token 1 ends a turn."""
    words = {word: at for at, word in enumerate(["<s>", "</s>", "a", "b", "c", "d", "e"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<s>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).eval()
    return LanguageModel(model, tokenizer, name="tiny", dtype=torch.float32, device=torch.device("cpu"))
