"""Responses by vLLM, where it is installed: for large models and many prompts on CUDA. Imported only when it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prefopt.core.errors import ConfigError, ModelError, nearest
from prefopt.data.encode import end_of_turn_ids
from prefopt.model.adapter_files import is_adapter
from prefopt.model.load import load_tokenizer, model_facts, model_folder
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.rollout.prompts import Given, Prompt, as_prompt
from prefopt.rollout.sample import SampleRow, check_room, check_settings, row_of, tokens_of

Engine = Literal["torch", "vllm"]
ENGINES = ("auto", "torch", "vllm")


def chosen_engine(engine: str, name: str) -> Engine:
    """What samples the model `name`: as asked, and for `auto` vLLM on CUDA where it is installed and can read the model.

    vLLM reads whole weights from a folder or the Hub; an adapter that is not merged goes through torch. ConfigError for an
    unknown engine, and where vLLM is asked for and is not installed or has no whole weights to read.
    """
    if engine not in ENGINES:
        raise ConfigError(f'engine: "{engine}" is not an engine', todo=f"{nearest(engine, ENGINES)}Use {', '.join(ENGINES)}.")
    if engine == "torch":
        return "torch"
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "auto" and not (installed and pick_device().type == "cuda"):
        return "torch"
    adapter = is_adapter(model_folder(name))
    if engine == "auto":
        return "torch" if adapter else "vllm"
    if not installed:
        raise ConfigError("engine: vllm is not installed", todo="pip install vllm, or use --engine torch.")
    if adapter:
        raise ConfigError(
            f'engine: "{name}" is an adapter, and vLLM is given whole weights here',
            todo="Use --engine torch, or train with model.lora.save=merged.",
        )
    return "vllm"


def sample_with_vllm(
    name: str,
    prompts: Sequence[Prompt | Given],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    template: str = "auto",
    precision: str = "auto",
    gpu_memory_utilization: float = 0.9,
) -> list[SampleRow]:
    """What `prefopt.rollout.sample.sample` gives, from a model by name, with the same tokens of the prompts and the same ends.

    The model's own generation settings are set aside. Each prompt has a seed of its own, made of `seed` and its place; how
    far equal seeds give equal responses is up to vLLM. `batch_size`: responses in progress at once, by default as many as
    vLLM chooses. `gpu_memory_utilization`: share of the GPU's memory that it may take. Raises what `sample` raises, and
    ModelError where vLLM cannot load the model.
    """
    check_settings(n=n, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=batch_size or 1)
    asked = [as_prompt(prompt, source=f"prompt {at}") for at, prompt in enumerate(prompts)]
    if not asked:
        return []
    tokenizer = load_tokenizer(name)
    ids = tokens_of(asked, tokenizer, template=template)
    check_room(asked, ids, context_tokens=model_facts(name).context_tokens, max_new_tokens=max_new_tokens)
    ends = end_of_turn_ids(tokenizer, template=template)
    vllm = _imported()
    model = _loaded(
        vllm,
        name,
        dtype=str(compute_dtype(precision, pick_device())[0]).removeprefix("torch."),
        seed=seed % 2**31,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max(map(len, ids)) + max_new_tokens,
        **({} if batch_size is None else {"max_num_seqs": batch_size}),
    )
    settings = [
        vllm.SamplingParams(
            n=n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            stop_token_ids=list(ends),
            seed=_seed_of(seed, at),
            skip_special_tokens=False,
        )
        for at in range(len(ids))
    ]
    answers = model.generate([vllm.TokensPrompt(prompt_token_ids=tokens.tolist()) for tokens in ids], settings)
    return [
        row_of(prompt, tokens, np.array(response.token_ids, dtype=np.int32), tokenizer, ends)
        for prompt, tokens, answer in zip(asked, ids, answers, strict=True)
        for response in sorted(answer.outputs, key=lambda response: int(response.index))
    ]


def _imported() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"engine: vllm cannot be imported ({error})", todo="pip install vllm, or use --engine torch."
        ) from error


def _loaded(vllm: Any, name: str, **settings: Any) -> Any:
    source = model_folder(name)
    given = str(Path(source).resolve()) if Path(source).is_dir() else source
    try:
        return vllm.LLM(model=given, generation_config="vllm", **settings)  # not those that the model's folder may hold
    except Exception as error:  # whatever vLLM meets: an architecture, a device, or memory that it cannot use
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f'model.name: vLLM cannot load "{name}" ({line})', todo="Use --engine torch.") from error


def _seed_of(seed: int, prompt: int) -> int:
    """vLLM counts up from it for the responses of a prompt, so that neighbours must lie far apart."""
    return int(np.random.SeedSequence([seed % 2**64, prompt]).generate_state(1)[0])
