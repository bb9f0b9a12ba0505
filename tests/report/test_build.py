"""The page is self-contained and escaped, says the state of any run, and carries the numbers of the JSON and Markdown."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.run_folder import RunFolder
from prefopt.report.build import build_report, report_data, report_markdown
from prefopt.report.history import History, num
from prefopt.report.listing import run_rows
from report.synthetic_run import STARTED, synthetic_config, synthetic_events, write_run

pytestmark = pytest.mark.slow

MakeRun = Callable[[list[dict[str, Any]]], RunFolder]
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}


class Page(HTMLParser):
    """Tags with their attributes, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.balanced = True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.balanced &= bool(self.open) and self.open.pop() == tag


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The whole run with its page written, for tests that only read them."""
    run = write_run(tmp_path_factory.mktemp("kept") / "helpful")
    build_report(run)
    return run


def kept(run: RunFolder) -> str:
    return run.report_path.read_text(encoding="utf-8")


def page(run: RunFolder) -> str:
    return build_report(run).read_text(encoding="utf-8")


def shown(text: str) -> str:
    """What a reader sees: no style, no tags, entities decoded, white space collapsed."""
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_page_loads_nothing(kept_run: RunFolder) -> None:
    text = kept(kept_run)
    found = Page(text)
    assert found.balanced
    assert not found.open
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for _, attributes in found.tags:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert len(text.encode()) < 3_000_000


def test_ids_in_the_page_are_unique_and_references_resolve(kept_run: RunFolder) -> None:
    text = kept(kept_run)
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {one or two for one, two in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert targets
    assert targets <= set(ids)


def test_text_of_samples_is_shown_not_run(kept_run: RunFolder) -> None:
    text = kept(kept_run)
    assert "<script" not in text
    assert "What does <script>alert('hello')</script> do in a web page?" in shown(text)


def test_no_text_of_the_run_becomes_markup(full_run: RunFolder) -> None:
    def evil(place: str) -> str:
        return f"</p><img src=x onerror=alert('{place}')>"

    evaluation, audit = full_run.read("evaluation.json"), full_run.read("audit.json")
    assert evaluation is not None
    assert audit is not None
    evaluation["reward"]["name"], evaluation["checkpoint"] = evil("reward"), evil("checkpoint")
    audit["refused"] = {evil("reason"): {"count": 1, "examples": [evil("example")]}}
    audit["data"] = evil("data")
    full_run.write("evaluation.json", evaluation)
    full_run.write("audit.json", audit)
    full_run.write("config.json", {**synthetic_config(), "model": {"name": evil("config")}})
    full_run.write("env.json", {"device": evil("device")})
    full_run.log().write("warning", step=3, message=evil("warning"))
    full_run.log().write("error", step=400, message=evil("error"))
    text = page(full_run)
    assert "<img" not in text
    for place in ("reward", "checkpoint", "example", "data", "config", "device", "warning", "error"):
        assert evil(place) in html.unescape(text)


def test_a_token_budget_is_a_whole_number(full_run: RunFolder) -> None:
    audit = full_run.read("audit.json")
    assert audit is not None
    audit["truncation"] |= {"max_prompt_tokens": None, "max_response_tokens": 96}
    full_run.write("audit.json", audit)
    assert "prompt –, response 96 tokens; over it: 4 prompts, 22 responses, 25 groups (drop)" in shown(page(full_run))


def test_markdown_and_json_carry_the_numbers_of_the_page(kept_run: RunFolder) -> None:
    data, seen, markdown = report_data(kept_run), shown(kept(kept_run)), report_markdown(kept_run)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    facts = [data["verdict"], *data["verdict_more"], data["state"]["text"], *data["repeat"]]
    facts += [finding[key] for finding in data["findings"] for key in ("text", "evidence")]
    facts += [card[key] for card in data["cards"] for key in ("label", "value", "detail")]
    facts += [row["key"] for row in data["config"] if row["changed"]]
    facts += [sample["prompt"] for sample in data["samples"]] + [row["message"] for row in data["warnings"]]
    flat = " ".join(markdown.split())
    for fact in facts:
        expected = " ".join(fact.split())
        assert expected in seen
        assert expected in flat


def test_the_verdict_is_what_was_measured(kept_run: RunFolder) -> None:
    verdict = report_data(kept_run)["verdict"]
    assert verdict == "Training raised helpfulness by 0.411 (0.317 to 0.505), at a KL of 6.82 nats a response (6.02 to 7.62)."


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.5, -0.1, "Training lowered helpfulness by 0.300 (0.100 to 0.500)"),
        (-0.5, 0.1, "Training did not measurably change helpfulness: −0.300 (−0.500 to +0.100)"),
    ],
)
def test_the_verdict_is_honest_about_losses(full_run: RunFolder, low: float, high: float, said: str) -> None:
    reward = {"name": "helpfulness", "difference": {"value": -0.3, "low": low, "high": high, "n": 50}}
    full_run.write("evaluation.json", {"reward": reward})
    assert report_data(full_run)["verdict"] == f"{said}."


def test_without_an_evaluation_the_verdict_says_so(events_run: MakeRun) -> None:
    run = events_run(synthetic_events())
    data = report_data(run)
    assert data["verdict"] == f"Not evaluated yet: run `prefopt evaluate {run.path}`."
    assert "In training it ranked" in data["verdict_more"][0]
    assert "prefopt check" in shown(page(run))


LAST_WORDS: list[tuple[str, list[dict[str, Any]], str, str]] = [
    ("finished", [{"kind": "end", "seconds": 9.0}], "finished", "Finished after 120 steps."),
    ("stopped", [{"kind": "stop", "reason": "Ctrl-C"}], "interrupted", "Interrupted at step 120 of 400: Ctrl-C."),
    ("stopped, then end", [{"kind": "stop"}, {"kind": "end"}], "interrupted", "Interrupted at step 120 of 400."),
    ("failed", [{"kind": "error", "message": "loss is not finite"}], "failed", "Failed at step 120 of 400: loss is not finite"),
    ("running", [], "running", "Still running: step 120 of 400."),
    ("resumed", [{"kind": "stop"}, {"kind": "resume"}], "running", "Still running: step 120 of 400."),
    (
        "resumed after failure",
        [{"kind": "error", "message": "x"}, {"kind": "resume"}],
        "running",
        "Still running: step 120 of 400.",
    ),
]


@pytest.mark.parametrize(("words", "name", "text"), [case[1:] for case in LAST_WORDS], ids=[case[0] for case in LAST_WORDS])
def test_the_state_is_the_last_word_of_the_events(words: list[dict[str, Any]], name: str, text: str) -> None:
    now = STARTED + 400
    events = [{"kind": "start", "step": 0, "total_steps": 400, "time": STARTED}]
    events += [{"kind": "step", "step": step, "time": STARTED + step} for step in range(1, 121)]
    state = History(events + [{"step": 120, "time": now, **word} for word in words]).state(now=now)
    assert (state.name, state.text, state.step) == (name, text, 120)


@pytest.mark.parametrize("word", [{"kind": "stop", "reason": "Ctrl-C"}, {"kind": "error", "message": "out of memory"}])
def test_every_report_says_the_state(events_run: MakeRun, word: dict[str, Any]) -> None:
    run = events_run([*synthetic_events(30), {"step": 30, "time": STARTED, **word}])
    said = report_data(run)["state"]["text"]
    assert "step 30 of 400" in said
    assert (word.get("reason") or word.get("message")) in said
    assert said in shown(page(run))
    assert said in report_markdown(run)


def test_a_run_that_fell_silent_is_not_simply_running(events_run: MakeRun) -> None:
    run = events_run(synthetic_events(120))
    state = History(run.events()).state(now=STARTED + 7200)
    assert state.name == "running"
    assert "it was killed" in state.text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_of_hardly_any_steps_claims_nothing(events_run: MakeRun, steps: int) -> None:
    run = events_run(synthetic_events(steps))
    data = report_data(run)
    assert page(run).count('<figure id="loss"') == 1  # the held-out loss of step 0 is there before any step
    assert data["findings"] == []
    assert (data["verdict"].startswith("Not evaluated yet"), data["verdict_more"]) == (True, [])


def test_a_run_without_events_has_a_page(events_run: MakeRun) -> None:
    text = shown(page(events_run([])))
    assert "No step was finished yet." in text
    assert "Nothing stands out." in text


def test_missing_metrics_remove_their_figures_only(events_run: MakeRun) -> None:
    fewer = [
        {key: value for key, value in event.items() if not key.startswith(("drift/", "lengths/"))}
        for event in synthetic_events()
    ]
    text = page(events_run([{**event, "lr": None} if event["kind"] == "step" else event for event in fewer]))
    assert 'figure id="logps"' in text
    assert not re.search(r'figure id="(drift|lengths|lr)"', text)


def test_changed_options_are_those_that_differ_from_the_defaults(kept_run: RunFolder) -> None:
    changed = {row["key"] for row in report_data(kept_run)["config"] if row["changed"]}
    assert changed == {"data.train", "data.eval", "data.max_prompt_tokens", "data.max_response_tokens"} | {
        f"train.{key}" for key in ("output_dir", "lr", "eval_every_steps")
    }


def test_long_samples_are_cut_and_say_so(full_run: RunFolder) -> None:
    full_run.write_samples(
        {"prompt": f"p{number}", "policy": "x" * 104_000, "reference": None, "policy_reward": None} for number in range(20)
    )
    data = report_data(full_run)
    assert len(data["samples"]) == 12
    assert data["samples"][0]["policy"].endswith("(100,000 more characters)")
    assert len(page(full_run)) < 3_000_000


def test_a_long_run_stays_small(events_run: MakeRun) -> None:
    steps = [event for event in synthetic_events() if event["kind"] == "step"]
    run = events_run([{**event, "step": event["step"] + 400 * lap} for lap in range(20) for event in steps])
    assert len(page(run).encode()) < 1_000_000


def test_the_same_run_gives_the_same_page(full_run: RunFolder) -> None:
    assert page(full_run) == page(full_run)


def test_runs_are_listed_with_the_numbers_of_their_reports(tmp_path: Path, events_run: MakeRun) -> None:
    write_run(tmp_path / "a" / "helpful")
    events_run([{**event, "time": event["time"] + 1e6} for event in synthetic_events(120)])
    newer, older = run_rows(tmp_path)
    assert (newer["state"], newer["step"], newer["reward_difference"], newer["kl"]) == ("running", 120, None, None)
    assert older["path"].endswith("helpful")
    assert {key: older[key] for key in ("state", "loss", "step", "reward_difference", "kl", "heldout_accuracy")} == {
        "state": "finished",
        "loss": "dpo",
        "step": 400,
        "reward_difference": 0.411,
        "kl": 6.82,
        "heldout_accuracy": 0.746,
    }
    assert older["when"] == "2026-01-01T00:19:20+00:00"


def test_a_broken_file_does_not_hide_the_other_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad").path / "evaluation.json").write_text("{", encoding="utf-8")
    assert {row["path"].rsplit("/", 1)[-1]: row["state"] for row in run_rows(tmp_path)} == {
        "good": "finished",
        "bad": "unreadable",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.411, "0.411"),
        (-6.82, "−6.82"),
        (1234567.0, "1,234,567"),
        (99.96, "100"),
        (5e-7, "5.00e-07"),
        (156.2, "156"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert num(value) == text


def test_reports_import_no_torch() -> None:
    code = "import sys, prefopt.report.build, prefopt.report.listing; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_each_prompt_is_shown_once_with_its_first_sample(full_run: RunFolder) -> None:
    full_run.write_samples({"prompt": f"p{number // 2}", "policy": f"answer {number}"} for number in range(6))
    data = report_data(full_run)
    assert [(row["prompt"], row["policy"]) for row in data["samples"]] == [
        ("p0", "answer 0"),
        ("p1", "answer 2"),
        ("p2", "answer 4"),
    ]
    assert data["samples_total"] == 3
