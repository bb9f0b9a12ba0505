"""Best-of-n: of n samples the one with the highest reward. What it earns for every n, and how far it is from the policy.

Shapes: N samples of one prompt, K of them drawn without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.core.errors import ConfigError, DataError
from prefopt.rollout.label import score_samples
from prefopt.rollout.rewards import Reward
from prefopt.rollout.sample import SampleRow, samples_of

Floats = NDArray[np.float64]


def best_of(rows: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float]], n: int) -> list[dict[str, Any]]:
    """Each row (as `prefopt.rollout.sample.samples_of` gives them) with the best of its first `n` responses alone.

    `scores`: a number for each response. `responses`, `finished` and `response_tokens` keep one entry; `best` is its
    place among the n, and `rewards` are the scores of all n. Of equal scores the first wins, so that the choice is that of
    a stream of samples. ConfigError for n below 2, DataError where a row has fewer responses or scores.
    """
    check_n(n)
    if len(rows) != len(scores):
        raise DataError(f"{len(rows)} rows and {len(scores)} lists of scores", todo="Give one list of scores for each row.")
    return [_best(at, row, given, n) for at, (row, given) in enumerate(zip(rows, scores, strict=True))]


def best_lines(samples: Sequence[SampleRow], reward: Reward, n: int) -> list[dict[str, Any]]:
    """`best_of` of `n` samples of each prompt, in the order of `prefopt.rollout.sample.sample`: one line a prompt."""
    rows = [row for at in range(0, len(samples), n) for row in samples_of(samples[at : at + n])]
    return best_of(rows, score_samples(rows, reward), n)


def check_n(n: int) -> None:
    """ConfigError for a best-of-n that chooses among fewer than two."""
    if n < 2:
        raise ConfigError(f"best of {n}: there is nothing to choose from", todo="Give n of at least 2, for example 8.")


def _best(at: int, row: Mapping[str, Any], given: Sequence[float], n: int) -> dict[str, Any]:
    responses = row["responses"]
    if len(responses) < n or len(given) != len(responses):
        raise DataError(
            f"row {at}: {len(responses)} responses and {len(given)} scores, for the best of {n}",
            todo=f"Sample at least {n} responses to each prompt, and give one score for each.",
        )
    rewards = [float(score) for score in given[:n]]
    best = max(range(n), key=rewards.__getitem__)
    kept = {key: [row[key][best]] for key in ("responses", "finished", "response_tokens") if row.get(key) is not None}
    return {"prompt": row["prompt"], **kept, "best": best, "rewards": rewards}


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n in nats: an upper bound of KL(best-of-n || policy).

    The formula of arXiv 2009.01325 (appendix G.3). It is exact where no two responses have the same reward and each is
    improbable; in general it is an upper bound, which can be far from the KL where a few responses are likely
    (arXiv 2401.01879, theorem 3.1). ConfigError for n below 1.
    """
    if n < 1:
        raise ConfigError(f"best of {n}", todo="n is at least 1: a single sample, which is the policy itself.")
    return math.log(n) - (n - 1) / n


def expected_best_of(scores: Sequence[float] | Floats, k: int, values: Sequence[float] | Floats | None = None) -> float:
    """Unbiased estimate, from N samples, of the expected value of the best of `k` samples; k is at most N.

    It is the mean over all subsets of k samples of the value of the one with the highest score: with scores in ascending
    order, sum over i of C(i - 1, k - 1) / C(N, k) * value_i (arXiv 2112.09332, appendix I). `values`: what is wanted of
    the chosen one, where it is chosen by another score, as a true reward by a learned one; by default the scores.
    Samples of equal score share their weights: each of them is as likely to come first. ConfigError for k outside [1, N].
    """
    chosen_by = np.asarray(scores, dtype=np.float64)
    wanted = chosen_by if values is None else np.asarray(values, dtype=np.float64)
    if chosen_by.ndim != 1 or chosen_by.shape != wanted.shape:
        raise DataError(f"scores of shape {chosen_by.shape}, values of shape {wanted.shape}", todo="Give one of each a sample.")
    return float(weights_of_best(chosen_by, k) @ wanted)


def weights_of_best(scores: Floats, k: int) -> Floats:
    """Probability of each of the N samples to be the best of `k` drawn without replacement, shape (N,); they add up to 1."""
    n = len(scores)
    if not 1 <= k <= n:
        raise ConfigError(f"best of {k} from {n} samples", todo="Sample more responses to each prompt, or ask for a smaller n.")
    by_rank = np.zeros(n)
    by_rank[n - 1] = k / n
    for rank in range(n - 1, k - 1, -1):  # C(rank - 1, k - 1) / C(rank, k - 1): no large numbers
        by_rank[rank - 1] = by_rank[rank] * (rank - k + 1) / rank
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    sums = np.concatenate([[0.0], np.cumsum(by_rank)])
    shared: Floats = ((sums[ends] - sums[ends - count]) / count)[place]
    return shared


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`, and `most` itself."""
    check_n(most)
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
