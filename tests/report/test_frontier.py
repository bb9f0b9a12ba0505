"""The figure of a frontier: every method named once, the front as a staircase, and no point that cannot be drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from prefopt.evaluate.frontier import Point, exactly, frontier_json
from prefopt.evaluate.intervals import Interval
from prefopt.report import frontier as module
from prefopt.report.frontier import save_frontier_figure


def interval(value: float, width: float) -> Interval:
    return {"value": value, "low": value - width, "high": value + width, "n": 9}


def found(*, bound: bool = True) -> dict[str, Any]:
    points = [
        Point("reference", interval(0.1, 0.02), exactly(0.0)),
        *(
            Point("dpo", interval(0.2 * step, 0.1), interval(step, 2.0), beta=0.1, seed=0, step=step, run="a")
            for step in (1, 2)
        ),
        Point("sft", interval(0.05, 0.1), interval(-0.2, 0.4), seed=0, step=4, run="b"),  # an estimate of a small KL
    ]
    best = [Point("best-of-n", interval(0.1 * n, 0.02), exactly(n / 4), n=n, kl_is_bound=True) for n in (1, 2, 4)]
    return frontier_json([*points, *(best if bound else [])], evaluation={"reward": "vader"})


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The axes of the figure."""
    kept: list[Any] = []

    def keep(path: Path, plot: Any, **_: Any) -> None:
        kept.append(Figure().add_subplot())
        plot(kept[0])

    monkeypatch.setattr(module, "save", keep)
    save_frontier_figure(path, found(**options))
    return kept[0]


@pytest.mark.parametrize("sqrt_kl", [False, True])
def test_the_file_names_every_method_once_and_is_the_same_each_time(tmp_path: Path, sqrt_kl: bool) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_frontier_figure(tmp_path / name / "f.svg", found(), sqrt_kl=sqrt_kl)
    text = (tmp_path / "a" / "f.svg").read_text()
    assert text == (tmp_path / "b" / "f.svg").read_text()
    for word in ("dpo", "sft", "best-of-n", "Pareto front", "reference"):
        assert len(re.findall(rf">{word}<", text)) == 1, word
    assert ("√KL" in text) == sqrt_kl and "open marks: upper bound" in text and "mean reward (vader)" in text
    save_frontier_figure(tmp_path / "f.png", found(), sqrt_kl=sqrt_kl)
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_bounds_are_spoken_of_only_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bound" not in drawn(tmp_path, monkeypatch, bound=False).get_xlabel()


def test_the_staircase_is_the_highest_reward_at_no_more_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path, monkeypatch)
    (stairs,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert stairs.get_drawstyle() == "steps-post"
    x, y = np.asarray(stairs.get_xdata()), np.asarray(stairs.get_ydata())
    points = [(point["kl"]["value"], point["reward"]["value"]) for point in found()["points"]]
    for kl in np.linspace(0, 2, 21):
        height = y[np.searchsorted(x, kl, side="right") - 1]
        assert height == max(reward for at, reward in points if max(0, at) <= kl)


def test_a_method_looks_the_same_in_every_figure_and_no_two_alike() -> None:
    assert module._places(["sft", "dpo"]) == {"sft": 5, "dpo": 0}
    many = module._places([*"abcdefghijk", "ipo", "best-of-n"])
    assert many["ipo"] == 1 and many["a"] == 0 and many["b"] == 2
    assert len(set(many.values())) == 13 and many["k"] == 12
    looks = {(place % 8, (place + place // 8) % 8) for place in many.values()}
    assert len(looks) == 13


def test_methods_differ_in_colour_and_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path, monkeypatch)
    marks = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert len({line.get_marker() for line in marks}) == len({line.get_color() for line in marks}) == len(marks) == 4
    (open_marks,) = [line for line in marks if line.get_label() == "best-of-n"]
    assert matplotlib.colors.same_color(open_marks.get_markerfacecolor(), "white")
