"""How much better a sampled response, or a token of it, was than expected.

Shapes: S responses, K responses of one prompt, one after the other; tokens of a response in arrays of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def token_rewards(score: float, log_ratio: Floats, kl_coefficient: float) -> Floats:
    """Reward of each token of a response: -kl_coefficient * log(policy / reference), and the score with the last one.

    arXiv 1909.08593 section 2.2: their sum is the score less the price of the response's KL.
    """
    rewards: Floats = -kl_coefficient * np.asarray(log_ratio, dtype=np.float64)
    rewards[-1] += score
    return rewards


def gae(rewards: Floats, values: Floats, *, discount: float = 1.0, gae_lambda: float = 0.95) -> tuple[Floats, Floats]:
    """(advantages, returns) of the tokens of one response, from their rewards and the values before them.

    Generalised advantage estimation (arXiv 1506.02438 eq. 16): the sum of (discount * lambda)^l * delta_{t+l} with
    delta_t = reward_t + discount * value_{t+1} - value_t, and no value behind the last token. returns = advantages + values.
    """
    advantages = np.empty(len(rewards), dtype=np.float64)
    running = following = 0.0
    for place in range(len(rewards) - 1, -1, -1):
        delta = rewards[place] + discount * following - values[place]
        running = delta + discount * gae_lambda * running
        advantages[place] = running
        following = values[place]
    return advantages, advantages + values


def leave_one_out(rewards: Floats, samples: int) -> Floats:
    """Reward less the mean of the other `samples` - 1 rewards of the same prompt, shape (S,) (arXiv 2402.14740 eq. 7)."""
    table = np.asarray(rewards, dtype=np.float64).reshape(-1, samples)
    others = (table.sum(axis=1, keepdims=True) - table) / (samples - 1)
    found: Floats = (table - others).ravel()
    return found


def group_normalised(rewards: Floats, samples: int) -> Floats:
    """(reward - mean) / standard deviation over the `samples` rewards of the same prompt, shape (S,) (arXiv 2402.03300, 4.1.2).

    0 where all of them are equal, up to rounding: their order says nothing.
    """
    table = np.asarray(rewards, dtype=np.float64).reshape(-1, samples)
    centred = table - table.mean(axis=1, keepdims=True)
    spread = table.std(axis=1, ddof=1, keepdims=True)
    noise = 1e-6 * np.maximum(1.0, np.abs(table).max(axis=1, keepdims=True))
    return np.where(spread > noise, centred / np.where(spread > noise, spread, 1.0), 0.0).ravel()


def normalised(parts: Sequence[Floats]) -> list[Floats]:
    """The numbers of all `parts` together with mean 0 and standard deviation 1; only their mean is taken off where all are equal."""
    flat = np.concatenate(parts)
    spread = flat.std()
    scale = spread if spread > 1e-8 else 1.0
    return [(part - flat.mean()) / scale for part in parts]


def scaled(parts: Sequence[Floats]) -> list[Floats]:
    """The numbers of all `parts` over their standard deviation, the mean included, so that signs stay; unchanged where all are equal."""
    spread = float(np.concatenate(parts).std())
    return [part / spread for part in parts] if spread > 1e-8 else list(parts)


def adapted(coefficient: float, *, kl: float, target: float, responses: int, horizon: float) -> float:
    """The KL coefficient after a round of `responses` with a KL of `kl` nats a response (arXiv 1909.08593, section 2.2).

    It grows where the KL is above `target` and shrinks below, by at most a fifth of `responses / horizon`.
    """
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return coefficient * max(1 + error * min(responses / horizon, 1.0), 0.0)
