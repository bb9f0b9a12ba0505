"""Reward and win rate of a policy at several sampling temperatures, against an opponent that stays the same.

The robustness figure of DPO's paper (arXiv 2305.18290, figure 2, right), for any reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.core.errors import ConfigError
from prefopt.evaluate.comparison import win_rate
from prefopt.evaluate.evaluation import SampleSettings, draw_samples
from prefopt.evaluate.intervals import Interval, bootstrap_mean, cluster_means
from prefopt.evaluate.responses import Responses
from prefopt.evaluate.win_rate import shown
from prefopt.model.engine import LanguageModel
from prefopt.rollout.rewards import Reward


def parse_temperatures(text: str) -> list[float]:
    """Temperatures written as `0,0.5,1`, or with a step as `0,0.25,...,1`. ConfigError for anything else, or repeats."""
    words = [word.strip() for word in text.split(",")]
    try:
        if "..." in words:
            if len(words) != 4 or words[2] != "...":
                raise ValueError
            first, second, last = (float(words[at]) for at in (0, 1, 3))
            steps = (last - first) / (second - first)
            if not 1 <= steps < 1000 or abs(steps - round(steps)) > 1e-6:
                raise ValueError
            found = [round(first + (second - first) * at, 9) for at in range(round(steps) + 1)]
        else:
            found = [float(word) for word in words]
        if len(set(found)) < len(found) or not all(0 <= value < float("inf") for value in found):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f'--temperatures: "{text}" is no list of temperatures', todo="Write 0,0.5,1, or with a step 0,0.25,...,1."
        ) from None
    return sorted(found)


def temperature_sweep(
    model: LanguageModel,
    opponent: Responses,
    opponent_scores: Sequence[Sequence[float]],
    reward: Reward,
    temperatures: Sequence[float],
    settings: SampleSettings,
    *,
    tolerance: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each temperature {"temperature", "reward", "win_rate", "finished", "length"} of `model` on the opponent's prompts.

    Each temperature draws with the same random streams, so that neighbouring points differ by the temperature more than by
    luck. At 0 all samples of a prompt are one; it is drawn once and meets every response of the opponent that the samples
    would. Intervals are those of `prefopt evaluate`: clustered by prompt. Length is in tokens.
    """
    points = []
    for temperature in temperatures:
        n = settings.samples_per_prompt if temperature > 0 else 1
        wanted = replace(settings, temperature=temperature, samples_per_prompt=n)
        rows = draw_samples(model, opponent.prompts, wanted, seed=seed, title=f"sampling at temperature {temperature:g}")
        texts = [[row.response for row in rows[at : at + n]] for at in range(0, len(rows), n)]
        scores = score_responses(reward, Responses(model.name, opponent.prompts, texts))
        if n < settings.samples_per_prompt:
            scores = [own * settings.samples_per_prompt for own in scores]
        clusters = [prompt for prompt, own in enumerate(scores) for _ in own]
        own_N = np.array([score for own in scores for score in own])
        their_N = np.array(
            [theirs[at % len(theirs)] for own, theirs in zip(scores, opponent_scores, strict=True) for at in range(len(own))]
        )
        prompts = [prompt for prompt in range(len(texts)) for _ in range(n)]
        lengths = cluster_means([float(len(row.response_ids)) for row in rows], prompts)
        points.append(
            {
                "temperature": temperature,
                "reward": mean_reward(scores, seed=seed),
                "win_rate": win_rate(own_N - their_N, clusters, tolerance=tolerance, seed=seed),
                "finished": sum(row.finished for row in rows) / len(rows),
                "length": bootstrap_mean(lengths, seed=seed),
            }
        )
    return points


def score_responses(reward: Reward, responses: Responses) -> list[list[float]]:
    """A score for each response to each prompt, in one call of `reward`."""
    prompts = [prompt.given for prompt, own in zip(responses.prompts, responses.texts, strict=True) for _ in own]
    flat = iter(reward(prompts, [text for own in responses.texts for text in own]))
    return [[next(flat) for _ in own] for own in responses.texts]


def mean_reward(scores: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Mean over prompts of the mean score of a prompt's responses, with its interval."""
    return bootstrap_mean([float(np.mean(own)) for own in scores], seed=seed)


def temperature_lines(points: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the sweep as plain text."""
    lines = ["temperature  win rate                 reward"]
    for point in points:
        lines.append(f"{point['temperature']:11g}  {shown(point['win_rate']['rate']):<23}  {shown(point['reward'])}")
    return lines
