"""The table of measures and the figures of rounds say what the run folder holds, and nothing where it holds nothing."""

from __future__ import annotations

from typing import Any

from prefopt.report.history import History
from prefopt.report.measures import measure_rows, round_samples
from prefopt.report.rounds import round_figures


def span(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 100}


def test_every_win_rate_accuracy_and_calibration_is_a_row() -> None:
    won = {"rate": span(0.6), "wins": 55, "ties": 10, "losses": 35, "unreadable": {"one_order": 1, "both_orders": 2}}
    rows = measure_rows(
        {
            "win_rates": {"reference": {"vader": won, "judge": {**won, "position": {"first_shown": span(0.7)}}}},
            "accuracies": {"rows.jsonl": {"model:runs/r": {"rows": 40, "accuracy": span(0.7), "categories": {"a": {}}}}},
            "calibrations": {"rows.jsonl": {"pairs": 40, "ece": span(0.1), "ece_by_chance": {"value": 0.08}}},
        }
    )
    assert [row["what"] for row in rows] == [
        "Win rate against reference, judged by vader",
        "Win rate against reference, judged by judge",
        "Accuracy of model:runs/r on rows.jsonl",
        "Calibration error on rows.jsonl",
    ]
    assert rows[0]["value"] == "60.0 % (55.0 to 65.0 %)"
    assert rows[0]["detail"] == "55 wins, 10 ties, 35 losses; 3 comparisons with a verdict that could not be read"
    assert "the one shown first won 70.0 %" in rows[1]["detail"]
    assert "0.0800 would be seen by chance" in rows[3]["detail"]
    assert measure_rows(None) == measure_rows({"heldout": {}}) == []


def rounds(count: int) -> list[dict[str, Any]]:
    shown = [{"prompt": "p", "response": "r", "score": 1.5, "kl": 2.0}]
    return [
        {"kind": "round", "step": 4 * at, "round": at, "shown": shown, "objective/scores": at / 10, "objective/scores_std": 0.1}
        | {"objective/kl": float(at), "objective/length": 9.0, "objective/entropy": 20.0}
        for at in range(count)
    ]


def test_rounds_have_figures_once_there_are_any() -> None:
    assert round_figures(History([{"kind": "step", "step": 1, "loss": 0.5}])) == []
    assert [figure.id for figure in round_figures(History(rounds(1)))] == ["round-reward", "round-kl", "round-length"]
    steps = [{"kind": "step", "step": at, "policy/clipfrac_avg": 0.1, "loss/value_avg": 0.2} for at in range(1, 5)]
    found = [figure.id for figure in round_figures(History([*rounds(3), *steps]))]
    assert found == ["round-reward", "round-kl", "round-frontier", "round-length", "round-clip", "round-value"]


def test_the_samples_of_the_last_round_are_shown() -> None:
    assert round_samples(rounds(2)) == [{"prompt": "p", "response": "r", "score": 1.5, "kl": 2.0}]
    assert round_samples([]) == []
