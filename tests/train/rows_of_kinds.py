"""Rows of every kind that a loss can learn from, and which losses are trained on which of them."""

from __future__ import annotations

from typing import Any

from prefopt.core.losses.table import LOSSES, resolve_parts
from train.tiny_runs import GOOD, POOR, preference_rows

Row = dict[str, Any]


def pairs(count: int = 12, *, ties: bool = False) -> list[Row]:
    """Pairs with a margin and a probability; with `ties` every third one is a tie."""
    return [
        {**row, "margin": 0.5 + number % 4, "probability": 0.55 + 0.1 * (number % 5), "tie": ties and number % 3 == 2}
        for number, row in enumerate(preference_rows(count))
    ]


def labels(count: int = 12, *, desirable: int = 2, of: int = 3) -> list[Row]:
    """Single responses, `desirable` of every `of` are."""
    rows = []
    for number, row in enumerate(preference_rows(count)):
        good = number % of < desirable
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows


def several(number: int) -> list[str]:
    """2 to 4 different responses of different lengths."""
    texts = [GOOD[number % 5], POOR[(number + 1) % 5], POOR[(3 * number + 2) % 5] + ", they say", "no"]
    return [f"It {text} {number}" for text in texts[: 2 + number % 3]]


def scores(count: int = 12, *, tied: bool = False) -> list[Row]:
    """2 to 4 scored responses; with `tied` every third row has two equal ones among others."""
    rows = []
    for number, row in enumerate(preference_rows(count)):
        texts = several(number)
        worth = [1.5 - 0.5 * ((place + number) % len(texts)) for place in range(len(texts))]
        if tied and len(texts) > 2:
            worth[1] = worth[0]
        rows.append({"prompt": row["prompt"], "responses": texts, "scores": worth})
    return rows


def rankings(count: int = 12) -> list[Row]:
    """2 to 4 ranked responses."""
    rows = []
    for number, row in enumerate(preference_rows(count)):
        texts = several(number)
        ranks = [1 + (place + number) % len(texts) for place in range(len(texts))]
        rows.append({"prompt": row["prompt"], "responses": texts, "ranking": ranks})
    return rows


def demonstrations(count: int = 12) -> list[Row]:
    """Single responses to imitate."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(count)]


def rows_for(section: Row, kind: str, count: int = 12) -> list[Row]:
    """Rows of `kind` as the losses of `section` take them: with ties where they learn from these."""
    facts = [part.facts for part in resolve_parts(section)]
    if kind == "pair":
        return pairs(count, ties=all(one.learns_from_ties or one.unit == "token" for one in facts))
    if kind == "scores":
        return scores(count, tied=not any(one.strict_order for one in facts))
    return {"label": labels, "ranking": rankings, "demonstration": demonstrations}[kind](count)


# Every loss on every kind of rows that it learns from.
SINGLE: list[tuple[Row, str]] = [
    ({"name": name}, kind) for name, facts in LOSSES.items() if not facts.needs_samples for kind in facts.accepts
]

# Ways of reading and mixing them.
VARIANTS: list[tuple[Row, str]] = [
    ({"name": "dpo", "label_smoothing": 0.1}, "pair"),
    ({"name": "dpo", "wpo": True}, "pair"),
    ({"name": "dpo", "ld_alpha": 0.3}, "pair"),
    ({"name": "dpo", "divergence": "js"}, "pair"),
    ({"name": "dpo", "divergence": "alpha", "divergence_alpha": 0.7}, "pair"),
    ({"name": "ipo", "reduce": "sum", "ld_alpha": 0.5}, "pair"),
    ({"name": "beta_dpo", "wpo": True, "ld_alpha": 0.3}, "pair"),
    ({"name": "tdpo", "version": "tdpo1", "wpo": True}, "pair"),
    ({"name": "odpo", "scaling": "identity"}, "pair"),
    ({"name": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.5}, "label"),
    ({"name": "all_pairs", "weighting": "gap"}, "scores"),
    ({"name": "all_pairs", "weighting": "lambda"}, "scores"),
    ({"dpo": 1.0, "sft": 0.2}, "pair"),
    ({"kto": 1.0, "sft": 0.1}, "label"),
    ({"kto": 1.0, "plackett_luce": 0.5}, "pair"),
    ({"rao_kupper": 1.0, "sft": 0.1}, "pair"),
    ({"plackett_luce": 1.0, "sft": 0.1}, "ranking"),
    ({"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0}, "pair"),  # MPO, arXiv 2411.10442
    ({"tdpo": 1.0, "aot": 0.5, "beta_dpo": 0.5}, "pair"),
    ({"reward": 1.0, "reward_ranking": 0.5}, "pair"),
]


def title(case: Any) -> str:
    """Name of a case in the report of the tests."""
    if isinstance(case, str):
        return case
    return " ".join(f"{key}={value}" if key != "name" else str(value) for key, value in case.items())
