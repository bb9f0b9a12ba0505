"""Models with random weights in real shapes, and token rows of wanted lengths: what benchmarks run on without downloads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.model.allocator import keep_freed_memory
from prefopt.model.engine import LanguageModel
from prefopt.model.precision import compute_dtype, pick_device

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

# Sizes as in the published configurations; `family` names the configuration class. `mini` has the proportions of a small
# model (a head of a fifth of the body) at a size that two CPU cores train; the tiny ones only prove that code runs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3 | {"family": "Llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-3.2-1b": _LLAMA_3
    | {
        "family": "Llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "family": "Qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "family": "Llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "mini": {
        "family": "Llama",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    },
    "tiny-llama": {
        "family": "Llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    },
    "tiny-qwen3": {
        "family": "Qwen3",
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def shape_config(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The transformers configuration of a shape, with other values where `overrides` has them."""
    sizes = {**SHAPES[name], **(overrides or {})}
    family = sizes.pop("family")
    sizes.setdefault("tie_word_embeddings", False)
    sizes.setdefault("initializer_range", sizes["hidden_size"] ** -0.5)  # logits of the order of 1: an error shows
    return getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def random_transformers(config: Any, device: torch.device, *, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model of `config` with the same random weights at every call on the same kind of device."""
    torch.manual_seed(0)
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_model(name: str, *, precision: str = "auto", overrides: Mapping[str, Any] | None = None) -> LanguageModel:
    """The shape `name` with random fp32 weights, ready to be trained, on the device that prefopt picks."""
    device = pick_device()
    dtype, _ = compute_dtype(precision, device)
    if device.type == "cpu":
        keep_freed_memory()  # as load_model does
    model = random_transformers(shape_config(name, overrides), device)
    return LanguageModel(model, None, name=name, dtype=dtype, device=device, identity=f"random-{name}-{overrides}")


def counted_weights(config: Any, lora_rank: int | None = None) -> tuple[int, int]:
    """(weights of a model of this configuration, weights of a LoRA adapter on all linear layers but the head)."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    adapter = sum(lora_rank * (module.in_features + module.out_features) for module in linear) if lora_rank else 0
    return int(model.num_parameters()), adapter


@dataclass(frozen=True)
class Profile:
    """Mean lengths in tokens of prompts, chosen and rejected responses, and the spread of their logarithms.

    With a spread of 0 all rows are alike, and padding costs a trainer that pads nothing.
    """

    prompt: int
    chosen: int
    rejected: int
    prompt_spread: float = 0.0
    response_spread: float = 0.0
    longest: int = 1024


# The first two as counted with SmolLM2's tokenizer over 800 rows each of HH helpful-base and of UltraFeedback.
PROFILES: dict[str, Profile] = {
    "HH-like": Profile(141, 58, 46, 1.1, 0.9, longest=512),
    "UltraFeedback-like": Profile(176, 281, 248, 1.4, 1.4),
    "prompt 2000, response 200": Profile(2000, 200, 200, longest=4096),
    "prompt 200, response 1000": Profile(200, 1000, 1000, longest=4096),
}


def made_pairs(profile: Profile, pairs: int, vocabulary: int, *, scale: float = 1.0, seed: int = 0) -> list[TokenGroup]:
    """Pairs of random tokens with the lengths of `profile`, all of them times `scale`, of at least two tokens each."""
    random = np.random.default_rng(seed)

    def lengths(mean: float, spread: float) -> np.ndarray:
        drawn = random.lognormal(math.log(mean) - spread**2 / 2, spread, pairs) if spread else np.full(pairs, mean)
        return np.clip(np.minimum(drawn, profile.longest) * scale, 2, None).round().astype(int)

    prompts = lengths(profile.prompt, profile.prompt_spread)
    responses = [lengths(mean, profile.response_spread) for mean in (profile.chosen, profile.rejected)]
    return [
        made_group(random, vocabulary, int(prompts[row]), [int(of_side[row]) for of_side in responses], source=f"row {row + 1}")
        for row in range(pairs)
    ]


def made_group(
    random: np.random.Generator, vocabulary: int, prompt: int, responses: list[int], *, source: str = ""
) -> TokenGroup:
    """A group of random tokens of these lengths. The three lowest ids stay out: they pad, begin and end."""

    def draw(length: int) -> np.ndarray:
        return random.integers(3, vocabulary, length, dtype=np.int32)

    return group_of_ids(draw(prompt), [draw(length) for length in responses], source=source)


def group_of_ids(
    prompt: Sequence[int] | np.ndarray, responses: Sequence[Sequence[int] | np.ndarray], *, source: str
) -> TokenGroup:
    """A group of these tokens, every response token scored, the first response the best."""
    ids = tuple(np.asarray(response, dtype=np.int32) for response in responses)
    pair = len(ids) == 2
    return TokenGroup(
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        response_ids=ids,
        scored=tuple(np.ones(len(response), dtype=bool) for response in ids),
        feedback=Feedback("pair") if pair else Feedback("ranking", ranking=tuple(range(1, len(ids) + 1))),
        source=source,
        finished=(True,) * len(ids),
    )
