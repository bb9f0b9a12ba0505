"""A policy against its reference: held-out pairs, then samples with reward, win rate and KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.errors import ConfigError
from prefopt.data.encode import TokenGroup
from prefopt.evaluate.comparison import compare, prompt_clusters
from prefopt.evaluate.diagnosis import diagnosis
from prefopt.evaluate.heldout import heldout, response_sums
from prefopt.evaluate.intervals import Floats
from prefopt.evaluate.spread import embedding_spread, sample_groups
from prefopt.model.engine import LanguageModel
from prefopt.rollout.prompts import Given, Prompt
from prefopt.rollout.rewards import Reward
from prefopt.rollout.sample import SampleRow, sample


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How both models are sampled; see `prefopt.rollout.sample.sample`."""

    samples_per_prompt: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    template: str = "auto"


def evaluate(
    policy: LanguageModel,
    reference: LanguageModel,
    *,
    pairs: Sequence[TokenGroup] | None = None,
    prompts: Sequence[Prompt | Given] | None = None,
    reward: Reward | None = None,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tolerance: float = 0.0,
    seed: int = 0,
    beta: float = 0.1,
    batch_size: int = 32,
    micro_batch_tokens: int = 4096,
    template: str = "auto",
    spread: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The contents of evaluation.json and the rows of samples.jsonl (empty without prompts).

    `pairs` (chosen, rejected) give the held-out section and the diagnosis; `prompts` give length, finished, diversity and KL, and with a
    `reward` also reward and win rate (a tie: rewards within `tolerance`). Policy and reference draw from separate random
    streams of `seed`, so their samples are independent even where the models are equal. KL needs samples of the policy
    itself: with another temperature or top_p than 1 it is left out and "notes" says so. `spread` adds the embedding spread to
    diversity, by the hidden states of the reference.
    ConfigError where there is nothing to evaluate or an argument cannot apply.
    """
    _check_asked(pairs, prompts, reward, samples_per_prompt if spread else None)
    settings = SampleSettings(samples_per_prompt, max_new_tokens, temperature, top_p, batch_size, template)
    result: dict[str, Any] = {"checkpoint": policy.name, "settings": {"reference": reference.name, "seed": seed, "beta": beta}}
    if pairs is not None:
        result |= _of_pairs(policy, reference, pairs, beta=beta, seed=seed, micro_batch_tokens=micro_batch_tokens)
    if prompts is None:
        return result, []
    result["settings"] |= {name: getattr(settings, name) for name in SampleSettings.__slots__} | {"tolerance": tolerance}
    ours, theirs = (
        draw_samples(model, prompts, settings, seed=stream, title=f"sampling {name}")
        for model, name, stream in zip((policy, reference), ("policy", "reference"), streams(seed), strict=True)
    )
    ratios: Floats | None = None
    if temperature == 1 and top_p == 1:
        ratios = log_ratios(policy, reference, ours, micro_batch_tokens=micro_batch_tokens)
        result["kl"] = kl_section(ratios, [len(row.response_ids) for row in ours], prompt_clusters(ours))
    else:
        result["notes"] = [
            f"KL is left out: it needs samples at temperature 1 and top_p 1, these are at {temperature:g} and {top_p:g}."
        ]
    compared = compare(ours, theirs, reward, tolerance=tolerance, kl=None if ratios is None else ratios.tolist(), seed=seed)
    if spread:
        for name, rows in (("policy", ours), ("reference", theirs)):
            compared.sections["diversity"][name]["spread"] = embedding_spread(
                reference, rows, micro_batch_tokens=micro_batch_tokens
            )
    return result | compared.sections, compared.rows


def _check_asked(
    pairs: Sequence[TokenGroup] | None,
    prompts: Sequence[Prompt | Given] | None,
    reward: Reward | None,
    spread_samples: int | None,
) -> None:
    """`spread_samples`: samples a prompt where the embedding spread is wanted."""
    if pairs is None and prompts is None:
        raise ConfigError("evaluate: there are neither pairs nor prompts", todo="Give held-out pairs, prompts or both.")
    if reward is not None and prompts is None:
        raise ConfigError(f"evaluate: the reward {reward.name} has no prompts to be measured on", todo="Give prompts.")
    if spread_samples is not None and (prompts is None or spread_samples < 2):
        raise ConfigError(
            "evaluate: the spread is that of the samples of one prompt", todo="Give prompts, and 2 samples or more (-n 2)."
        )
    if prompts is not None and not prompts:
        raise ConfigError("evaluate: the list of prompts is empty", todo="Give at least one prompt, or none at all (None).")


def log_ratios(
    policy: LanguageModel, reference: LanguageModel, samples: Sequence[SampleRow], *, micro_batch_tokens: int = 4096
) -> Floats:
    """log(policy / reference) in nats of each sample, summed over its tokens, the end-of-turn token included."""
    groups = sample_groups(samples)
    policy_logps, reference_logps = (
        [float(values.sum(dtype=np.float64)) for group in scores for values in group]
        for scores in (
            model.score(groups, micro_batch_tokens=micro_batch_tokens, title=f"KL: {name}")
            for model, name in ((policy, "policy"), (reference, "reference"))
        )
    )
    difference: Floats = np.array(policy_logps) - np.array(reference_logps)
    return difference


def kl_section(ratios: Sequence[float] | Floats, lengths: Sequence[int], clusters: Sequence[int]) -> dict[str, Any]:
    """KL(policy || reference) in nats from log(policy / reference) of the policy's own samples, with standard errors.

    per_response: the mean over prompts of each prompt's mean; unbiased for the KL up to the token limit of the samples.
    per_token: all nats over all tokens, a ratio of two means; its error is the delta method's. Prompts are the
    independent observations; with a single one the standard errors are None.
    """
    values, tokens = np.asarray(ratios, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    numbers = np.asarray(clusters, dtype=np.int64)
    samples = np.bincount(numbers)
    nats_P, tokens_P = np.bincount(numbers, weights=values), np.bincount(numbers, weights=tokens)
    prompts = len(samples)
    per_token = float(nats_P.sum() / tokens_P.sum())
    means_P = nats_P / samples
    error = token_error = None
    if prompts > 1:
        error = float(means_P.std(ddof=1) / math.sqrt(prompts))
        residual_P = nats_P - per_token * tokens_P
        token_error = float(math.sqrt((residual_P**2).sum() * prompts / (prompts - 1)) / tokens_P.sum())
    return {
        "per_response": {"value": float(means_P.mean()), "standard_error": error, "n": prompts},
        "per_token": {"value": per_token, "standard_error": token_error},
    }


def _of_pairs(
    policy: LanguageModel,
    reference: LanguageModel,
    pairs: Sequence[TokenGroup],
    *,
    beta: float,
    seed: int,
    micro_batch_tokens: int,
) -> dict[str, Any]:
    if not pairs or any(len(group.response_ids) != 2 for group in pairs):
        raise ConfigError(
            "evaluate: held-out accuracy needs pairs, found "
            + ("none" if not pairs else "groups with another number of responses than 2"),
            todo="Give rows with a chosen and a rejected response.",
        )
    ours, theirs = (
        model.score(pairs, micro_batch_tokens=micro_batch_tokens, title=f"held-out pairs: {name}")
        for model, name in ((policy, "policy"), (reference, "reference"))
    )

    def decode(token: int) -> str:
        return str(policy.tokenizer.decode([token]))

    return {
        "heldout": heldout(response_sums(ours), response_sums(theirs), beta=beta, seed=seed),
        "diagnosis": diagnosis(pairs, ours, theirs, beta=beta, decode=decode, seed=seed),
    }


def draw_samples(
    model: LanguageModel, prompts: Sequence[Prompt | Given], settings: SampleSettings, *, seed: int, title: str
) -> list[SampleRow]:
    """Samples of `model` with these settings; see `prefopt.rollout.sample.sample`."""
    return sample(
        model,
        prompts,
        n=settings.samples_per_prompt,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        seed=seed,
        batch_size=settings.batch_size,
        template=settings.template,
        title=title,
    )


def streams(seed: int) -> tuple[int, int]:
    """Seeds of two separate random streams, for policy and opponent: equal models then draw independently."""
    first, second = np.random.SeedSequence(seed % 2**32).generate_state(2)
    return int(first), int(second)
