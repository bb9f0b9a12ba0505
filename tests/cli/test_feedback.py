"""`prefopt label --judge` and `prefopt revise`, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import prefopt
from cli.refusals import DATA, MODEL, USAGE, assert_refused
from prefopt.data.load import load_groups
from rollout.fake_endpoint import FakeEndpoint, longer_wins
from train.tiny_runs import write_model

CONSTITUTION = """
- {name: long, critique: "What is too short?", revision: Make it longer., compare: "Which is longer?"}
- {name: kind, critique: "What is unkind?", revision: Make it kind., compare: "Which is kinder?"}
"""
FAST = ("--set", "first_wait_seconds=0.001", "--set", "longest_wait_seconds=0.01")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with samples, prompts, a constitution, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [{"prompt": f"p{number}", "responses": ["a", "bb", "cc"]} for number in range(4)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("What?\nWhy?\n", encoding="utf-8")
    (tmp_path / "constitution.yaml").write_text(CONSTITUTION, encoding="utf-8")
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_label_by_an_endpoint_goes_on_where_it_stopped(folder: Path) -> None:
    words = ["label", "samples.jsonl", "-o", "pairs.jsonl", *FAST, "--set", "retries=1"]
    fake = FakeEndpoint(dies_after=9)
    with fake:
        judge = f"endpoint:judge@{fake.url}"
        done = prefopt(*words, "--judge", judge)
        assert_refused(done, MODEL, "of 24 comparisons are done", "the same command goes on")
        assert not (folder / "pairs.jsonl").exists()
    fake.dies_after = None
    with fake:
        done = prefopt("--quiet", *words, "--judge", judge, "--json")
    assert done.code == 0, done.err
    assert set(fake.delivered.values()) == {1}
    summary = json.loads(done.out)
    assert (summary["rows"], summary["skipped"], summary["pairs"]) == (8, {"tie": 4}, 12)
    assert summary["usage"]["cached"] >= 9
    assert summary["usage"]["cached"] + summary["usage"]["requests"] == 24
    rows = lines(folder / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("bb", "a"), ("cc", "a")] * 4
    assert {row["judge"] for row in rows} == {judge}


def test_label_by_principles_says_which(folder: Path) -> None:
    with FakeEndpoint(longer_wins) as fake:
        judge = f"endpoint:judge@{fake.url}"
        done = prefopt(
            "label", "samples.jsonl", "-o", "pairs.jsonl", "--judge", judge, "--constitution", "constitution.yaml", "--json"
        )
    assert done.code == 0, done.err
    rows = lines(folder / "pairs.jsonl")
    assert {row["principle"] for row in rows} == {"long", "kind"}
    assert sum(json.loads(done.out)["by_principle"].values()) == len(rows) == 8
    asked = [body["messages"][0]["content"] for body in fake.requests]
    assert all(("Which is longer?" in text) != ("Which is kinder?" in text) for text in asked)


def test_label_by_a_reward_as_a_judge_and_by_a_local_model(folder: Path) -> None:
    (folder / "samples.jsonl").write_text('{"prompt": "p", "responses": ["a b", "a"]}\n', encoding="utf-8")
    assert prefopt("label", "samples.jsonl", "-o", "pairs.jsonl", "--judge", "reward:length").code == 0
    assert lines(folder / "pairs.jsonl") == [
        {"prompt": "p", "chosen": "a b", "rejected": "a", "judge": "reward:length", "margin": 1.0}
    ]
    template = folder / "short.jinja"
    template.write_text("{{ prompt }} {{ first }} {{ second }} Verdict: A?", encoding="utf-8")
    write_model(folder / "model")
    words = ["label", "samples.jsonl", "-o", "local.jsonl", "--judge", "local:model", "--judge-template", template]
    done = prefopt(*words, "--set", "verdict_by=text", "--set", "max_answer_tokens=4")
    assert_refused(done, DATA, "no pair could be made", "'unreadable answer': 1")


def test_revise_writes_demonstrations_and_asks_for_nothing_twice(folder: Path) -> None:
    words = ["revise", "prompts.txt", "--constitution", "constitution.yaml", "-o", "rows.jsonl", "--rounds", 2]
    with FakeEndpoint(lambda question: f"answer to {question.splitlines()[0]}") as fake:
        model = f"endpoint:writer@{fake.url}"
        done = prefopt(*words, "--model", model, "--json")
        assert done.code == 0, done.err
        first = (folder / "rows.jsonl").read_text(encoding="utf-8")
        asked = len(fake.requests)
        assert prefopt(*words, "--model", model).code == 0
        assert len(fake.requests) == asked == 2 * 5
    assert (folder / "rows.jsonl").read_text(encoding="utf-8") == first
    rows = lines(folder / "rows.jsonl")
    assert [row["prompt"] for row in rows] == ["What?", "Why?"]
    assert all(sorted(row["principles"]) == ["kind", "long"] and row["judge"] == model for row in rows)
    assert load_groups(rows).shape == "demonstration"


def test_revise_with_a_local_model(folder: Path) -> None:
    write_model(folder / "model")
    (folder / "short.yaml").write_text("- {name: short, critique: c, revision: r}\n", encoding="utf-8")
    words = ["revise", "prompts.txt", "--constitution", "short.yaml", "-m", "model", "-o", "rows.jsonl"]
    done = prefopt(*words, "--set", "max_answer_tokens=2")
    assert_refused(done, DATA, "no response could be revised", "cut at the limit")  # random weights do not end so soon


def test_revise_what_was_sampled(folder: Path) -> None:
    with FakeEndpoint(lambda question: "new") as fake:
        words = ["revise", "samples.jsonl", "--samples", "--constitution", "constitution.yaml", "-o", "rows.jsonl"]
        assert prefopt(*words, "-m", f"endpoint:writer@{fake.url}").code == 0
    assert [row["first_response"] for row in lines(folder / "rows.jsonl")] == ["a", "bb", "cc"] * 4


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["neither of --reward and --judge"]),
        (["--judge", "reward:length", "--reward", "length"], ["both of --reward and --judge"]),
        (["--judge", "reward:length", "--how", "all-pairs"], ["--how applies with --reward only"]),
        (["--reward", "length", "--constitution", "constitution.yaml"], ["--constitution applies with --judge only"]),
        (["--reward", "length", "--set", "seed=1"], ["--set applies with --judge only"]),
        (["--judge", "rewards:length"], ["of no known kind", "implicit:RUN", "endpoint:MODEL@URL"]),
        (["--judge", "reward:length", "--constitution", "constitution.yaml"], ["cannot go by a principle"]),
        (["--judge", "reward:length", "--orders", "mean"], ["does not go with the judge", "verdict_by=letters"]),
        (["--reward", "length", "--orders", "mean"], ["--orders applies with --judge only"]),
        (["--judge", "reward:length", "--constitution", "none.yaml"], ["none.yaml: cannot be read"]),
        (["--judge", "local:m", "--set", "colour=red"], ['there is no "colour"']),
    ],
)
def test_unusable_options_are_refused(folder: Path, words: list[str], parts: list[str]) -> None:
    assert_refused(prefopt("label", "samples.jsonl", "-o", "pairs.jsonl", *words), USAGE, *parts)
