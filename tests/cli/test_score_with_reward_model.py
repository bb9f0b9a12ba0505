"""`prefopt score --reward-model`: one score a response, and how often the scores agree with the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.command_line import prefopt
from cli.refusals import MODEL, USAGE, assert_refused, files_below
from prefopt.evaluate.intervals import wilson
from train.tiny_reward_runs import write_reward_model
from train.tiny_runs import preference_rows, write_model, write_rows

RANKED = [
    {"prompt": f"What of {number}?", "responses": ["It is calm.", "no", "It is a stone"], "ranking": ranking}
    for number, ranking in enumerate(([1, 2, 3], [3, 1, 2], [2, 3, 1]))
]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("score") / "reward")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", preference_rows(20))
    return tmp_path


def scored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def words(reward_model: Path, *more: object) -> list[object]:
    return ["score", "--reward-model", reward_model, *more, "-o", "out.jsonl"]


def test_every_response_gets_a_score_and_pairs_an_accuracy(folder: Path, reward_model: Path) -> None:
    done = prefopt(*words(reward_model, "rows.jsonl", "--json"))
    assert (done.code, done.err) == (0, "")
    found, lines = json.loads(done.out), scored(folder)
    assert [line["source"] for line in lines] == [f"rows.jsonl:{number}" for number in range(1, 21)]
    assert all(line.keys() == {"source", "scores"} and len(line["scores"]) == 2 for line in lines)
    wins = sum(line["scores"][0] > line["scores"][1] for line in lines)
    assert 0 < wins < 20
    assert found == {"rows": 20, "refused": 0, "accuracy": wilson(wins, 20)}
    spoken = prefopt(*words(reward_model, "rows.jsonl"))
    assert spoken.out.startswith(f"accuracy {wins / 20:.3f} (") and "on 20 rows" in spoken.out
    assert "out.jsonl: 20 rows scored, 0 refused" in spoken.err


def test_swapped_rows_have_swapped_scores_and_the_other_accuracy(folder: Path, reward_model: Path) -> None:
    first = json.loads(prefopt(*words(reward_model, "rows.jsonl", "--json")).out)
    straight = scored(folder)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preference_rows(20)]
    write_rows(folder / "swapped.jsonl", swapped)
    second = json.loads(prefopt(*words(reward_model, "swapped.jsonl", "--json")).out)
    assert first["accuracy"]["value"] + second["accuracy"]["value"] == pytest.approx(1)
    for one, other in zip(straight, scored(folder), strict=True):
        assert np.allclose(one["scores"], other["scores"][::-1], atol=1e-5)


def test_rankings_have_an_accuracy_and_demonstrations_none(folder: Path, reward_model: Path) -> None:
    write_rows(folder / "ranked.jsonl", RANKED)
    found = json.loads(prefopt(*words(reward_model, "ranked.jsonl", "--json")).out)
    shares = []
    for line, row in zip(scored(folder), RANKED, strict=True):
        best_first = np.array(line["scores"])[np.argsort(row["ranking"])]
        shares.append(np.mean([best_first[a] > best_first[b] for a in range(3) for b in range(a + 1, 3)]))
    assert found["accuracy"]["value"] == pytest.approx(np.mean(shares)) and found["accuracy"]["n"] == 3
    write_rows(folder / "shown.jsonl", [{"prompt": "What?", "completion": "It is calm."}])
    done = prefopt(*words(reward_model, "shown.jsonl"))
    assert done.code == 0 and done.out == ""
    assert json.loads(prefopt(*words(reward_model, "shown.jsonl", "--json")).out) == {"rows": 1, "refused": 0, "accuracy": None}


def test_rows_that_cannot_be_scored_are_counted(folder: Path, reward_model: Path) -> None:
    rows = [
        *preference_rows(3),
        {"prompt": "What?", "chosen": "a", "rejected": "a"},
        {**preference_rows(1)[0], "chosen": "qz" * 99},
    ]
    write_rows(folder / "rows.jsonl", rows)
    found = json.loads(prefopt(*words(reward_model, "rows.jsonl", "--json")).out)
    assert (found["rows"], found["refused"]) == (3, 2)
    assert "1 row longer than the model's context of 128 tokens" in prefopt(*words(reward_model, "rows.jsonl")).err


def test_a_policy_and_a_reward_model_exclude_each_other(folder: Path, reward_model: Path) -> None:
    before = files_below(folder)
    assert_refused(prefopt(*words(reward_model, "run", "rows.jsonl")), USAGE, "both a policy", "--reward-model")
    assert_refused(prefopt("score", "rows.jsonl", "-o", "out.jsonl"), USAGE, "neither a policy nor --reward-model")
    assert_refused(prefopt(*words(reward_model)), USAGE, "no rows to score")
    for option in (("--beta", "0.2"), ("--reference", "other"), ("--tokens",)):
        assert_refused(prefopt(*words(reward_model, "rows.jsonl", *option)), USAGE, option[0], "implicit reward")
    assert files_below(folder) == before


def test_the_wrong_kind_of_model_is_refused_in_both_places(folder: Path, reward_model: Path) -> None:
    language_model = write_model(folder / "model")
    assert_refused(prefopt(*words(language_model, "rows.jsonl")), MODEL, "is a language model, not a reward model")
    done = prefopt("score", reward_model, "rows.jsonl", "--reference", language_model, "-o", "out.jsonl")
    assert_refused(done, MODEL, "is a reward model", "--reward-model")
    assert not (folder / "out.jsonl").exists()
