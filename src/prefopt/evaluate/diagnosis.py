"""What went on inside a run: which log-probs moved, what explains the margins, which pairs speak against their label.

Shapes: G pairs; a pair's responses are (chosen, rejected).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.data.tokens import TokenGroup
from prefopt.evaluate.intervals import Floats, bootstrap_mean, wilson

Logps = Sequence[NDArray[Any]]  # of a pair: for each response the log-probs of its scored tokens, nats

MOST_TOKENS = 12
FEWEST_OCCURRENCES = 5  # a token seen less often says little
MOST_PAIRS = 20


def diagnosis(
    pairs: Sequence[TokenGroup],
    policy: Sequence[Logps],
    reference: Sequence[Logps],
    *,
    beta: float,
    decode: Callable[[int], str],
    seed: int = 0,
) -> dict[str, Any]:
    """The "diagnosis" section of evaluation.json, from the log-probs of both models on pairs.

    displacement: how far the log-probs of chosen and rejected moved (nats a response, with intervals), the share of pairs
    whose chosen response became less likely, and the tokens of chosen responses that fell and rose most. length: how much of
    the margin a line through the difference of lengths explains, and the margin at equal length. satisfied: pairs that the
    reference itself orders rightly, and how sigmoid(-beta margin), the weight of a pair in DPO's gradient (arXiv 2305.18290,
    section 4), is spread under the policy. contradicted: pairs whose label the policy denies most confidently, with the
    probability that it gives to the label: candidates for noise.
    """
    changes = [
        [np.asarray(a, np.float64) - b for a, b in zip(*both, strict=True)] for both in zip(policy, reference, strict=True)
    ]
    ratio_G2 = np.array([[float(part.sum()) for part in change] for change in changes])
    margin_G = ratio_G2[:, 0] - ratio_G2[:, 1]
    return {
        "displacement": _displacement(pairs, changes, ratio_G2, decode, seed),
        "length": _length(pairs, margin_G),
        "satisfied": _satisfied(reference, beta * margin_G),
        "contradicted": _contradicted(pairs, beta * margin_G),
    }


def _displacement(
    pairs: Sequence[TokenGroup], changes: Sequence[Sequence[Floats]], ratio_G2: Floats, decode: Callable[[int], str], seed: int
) -> dict[str, Any]:
    fell = float((ratio_G2[:, 0] < 0).sum() + (ratio_G2[:, 0] == 0).sum() / 2)
    moved: dict[int, list[float]] = defaultdict(list)
    for group, (of_chosen, _) in zip(pairs, changes, strict=True):
        for token, change in zip(group.response_ids[0][group.scored[0]].tolist(), of_chosen.tolist(), strict=True):
            moved[token].append(change)
    known = [
        (float(np.mean(values)), len(values), token) for token, values in moved.items() if len(values) >= FEWEST_OCCURRENCES
    ]
    known.sort()

    def listed(rows: Sequence[tuple[float, int, int]]) -> list[dict[str, Any]]:
        return [{"token": decode(token), "change": change, "count": count} for change, count, token in rows]

    return {
        "chosen": bootstrap_mean(ratio_G2[:, 0], seed=seed),
        "rejected": bootstrap_mean(ratio_G2[:, 1], seed=seed),
        "chosen_fell": wilson(fell, len(ratio_G2)),
        "tokens_that_fell": listed([row for row in known[:MOST_TOKENS] if row[0] < 0]),
        "tokens_that_rose": listed([row for row in known[::-1][:MOST_TOKENS] if row[0] > 0]),
    }


def _length(pairs: Sequence[TokenGroup], margin_G: Floats) -> dict[str, Any]:
    """Least squares of the margin (nats) on the difference of scored tokens, chosen less rejected."""
    counts = np.array([[int(flags.sum()) for flags in group.scored] for group in pairs], dtype=np.float64)
    difference = counts[:, 0] - counts[:, 1]
    spread = float(difference.var())
    if len(pairs) < 3 or spread == 0 or margin_G.var() == 0:
        return {
            "explained": None,
            "nats_per_token": None,
            "margin_at_equal_length": None,
            "mean_difference": float(difference.mean()),
        }
    slope = float(((difference - difference.mean()) * (margin_G - margin_G.mean())).mean() / spread)
    return {
        "explained": float(slope**2 * spread / margin_G.var()),
        "nats_per_token": slope,
        "margin_at_equal_length": float(margin_G.mean() - slope * difference.mean()),
        "mean_difference": float(difference.mean()),
    }


def _satisfied(reference: Sequence[Logps], reward_margin_G: Floats) -> dict[str, Any]:
    sums = np.array([[float(np.asarray(part, np.float64).sum()) for part in pair] for pair in reference])
    ahead = sums[:, 0] - sums[:, 1]
    weight_G = 1 / (1 + np.exp(np.clip(reward_margin_G, -500, 500)))
    shares, edges = np.histogram(weight_G, bins=np.linspace(0, 1, 21))
    return {
        "by_reference": wilson(float((ahead > 0).sum() + (ahead == 0).sum() / 2), len(ahead)),
        "by_policy": wilson(float((reward_margin_G > 0).sum() + (reward_margin_G == 0).sum() / 2), len(ahead)),
        "gradient_weight": {
            "mean": float(weight_G.mean()),
            "quantiles": {str(q): float(np.quantile(weight_G, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
            "histogram": {"edges": edges.tolist(), "counts": shares.tolist()},
        },
    }


def _contradicted(pairs: Sequence[TokenGroup], reward_margin_G: Floats) -> list[dict[str, Any]]:
    order = np.argsort(reward_margin_G, kind="stable")[:MOST_PAIRS]
    return [
        {
            "source": pairs[place].source,
            "margin": float(reward_margin_G[place]),
            "probability_of_label": float(1 / (1 + np.exp(-reward_margin_G[place]))),
        }
        for place in order.tolist()
        if reward_margin_G[place] < 0
    ]


def kl_per_reward(kl: float, gained: float) -> float | None:
    """Nats of KL spent for each unit of reward gained; None where nothing was gained."""
    return kl / gained if gained > 0 else None
