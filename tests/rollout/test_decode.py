"""The decoder against transformers' own generate(), for every architecture, and the work that it does."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from model.tiny_models import CONFIGS, UNSHARED, VOCABULARY, WINDOW, causal_model, language_model
from prefopt.core.config import LoraConfig
from prefopt.data.encode import Ids
from prefopt.model.adapters import add_lora
from prefopt.model.engine import LanguageModel
from prefopt.rollout.decode import Wanted, decode, follows
from prefopt.rollout.draw import next_tokens, uniforms_of
from prefopt.rollout.generate import generate

pytestmark = pytest.mark.slow

END, LIMIT = 2, 14
LENGTHS = (11, 1, 17, 5, 2)
GREEDY = partial(next_tokens, temperature=0.0)


def some_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Ids]:
    random = np.random.default_rng(0)
    return [random.integers(3, VOCABULARY, length, dtype=np.int32) for length in lengths]


def wanted(prompts: list[Ids], n: int) -> list[Wanted]:
    return [Wanted(ids, partial(uniforms_of, 0, at, k, LIMIT)) for at, ids in enumerate(prompts) for k in range(n)]


def drawn(how: Any, model: LanguageModel, asked: list[Wanted], choose: Any, batch_size: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}

    def done(number: int, response: Ids) -> None:
        assert number not in found
        found[number] = response.tolist()

    how(model, asked, choose, ends=(END,), max_new_tokens=LIMIT, batch_size=batch_size, done=done)
    return [found[number] for number in range(len(asked))]


def by_transformers(model: Any, ids: Ids) -> list[int]:
    """What transformers itself continues one prompt with, alone and without padding."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    model.generation_config = GenerationConfig()
    settings = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": END, "pad_token_id": 0}
    output: list[int] = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0].tolist()
    return output[len(ids) :]


@pytest.mark.parametrize("name", [*CONFIGS, *UNSHARED])
def test_greedy_responses_are_those_of_transformers_token_for_token(name: str) -> None:
    """Three rows at a time, so that rows leave, others take their places, and prompts of unlike lengths meet."""
    model = language_model(name, tokenizer=SimpleNamespace(pad_token_id=0))
    prompts = some_prompts()
    assert LENGTHS[0] + LIMIT > 2 * WINDOW
    own = follows(model, prompts, LIMIT)
    assert own == (name in CONFIGS)
    found = drawn(decode if own else generate, model, wanted(prompts, 2), GREEDY, 3)
    plain = causal_model(name)
    assert found == [response for ids in prompts for response in [by_transformers(plain, ids)] * 2]


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (3, 5), (4, 16), (7, 3)])
def test_samples_are_those_of_generate_whatever_the_batch(n: int, batch_size: int) -> None:
    model = language_model("qwen3", tokenizer=SimpleNamespace(pad_token_id=0))
    asked = wanted(some_prompts((4, 9, 1, 2, 9, 6, 13, 3, 5)), n)
    choose = partial(next_tokens, temperature=3.0)
    ours = drawn(decode, model, asked, choose, batch_size)
    assert ours == drawn(generate, model, asked, choose, len(asked))
    assert n < 3 or len({len(response) for response in ours}) > 3


def test_stragglers_of_as_many_prompts_as_rows_keep_their_prompts() -> None:
    """Of four responses to each prompt three end at once, so that soon every row belongs to another prompt."""
    model = language_model("gemma3", tokenizer=SimpleNamespace(pad_token_id=0))
    prompts = some_prompts((9, 8, 7, 6, 5, 4, 3))
    ends_at = [np.where(np.arange(LIMIT) >= (LIMIT - 2 if k == 0 else 0), 0.0, 0.9) for k in range(4)]
    asked = [Wanted(ids, partial(np.copy, ends_at[k])) for ids in prompts for k in range(4)]

    def choose(logits: torch.Tensor, uniforms: Any) -> torch.Tensor:
        going_on = logits.index_fill(1, torch.tensor([END]), float("-inf")).argmax(dim=-1)
        return torch.where(torch.from_numpy(uniforms) < 0.5, END, going_on)

    ours = drawn(decode, model, asked, choose, 4)
    assert [len(response) for response in ours] == [LIMIT - 1, 1, 1, 1] * len(prompts)
    assert ours == drawn(generate, model, asked, choose, len(asked))


def test_a_token_is_computed_once_a_prompt_and_once_a_living_response() -> None:
    model = language_model("llama")
    prompts = some_prompts()
    prompts.append(prompts[0].copy())  # equal prompts count once
    asked = wanted(prompts, 4)
    computed: list[int] = []
    assert follows(model, prompts, LIMIT)
    handle = model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    responses = drawn(decode, model, asked, partial(next_tokens, temperature=3.0), 8)
    handle.remove()
    kept = sum(len(ids) - 1 for ids in prompts[:-1])
    assert sum(computed) == kept + sum(map(len, responses))
    assert min(map(len, responses)) < LIMIT


def test_the_model_attends_as_before_afterwards_and_after_a_failure() -> None:
    model = language_model("llama")
    asked = wanted(some_prompts(), 1)
    before = model.model.config._attn_implementation

    def failing(*arguments: Any) -> Any:
        raise ValueError("no token")

    with pytest.raises(ValueError, match="no token"):
        drawn(decode, model, asked, failing, 4)
    assert model.model.config._attn_implementation == before
    with torch.enable_grad():
        drawn(decode, model, asked, GREEDY, 4)
        assert torch.is_grad_enabled()
    assert model.model.config._attn_implementation == before
    assert model.sharing_deviation() < 1e-4  # type: ignore[operator]


def test_a_policy_with_an_adapter_samples_with_it() -> None:
    model = language_model("llama", tokenizer=SimpleNamespace(pad_token_id=0))
    asked = wanted(some_prompts(), 1)
    base = drawn(decode, model, asked, GREEDY, 4)
    add_lora(model, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.model.eval()
    adapted = drawn(decode, model, asked, GREEDY, 4)
    assert adapted != base
    assert adapted == drawn(generate, model, asked, GREEDY, 4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_left_to_generate(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, rope_parameters=rope, max_position_embeddings=128, **sizes)
    inner = transformers.LlamaForCausalLM(config)
    model = LanguageModel(inner, None, name=kind, dtype=torch.float32, device=torch.device("cpu"))
    assert not follows(model, some_prompts(), LIMIT)
