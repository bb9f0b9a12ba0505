"""Where a loss is said to start is where it starts: at a log-ratio or score of 0, on rows of every kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from objective.made_rows import DEMONSTRATION, PAIR, group, judged, label, randoms, ranking, responses, scores, tokens
from prefopt.core.losses.starts import start_loss
from prefopt.core.losses.table import LOSSES, loss_facts, resolve_parts
from prefopt.data.encode import TokenGroup

SURE = replace(PAIR, margin=2.0, probability=1.0)
ROWS: dict[str, list[list[TokenGroup]]] = {
    "pair": [
        [group(replace(SURE, margin=None), 2, 1), group(replace(SURE, margin=None), 1, 4, weight=2.0)],
        [group(replace(SURE, margin=0.5, probability=0.4), 5, 1)],
        [group(SURE, 1, 2)],
        [group(replace(SURE, tie=True), 1, 2)],
    ],
    "label": [
        [group(label(True), 2), group(label(False), 3)],
        [group(label(True), 1)],
        [group(label(False), 2), group(label(False), 2), group(label(True), 1, weight=3.0)],
    ],
    "scores": [[group(scores(0.5, 2.0, -1.0), 1, 2, 1)], [group(scores(1.0, 1.0), 1, 2)]],
    "ranking": [[group(ranking(2, 1, 3, 4), 1, 2, 1, 1)]],
    "demonstration": [[group(DEMONSTRATION, 4)], [group(DEMONSTRATION, 1)]],
}


def rows_for(options: dict[str, Any]) -> list[list[TokenGroup]]:
    """Steps of rows that the loss takes: with its columns, without ties that it refuses."""
    facts = [part.facts for part in resolve_parts(options)]

    def fits(row: TokenGroup) -> bool:
        columns = {column for one in facts for column in one.columns}
        has_columns = all(getattr(row.feedback, column) is not None for column in columns)
        ties = row.feedback.tie and not all(one.learns_from_ties for one in facts)
        equal = len(set(row.feedback.scores)) < len(row.feedback.scores) and any(one.strict_order for one in facts)
        return has_columns and not ties and not equal and all(row.feedback.kind in one.accepts for one in facts)

    kept = [[row for row in step if fits(row)] for steps in ROWS.values() for step in steps]
    return [step for step in kept if step]


def at_the_start(options: dict[str, Any], rows: Sequence[TokenGroup], seed: int = 0) -> float:
    """The loss of a step in which policy and reference say the same, drawn with `seed`, of every token; scores are 0."""
    if loss_facts(next(iter(resolve_parts(options))).name).trains_reward_model:
        return float(judged(options, rows, torch.zeros(responses(rows), dtype=torch.float64)).loss)
    policy_N = randoms(tokens(rows), seed).detach()
    more = {"kl_N": torch.zeros_like(policy_N), "log_square_N": policy_N / 2, "mismatch": 0.0}
    return float(judged(options, rows, policy_N, policy_N.clone(), learn=True, **more).loss)


VARIANTS: list[dict[str, Any]] = [
    {"name": "dpo", "beta": 0.7, "label_smoothing": 0.2, "ld_alpha": 0.3},
    *({"name": "ipo", "beta": 0.3, "divergence": divergence} for divergence in ("forward_kl", "js", "alpha")),
    {"name": "ipo", "reduce": "sum", "beta": 2.0},
    {"name": "exo", "label_smoothing": 0.2, "beta": 3.0},
    {"name": "discopop", "tau": 0.3},
    {"name": "robust", "label_smoothing": 0.3},
    {"name": "sppo", "beta": 0.7},
    {"name": "cal_dpo", "beta": 0.7},
    {"name": "odpo", "alpha": 0.0},
    {"name": "r_dpo", "alpha": 0.0},
    {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 1.5},
    {"dpo": 0.5, "ipo": {"weight": 2.0, "beta": 0.4}, "beta": 0.2},
    {"kto": 1.0, "bco": 0.3},
]


OF_ROWS = [name for name, facts in LOSSES.items() if not facts.needs_samples]


@pytest.mark.parametrize("options", [{"name": name} for name in OF_ROWS] + VARIANTS, ids=str)
def test_the_start_is_exact_or_depends_on_the_rows(options: dict[str, Any]) -> None:
    starts = [at_the_start(options, step, seed) for step in rows_for(options) for seed in (0, 1)]
    expected = start_loss(options)
    if expected is None:
        assert max(starts) - min(starts) > 1e-3
    elif options == {"name": "reward"}:  # rows with a margin start elsewhere
        without = [step for step in rows_for(options) if all(row.feedback.margin is None for row in step)]
        assert without and all(at_the_start(options, step) == pytest.approx(expected, rel=1e-12) for step in without)
    else:
        assert starts == pytest.approx([expected] * len(starts), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "dpo", "wpo": True},
        {"name": "kto", "desirable_weight": 1.5},
        {"dpo": 1.0, "sft": 0.2},
        {"plackett_luce": 1.0, "best_of_k": 1.0},
    ],
    ids=str,
)
def test_options_and_parts_whose_start_depends_on_the_rows_have_none(options: dict[str, Any]) -> None:
    starts = [at_the_start(options, step, seed) for step in rows_for(options) for seed in (0, 1)]
    assert start_loss(options) is None and max(starts) - min(starts) > 1e-3


@pytest.mark.parametrize(
    "section", [{"name": "unheard of"}, {"name": "dpo", "unheard": 1}, {"name": "no_module:f"}, {}], ids=str
)
def test_what_is_not_understood_has_no_start(section: dict[str, Any]) -> None:
    assert start_loss(section) is None


def test_the_numbers_that_people_know() -> None:
    assert start_loss({"name": "dpo"}) == math.log(2)
    assert start_loss({"name": "ipo", "beta": 0.1}) == pytest.approx(25.0)
    assert start_loss({"name": "kto"}) == 0.5
