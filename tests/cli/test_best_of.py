"""`prefopt sample --best-of`: the best of the very samples that `-n` would write, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import prefopt
from train.tiny_runs import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("best") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("What of the river?\nWhat of the river?\nAnd a stone?\n")  # the same twice: still a line each
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_keeps_the_best_of_the_samples_that_n_draws(tmp_path: Path, model: Path, prompts: Path) -> None:
    words = ["sample", prompts, "-m", model, "--max-new-tokens", 8, "--seed", 3]
    best = prefopt(*words, "-o", tmp_path / "best.jsonl", "--best-of", 3, "--reward", "length", "--json")
    assert best.code == 0, best.err
    assert prefopt(*words, "-o", tmp_path / "all.jsonl", "-n", 3).code == 0
    every = [text for line in lines(tmp_path / "all.jsonl") for text in line["responses"]]
    found = lines(tmp_path / "best.jsonl")
    assert json.loads(best.out) == found and len(found) == 3
    for at, line in enumerate(found):
        drawn = every[3 * at : 3 * at + 3]
        assert line["responses"] == [drawn[line["best"]]]
        assert line["rewards"][line["best"]] == max(line["rewards"]) and len(line["rewards"]) == 3
    labelled = prefopt("label", tmp_path / "all.jsonl", "-r", "length", "-o", tmp_path / "pairs.jsonl")
    assert labelled.code == 0, labelled.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--best-of", 1, "--reward", "length"], "best of 1: there is nothing to choose from"),
        (["--best-of", 4], "--best-of 4 has no reward to choose by"),
        (["--reward", "length"], "--reward is given without --best-of"),
        (["--best-of", 4, "--reward", "length", "-n", 2], "both -n 2 and --best-of 4"),
        (["--best-of", 4, "--reward", "lenght"], 'did you mean "length"'),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_read(tmp_path: Path, prompts: Path, words: list[Any], said: str) -> None:
    done = prefopt("sample", prompts, "-m", tmp_path / "no-model", "-o", tmp_path / "out.jsonl", *words)
    assert done.code == 2 and said in done.err
    assert not (tmp_path / "out.jsonl").exists()
