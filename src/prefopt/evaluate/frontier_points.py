"""A policy -> its point on the reward-KL plane, from its own samples; the reference's point, and best-of-n's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.evaluate.comparison import prompt_clusters
from prefopt.evaluate.evaluation import SampleSettings, draw_samples, log_ratios, streams
from prefopt.evaluate.frontier import exactly
from prefopt.evaluate.intervals import bootstrap_mean, cluster_means
from prefopt.model.engine import LanguageModel
from prefopt.rollout.best_of_n import expected_best_of, kl_bound, powers_of_two
from prefopt.rollout.prompts import Prompt
from prefopt.rollout.rewards import Reward
from prefopt.rollout.sample import SampleRow, scores_of


def policy_point(
    policy: LanguageModel,
    reference: LanguageModel,
    prompts: Sequence[Prompt],
    reward: Reward,
    settings: SampleSettings,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """`reward` and `kl` (nats a response) of `policy` with 95 % intervals by prompt, and `more`: length, share finished.

    The samples and both means are those of `prefopt.evaluate.evaluation.evaluate` with the same seed; the reference is
    not sampled again for every policy.
    """
    rows = draw_samples(policy, prompts, settings, seed=streams(seed)[0], title="sampling policy")
    ratios = log_ratios(policy, reference, rows)
    kl = bootstrap_mean(cluster_means(ratios, prompt_clusters(rows)), seed=seed)
    return {"reward": _reward(rows, reward, seed), "kl": kl, "more": _more(rows)}


def reference_point(
    reference: LanguageModel, prompts: Sequence[Prompt], reward: Reward, settings: SampleSettings, *, seed: int = 0
) -> dict[str, Any]:
    """The same of the reference itself, whose KL is 0."""
    rows = draw_samples(reference, prompts, settings, seed=streams(seed)[1], title="sampling reference")
    return {"reward": _reward(rows, reward, seed), "kl": exactly(0.0, len(prompts)), "more": _more(rows)}


def best_of_n_points(
    reference: LanguageModel,
    prompts: Sequence[Prompt],
    reward: Reward,
    chooses: Reward,
    settings: SampleSettings,
    *,
    most: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`n`, `reward`, `kl`, and `more` of n = 1, of best-of-n from the reference for n = 1, 2, 4 ... `most`; `chooses` picks, `reward` judges.

    All from `most` samples of each prompt (settings.samples_per_prompt is set aside), by the unbiased estimate
    `expected_best_of`; intervals by prompt. `kl` is the upper bound log n - (n - 1) / n.
    """
    drawn = SampleSettings(most, settings.max_new_tokens, 1.0, 1.0, settings.batch_size, settings.template)
    rows = draw_samples(reference, prompts, drawn, seed=streams(seed)[1], title="sampling reference")
    judged = np.array(scores_of(reward, rows)).reshape(-1, most)
    chosen_by = judged if chooses is reward else np.array(scores_of(chooses, rows)).reshape(-1, most)
    clusters = prompt_clusters(rows[::most])
    points = []
    for n in powers_of_two(most):
        of_prompts = [expected_best_of(scores, n, values) for scores, values in zip(chosen_by, judged, strict=True)]
        means = cluster_means(of_prompts, clusters)
        point = {"n": n, "reward": bootstrap_mean(means, seed=seed), "kl": exactly(kl_bound(n), len(means))}
        points.append(point | {"more": _more(rows) if n == 1 else {}})
    return points


def _reward(rows: Sequence[SampleRow], reward: Reward, seed: int) -> Any:
    return bootstrap_mean(cluster_means(scores_of(reward, rows), prompt_clusters(rows)), seed=seed)


def _more(rows: Sequence[SampleRow]) -> dict[str, float]:
    return {
        "tokens": float(np.mean([len(row.response_ids) for row in rows])),
        "finished": float(np.mean([row.finished for row in rows])),
    }
