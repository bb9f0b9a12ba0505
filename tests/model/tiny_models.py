"""Tiny random models of many architectures, and random token groups with every awkward length.

Weights are large (a layer's output is of the order of its input), so that a wrong mask, position or scale moves
log-probs by tenths of nats instead of hiding below the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.model.engine import LanguageModel

VOCABULARY = 61
CONTEXT = 128
WINDOW = 6

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.25,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention"]
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, head_dim=8, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=8
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, head_dim=8, sliding_window=WINDOW),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**_SIZES, **_MOE, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**_SIZES),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        **{key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}, rotary_pct=0.5
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32,
        init_std=0.25,
        dropout=0.0,
        pad_token_id=0,
    ),
    "granite": lambda: transformers.GraniteConfig(
        **_SIZES, logits_scaling=3.0, residual_multiplier=0.7, embedding_multiplier=2.0, attention_multiplier=0.4
    ),
    "cohere": lambda: transformers.CohereConfig(**{**_SIZES, "tie_word_embeddings": True}, logit_scale=0.4),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **_SIZES,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
# Architectures whose layers cannot follow a packed layout.
UNSHARED: dict[str, Callable[[], Any]] = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.25, pad_token_id=0
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25, pad_token_id=0
    ),
}


def causal_model(name: str, *, attention: str | None = "eager", seed: int = 0) -> Any:
    """The transformers model called `name`: the same weights at every call with the same seed."""
    config = {**CONFIGS, **UNSHARED}[name]()
    torch.manual_seed(seed)
    chosen = {"attn_implementation": attention} if attention and name in CONFIGS else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **chosen).float()
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide one that is left out
                parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def language_model(name: str = "llama", *, seed: int = 0, tokenizer: Any = None) -> LanguageModel:
    """The same model as the engine sees it, in fp32."""
    model = causal_model(name, attention=None, seed=seed)
    return LanguageModel(model, tokenizer, name=name, dtype=torch.float32, device=torch.device("cpu"))


def token_group(random: np.random.Generator, prompt: int, responses: tuple[int, ...], *, source: str = "") -> TokenGroup:
    """A group of random tokens. Responses of more than four tokens have an unscored stretch in the middle."""

    def draw(length: int) -> np.ndarray:
        return random.integers(0, VOCABULARY, length, dtype=np.int32)

    scored = []
    for length in responses:
        flags = np.ones(length, bool)
        if length > 4:
            flags[length // 3 : length // 2 + 1] = False
        scored.append(flags)
    group = TokenGroup(draw(prompt), tuple(draw(length) for length in responses), tuple(scored), Feedback("pair"))
    return replace(group, source=source, finished=(True,) * len(responses))


def awkward_groups(seed: int = 0) -> list[TokenGroup]:
    """1 to 4 responses of unequal lengths, among them prompts and responses of a single token."""
    random = np.random.default_rng(seed)
    shapes = [(11, (7, 13)), (1, (5,)), (17, (1, 9, 4, 12)), (5, (1, 1)), (1, (1, 3)), (3, (20, 2, 6))]
    return [token_group(random, *shape, source=f"rows.jsonl:{at + 1}") for at, shape in enumerate(shapes)]


def plain_logps(model: Any, groups: list[TokenGroup]) -> list[torch.Tensor]:
    """Log-probs of the scored tokens of each response, by the model's own forward on one unpadded row at a time."""
    values = []
    for group in groups:
        for tokens, scored in zip(group.response_ids, group.scored, strict=True):
            row = torch.tensor(np.concatenate([group.prompt_ids, tokens]).tolist())
            logps = model(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)
            places = len(group.prompt_ids) + torch.from_numpy(np.flatnonzero(scored))
            values.append(logps[places - 1, row[places]])
    return values
