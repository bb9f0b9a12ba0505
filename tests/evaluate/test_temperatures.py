"""A temperature sweep: what its points are at 0 and 1, what temperatures may be written, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from prefopt.core.errors import ConfigError
from prefopt.evaluate.comparison import compare
from prefopt.evaluate.evaluation import SampleSettings
from prefopt.evaluate.responses import Responses
from prefopt.evaluate.temperatures import (
    mean_reward,
    parse_temperatures,
    score_responses,
    temperature_lines,
    temperature_sweep,
)
from prefopt.model.engine import LanguageModel
from prefopt.report.temperatures import check_figure_name, save_temperature_figure
from prefopt.rollout.prompts import as_prompt
from prefopt.rollout.rewards import Reward, load_reward
from prefopt.rollout.sample import sample
from tiny_word_model import language_model

PROMPTS = [as_prompt(text) for text in ("a b", "c", "d e a", "b b", "e", "a c e b")]
LENGTH = load_reward("length")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model(seed=0)


def sweep(model: LanguageModel, opponent: Responses, reward: Reward, *temperatures: float, n: int = 1) -> list[dict[str, Any]]:
    settings = SampleSettings(n, max_new_tokens=5)
    return temperature_sweep(model, opponent, score_responses(reward, opponent), reward, temperatures, settings, seed=7)


def test_each_point_is_an_evaluation_at_its_temperature(model: LanguageModel) -> None:
    theirs = sample(language_model(seed=1), PROMPTS, n=2, max_new_tokens=5, seed=9)
    opponent = Responses("other", PROMPTS, [[row.response for row in theirs[at : at + 2]] for at in range(0, 12, 2)])
    points = sweep(model, opponent, LENGTH, 0.5, 1.0, n=2)
    for point in points:
        ours = sample(model, PROMPTS, n=2, temperature=point["temperature"], max_new_tokens=5, seed=7)
        wanted = compare(ours, theirs, LENGTH, seed=7).sections
        assert point["win_rate"] == wanted["win_rate"]
        assert point["reward"] == wanted["reward"]["policy"]
        assert point["length"] == wanted["length"]["policy"]
        assert mean_reward(score_responses(LENGTH, opponent), seed=7) == wanted["reward"]["reference"]
    assert [point["temperature"] for point in points] == [0.5, 1.0]


def test_at_0_one_response_meets_all_of_the_opponents(model: LanguageModel) -> None:
    greedy = [row.response for row in sample(model, PROMPTS, temperature=0, max_new_tokens=5)]
    opponent = Responses("itself", PROMPTS, [[text, text + " a a a"] for text in greedy])
    (point,) = sweep(model, opponent, LENGTH, 0.0, n=2)
    assert (point["win_rate"]["wins"], point["win_rate"]["losses"], point["win_rate"]["ties"]) == (0, 6, 6)
    assert point["win_rate"]["rate"]["value"] == 0.25
    assert point["reward"]["value"] == np.mean([len(text.split()) for text in greedy])
    assert len(temperature_lines([point])) == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0,0.25,...,1", [0, 0.25, 0.5, 0.75, 1]),
        ("0.1, 0.2, ..., 0.5", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("1,0", [0, 1]),
        ("0.7", [0.7]),
    ],
)
def test_temperatures_as_they_are_written(text: str, found: list[float]) -> None:
    assert parse_temperatures(text) == pytest.approx(found)


@pytest.mark.parametrize("text", ["", "a", "0,...,1", "0,0.3,...,1", "1,0.5,...,2", "-1", "1,1", "0,0,...,1", "inf", "0,1,..."])
def test_what_is_no_list_of_temperatures_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no list of temperatures"):
        parse_temperatures(text)


def drawn(policies: dict[str, list[float]]) -> dict[str, Any]:
    def point(at: int, value: float) -> dict[str, Any]:
        return {"temperature": at / 4, "win_rate": {"rate": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}}}

    curves = {name: [point(at, value) for at, value in enumerate(values)] for name, values in policies.items()}
    return {"reward": "length", "policies": curves}


def test_the_figure_names_every_policy_and_repeats(tmp_path: Path) -> None:
    sweep = drawn({"runs/dpo": [0.6, 0.7, 0.5], "runs/sft": [0.5, 0.4, 0.45]})
    save_temperature_figure(tmp_path / "one" / "t.svg", sweep)
    save_temperature_figure(tmp_path / "two" / "t.svg", sweep)
    text = (tmp_path / "one" / "t.svg").read_text(encoding="utf-8")
    assert (tmp_path / "two" / "t.svg").read_text(encoding="utf-8") == text
    words = set(ElementTree.fromstring(text).itertext())
    assert {"dpo", "sft", "sampling temperature of the policy", "win rate by length"} <= words
    save_temperature_figure(tmp_path / "t.png", drawn({"one": [0.6]}))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_has_a_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"figure\.gif: is no name"):
        check_figure_name(Path("figure.gif"))
    assert list(tmp_path.iterdir()) == []
