"""The measures below `prefopt evaluate`: the default is what it was, results are kept side by side, nothing starts with bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import prefopt
from train.tiny_runs import preference_rows, tiny_config, write_model, write_rows

pytestmark = pytest.mark.slow

MEASURES = ("win-rate", "agreement", "accuracy", "calibration", "temperatures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with held-out rows."""
    from prefopt.pipeline import train_run

    folder = tmp_path_factory.mktemp("measures")
    held = write_rows(folder / "held.jsonl", preference_rows(60)[40:])
    train_run(tiny_config(folder, data={"eval": str(held)}, train={"max_steps": 2}))
    return folder / "run"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts.jsonl and pairs.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    rows = [row | {"kind": "even" if at % 2 == 0 else "odd"} for at, row in enumerate(preference_rows(24))]
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:12]])
    return tmp_path


def shown(*words: object) -> Any:
    done = prefopt(*words, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    return json.loads(done.out)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_help_shows_the_default_and_every_measure() -> None:
    whole = prefopt("evaluate", "-h").out
    assert "--samples-per-prompt" in whole or "-n" in whole
    assert "--pairs" in whole and "Measure a policy against its reference" in whole
    for name in MEASURES:
        assert name in whole
        assert "--json" in prefopt("evaluate", name, "-h").out
    assert "Measure a policy" in prefopt("--help").out


def test_words_that_name_no_measure_are_those_of_the_default(folder: Path) -> None:
    assert prefopt("evaluate").code == prefopt("evaluate", "--nope").code == 2
    done = prefopt("evaluate", "no-such-run")
    assert done.code == 2 and '"no-such-run" is not a run folder' in done.err
    wrong = prefopt("evaluate", "winrate", "run", "--reward", "length")
    assert wrong.code == 2 and "win-rate" in wrong.err and "is no measure" in " ".join(wrong.err.split())


def test_win_rate_against_the_reference(folder: Path, run: Path) -> None:
    words = ["evaluate", "win-rate", run, "--prompts", "prompts.jsonl", "--reward", "length", "--max-new-tokens", 6, "-n", 2]
    section = shown(*words, "-o", "out")
    assert (
        section == json.loads((folder / "out/evaluation.json").read_text())["win_rates"][section["opponent"]]["reward:length"]
    )
    rows = lines_of(folder / "out" / section["comparisons_file"])
    assert len(rows) == section["comparisons"] == 24
    assert sum(row["outcome"] == 1 for row in rows) == section["wins"]
    assert section["rate"]["n"] == 12
    assert section["rate"]["low"] <= section["rate"]["value"] <= section["rate"]["high"]
    assert all(row["judge"] == "reward:length" for row in rows)
    assert section["position"] is None


def test_a_model_against_itself_is_half(folder: Path, run: Path) -> None:
    base = run.parent / "model"
    words = ["evaluate", "win-rate", base, "--against", base, "--prompts", "prompts.jsonl", "--reward", "length"]
    rate = shown(*words, "-n", 4, "--max-new-tokens", 6)["rate"]
    assert rate["low"] <= 0.5 <= rate["high"]
    greedy = shown(*words, "--temperature", 0, "--max-new-tokens", 6)
    assert (greedy["ties"], greedy["rate"]["value"]) == (12, 0.5)
    assert not (folder / "evaluation.json").exists(), "a model that is no run has no folder for results"


def test_stored_responses_and_those_of_the_dataset_need_no_model(folder: Path) -> None:
    pairs = lines_of(folder / "pairs.jsonl")
    write_rows(folder / "mine.jsonl", [{"prompt": row["prompt"], "response": row["chosen"] + " indeed"} for row in pairs])
    words = ["evaluate", "win-rate", "mine.jsonl", "--against", "pairs.jsonl", "--reward", "length"]
    section = shown(*words, "-o", "out")
    assert (section["wins"], section["comparisons"]) == (24, 24)
    assert shown(*words, "--max-prompts", 5)["comparisons"] == 5
    assert "24 won, 0 tied, 0 lost" in prefopt(*words).out
    write_rows(folder / "short.jsonl", [{"prompt": row["prompt"], "response": "no"} for row in pairs[:3]])
    done = prefopt("evaluate", "win-rate", "mine.jsonl", "--against", "short.jsonl", "--reward", "length")
    assert done.code == 3 and "no response to 21 of 24 prompts" in done.err


def test_results_stand_side_by_side_and_outlive_a_new_evaluation(folder: Path, run: Path) -> None:
    for reward in ("length", "min_words:2"):
        shown("evaluate", "win-rate", run, "--prompts", "prompts.jsonl", "-r", reward, "--max-new-tokens", 4, "-o", "out")
    shown("evaluate", "calibration", run, "--bins", 4, "-o", "out")
    before = json.loads((folder / "out/evaluation.json").read_text())
    shown("evaluate", run, "-o", "out")
    after = json.loads((folder / "out/evaluation.json").read_text())
    assert set(before) == {"win_rates", "calibrations"}
    assert {name: after[name] for name in before} == before
    assert list(next(iter(after["win_rates"].values()))) == ["reward:length", "reward:min_words:2"]
    assert "heldout" in after


def test_accuracy_of_a_reward_by_category(folder: Path) -> None:
    section = shown("evaluate", "accuracy", "pairs.jsonl", "--reward", "length", "--by", "kind", "-o", "out")
    pairs = lines_of(folder / "pairs.jsonl")
    scores = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in pairs]
    wins = sum((score > 0) + (score == 0) / 2 for score in scores)
    assert section["accuracy"]["value"] == wins / 24
    assert set(section["categories"]) == {"even", "odd"}
    assert len(section["ties"]) == sum(score == 0 for score in scores)
    assert json.loads((folder / "out/evaluation.json").read_text())["accuracies"]["pairs.jsonl"]["length"] == section


def test_accuracy_of_an_implicit_reward_is_that_of_evaluate(folder: Path, run: Path) -> None:
    section = shown("evaluate", "accuracy", "pairs.jsonl", "--policy", run, "-o", "out")
    whole = shown("evaluate", run, "--pairs", "pairs.jsonl", "-o", "out")
    assert section["accuracy"] == whole["heldout"]["accuracy"]


def test_calibration_of_a_run_on_its_held_out_rows(folder: Path, run: Path) -> None:
    section = shown("evaluate", "calibration", run, "--bins", 5, "-o", "out")
    whole = shown("evaluate", run, "-o", "out")
    assert section["pairs"] == whole["heldout"]["pairs"] == 20
    assert section["beta"] == whole["settings"]["beta"] == 0.1
    too_many = prefopt("evaluate", "calibration", run, "--bins", 11, "-o", "out")
    assert too_many.code == 3 and "needs 22 finite margins, found 20" in too_many.err


def test_agreement_with_people(folder: Path) -> None:
    rows = [
        {"prompt": f"p{at}", "response1": "one two", "response2": "one", "annotator1": 1, "annotator2": at % 3, "annotator3": 1}
        for at in range(12)
    ]
    write_rows(folder / "people.jsonl", rows)
    section = shown("evaluate", "agreement", "people.jsonl", "--reward", "length", "-o", "out")
    assert section["judge"]["annotator1"]["accuracy"]["value"] == section["judge"]["majority"]["accuracy"]["value"] == 1
    assert section["judge"]["annotator2"]["accuracy"]["value"] == 4 / 12
    assert json.loads((folder / "out/evaluation.json").read_text())["agreements"]["people.jsonl"]["reward:length"] == section
    assert "undefined" in prefopt("evaluate", "agreement", "people.jsonl", "--reward", "length").out


def test_temperatures_write_numbers_and_a_figure(folder: Path, run: Path) -> None:
    words = ["evaluate", "temperatures", run, "--prompts", "prompts.jsonl", "-r", "length", "--max-new-tokens", 5, "-o", "out"]
    section = shown(*words, "--temperatures", "0,0.5,...,1")
    assert [point["temperature"] for point in section["policies"][str(run)]] == [0, 0.5, 1]
    assert (folder / "out/temperatures.svg").read_text().startswith("<?xml")
    stored = json.loads((folder / "out/evaluation.json").read_text())["temperatures"]
    assert stored[section["opponent"]]["length"] == section


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["win-rate", "RUN", "--prompts", "prompts.jsonl"], 2, "there is no judge"),
        (["win-rate", "RUN", "--reward", "lenth", "--prompts", "prompts.jsonl"], 2, 'did you mean "length"'),
        (["win-rate", "RUN", "--judge", "oracle:x", "--prompts", "prompts.jsonl"], 2, "is of no known kind"),
        (["win-rate", "RUN", "--reward", "length"], 2, "no prompts to compare on"),
        (["win-rate", "RUN", "--reward", "length", "--against", "x.jsonl", "--reference", "y"], 2, "both name the opponent"),
        (["win-rate", "RUN", "--reward", "length", "--against", "missing.jsonl"], 3, "missing.jsonl"),
        (["win-rate", "RUN", "--reward", "length", "--prompts", "prompts.jsonl", "-n", "0"], 2, "at least 1"),
        (["win-rate", "mine.jsonl", "--reward", "length"], 2, "its reference is not known"),
        (["accuracy", "pairs.jsonl"], 2, "found neither"),
        (["accuracy", "pairs.jsonl", "--reward", "length", "--by", "topic"], 3, 'no row has a column "topic"'),
        (["agreement", "pairs.jsonl", "--reward", "length"], 3, "no column of labels"),
        (["temperatures", "RUN", "-r", "length", "--temperatures", "0,x"], 2, "no list of temperatures"),
        (["temperatures", "RUN", "-r", "length", "--prompts", "prompts.jsonl", "--figure", "f.gif"], 2, "no name for a figure"),
    ],
)  # fmt: skip
def test_bad_input_is_said_before_anything_is_computed(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    for module in ("model.load", "evaluate.responses", "evaluate.pair_scores"):
        monkeypatch.setattr(f"prefopt.{module}.load_model", loaded)
    before = sorted(folder.rglob("*"))
    done = prefopt("evaluate", *(str(run) if word == "RUN" else word for word in words))
    assert (done.code, said in " ".join(done.err.split())) == (code, True), done.err
    assert sorted(folder.rglob("*")) == before


def test_results_that_cannot_be_read_are_said_before_anything_is_computed_and_kept(folder: Path, run: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/evaluation.json").write_text("{broken")
    for words in (["win-rate", run, "--prompts", "prompts.jsonl", "-r", "length"], ["calibration", run], [run]):
        done = prefopt("evaluate", *words, "-o", "out")
        assert done.code == 6 and "evaluation.json: is not JSON" in done.err
    assert (folder / "out/evaluation.json").read_text() == "{broken"


def test_a_folder_named_like_a_measure_is_reached_by_its_path(folder: Path) -> None:
    write_model(folder / "accuracy")
    done = prefopt("evaluate", "./accuracy")
    assert done.code == 2 and '"./accuracy" is not a run folder' in done.err
