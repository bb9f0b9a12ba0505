"""What the verbs print and write: results on standard output, everything else on standard error, JSON alone with --json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import Done, prefopt
from prefopt.core.losses.table import LOSSES
from prefopt.core.run_folder import open_run
from prefopt.model import selfcheck as proofs
from train.tiny_runs import preference_rows, write_model, write_rows

pytestmark = pytest.mark.slow

VERBS = (
    "check",
    "train",
    "sample",
    "label",
    "revise",
    "evaluate",
    "score",
    "report",
    "selfcheck",
    "losses",
    "runs",
    "plan",
    "frontier",
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("verbs") / "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def small(model: Path, *words: object) -> list[object]:
    given = [
        f"model.name={model}",
        "data.train=rows.jsonl",
        "train.output_dir=run",
        "train.max_steps=2",
        "train.groups_per_step=4",
    ]
    return ["train", *given, "train.precision=fp32", *words]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def json_of(done: Done) -> Any:
    """The JSON that a command printed: nothing else may be on standard output, and no progress on standard error."""
    assert done.code == 0, done.err
    assert done.err == ""
    return json.loads(done.out)


def test_every_verb_has_help_with_an_example_of_each_option() -> None:
    top = prefopt("--help")
    assert top.code == 0
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", top.out), verb
        shown = prefopt(verb, "--help")
        assert shown.code == 0 and "--json" in shown.out


def test_a_wrong_verb_or_option_is_usage() -> None:
    assert prefopt("trian").code == prefopt("losses", "--jsn").code == prefopt("check").code == 2


def test_check_reports_the_audit_in_words_and_as_json(folder: Path, model: Path) -> None:
    rows = [*preference_rows(), {"prompt": "What?", "chosen": "a", "rejected": "a"}, preference_rows()[5]]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "held.jsonl", preference_rows()[:3])
    before = files_below(folder)
    words = ["check", "rows.jsonl", "--model", model, "--against", "held.jsonl"]
    found = json_of(prefopt(*words, "--json"))
    assert (found["rows"], found["groups"], found["shape"]) == (42, 41, "pair")
    assert found["refused"] == {
        "identical responses": {"count": 1, "examples": found["refused"]["identical responses"]["examples"]}
    }
    assert found["duplicates"]["count"] == 1
    assert found["leakage"]["prompts"] == 3
    text = prefopt(*words)
    assert text.code == 0
    assert "rows.jsonl:41" in text.out and "identical responses" in text.out
    assert files_below(folder) == before


def test_check_reads_real_rows(folder: Path, model: Path, shared: Path) -> None:
    source = shared / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz"
    if not source.exists():
        pytest.skip(f"no {source.name}")
    import gzip
    import itertools

    with gzip.open(source, "rt", encoding="utf-8") as file:
        (folder / "hh.jsonl").write_text("".join(itertools.islice(file, 20)), encoding="utf-8")
    found = json_of(prefopt("check", "hh.jsonl", "--model", model, "--json"))
    assert found["shape"] == "transcripts" and found["rows"] == 20
    assert found["groups"] + sum(entry["count"] for entry in found["refused"].values()) == 20
    assert found["truncation"]["max_prompt_tokens"] + found["truncation"]["max_response_tokens"] == 128


def test_a_dry_run_shows_everything_and_writes_nothing(folder: Path, model: Path) -> None:
    done = prefopt(*small(model, "data.eval_rows=8", "--dry-run"))
    assert done.code == 0, done.err
    for part in (
        "beta: 0.1",
        "groups_per_step: 4",
        "32 groups to train on, 8 held out",
        "2 steps",
        "that this program may hold: fits",
        "GiB",
    ):
        assert part in done.out
    found = json_of(prefopt(*small(model, "data.eval_rows=8", "--dry-run", "--json")))
    assert (found["train_groups"], found["held_out_groups"], found["steps"]) == (32, 8, 2)
    loss = found["config"]["loss"]
    assert (loss["name"], loss["beta"], loss["label_smoothing"]) == ("dpo", 0.1, 0.0)
    assert found["audit"]["groups"] == 32 and found["parameters"] > 0
    assert min(found["memory_bytes"].values()) >= 0
    assert found["memory_bytes"]["AdamW moments"] == 8 * found["parameters"]
    assert files_below(folder) == {"rows.jsonl"}
    assert not (folder / "run").exists()


def test_a_plan_says_whether_it_fits_and_what_would(folder: Path, model: Path) -> None:
    words = ["plan", *small(model, "data.eval_rows=8")[1:]]
    fits = prefopt(*words)
    assert fits.code == 0, fits.err
    for part in ("GiB  AdamW moments", "GiB  passes over the largest micro-batch", "hold: fits", "TFLOP at 60% of"):
        assert part in fits.out
    tight = prefopt(*words, "--memory", 0.001, "--json")
    assert tight.code == 1
    found = json_of(Done(0, tight.out, tight.err))
    assert not found["fits"] and found["changes_that_fit"] == []
    assert found["peak_bytes"] == sum(found["memory_bytes"].values()) > found["total_bytes"]
    assert 0 < found["seconds"] < 60
    spoken = prefopt(*words, "--memory", 0.001)
    assert "does not fit" in spoken.out and "a smaller model or shorter rows" in spoken.out
    assert files_below(folder) == {"rows.jsonl"}


def test_train_says_what_is_next_and_prints_its_result_as_json(folder: Path, model: Path) -> None:
    said = prefopt(*small(model))
    assert said.code == 0 and said.out == ""
    assert "run: 2 steps, last loss 0." in said.err and "Next: prefopt evaluate run and prefopt report run" in said.err
    result = json_of(prefopt(*small(model, "train.output_dir=again", "--json")))
    last = open_run(folder / "again").events()
    assert result["run"] == "again" and result["steps"] == 2
    assert result["loss"] == [event["loss"] for event in last if event["kind"] == "step"][-1]
    assert Path(result["checkpoint"]) == Path("again/checkpoints/step-000002")
    assert {"config.json", "env.json", "audit.json", "events.jsonl"} <= {path.name for path in (folder / "again").iterdir()}


def test_quiet_says_nothing_and_errors_are_still_said(folder: Path, model: Path) -> None:
    assert prefopt("-q", *small(model)) == Done(0, "", "")
    again = prefopt("-q", *small(model))
    assert again.code == 6 and again.err.startswith("error: run: already holds a run")


def test_a_recipe_file_and_words_over_it_are_resolved(folder: Path, model: Path) -> None:
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {model}}}\ndata: {{train: rows.jsonl}}\nloss: {{beta: 0.4}}\ntrain: {{lr: 1e-5}}\n"
    )
    found = json_of(prefopt("train", "recipe.yaml", "loss.beta=0.2", "--dry-run", "--json"))
    assert found["config"]["loss"]["beta"] == 0.2
    assert found["config"]["train"]["lr"] == 1e-5


def test_the_config_of_a_run_is_a_recipe_that_repeats_it(folder: Path, model: Path) -> None:
    assert prefopt(*small(model)).code == 0
    assert prefopt("train", "run/config.json", "train.output_dir=again").code == 0
    histories = [
        [event["loss"] for event in open_run(folder / name).events() if event["kind"] == "step"] for name in ("run", "again")
    ]
    assert histories[0] == histories[1]


def test_options_lists_every_option_with_its_default() -> None:
    table = {key: default for key, default, _ in json_of(prefopt("train", "--options", "--json"))}
    assert table["train.groups_per_step"] == "16" and "loss.label_smoothing" in table
    text = prefopt("train", "--options").out
    assert all(f"{key} = " in text for key in table)


def test_losses_are_those_of_the_table(folder: Path) -> None:
    assert {line.split()[0] for line in prefopt("losses").out.splitlines() if line.strip()} >= set(LOSSES)
    listed = json_of(prefopt("losses", "--json"))
    assert [entry["name"] for entry in listed] == list(LOSSES)
    one = prefopt("losses", "ipo").out
    assert LOSSES["ipo"].formula in one and "loss.reduce = mean" in one
    assert json_of(prefopt("losses", "dpo", "--json"))[0]["knobs"]["beta"]["default"] == 0.1
    assert prefopt("losses", "ipoo").code == 2


def test_selfcheck_passes_on_a_sound_model(folder: Path, model: Path) -> None:
    checks = json_of(prefopt("selfcheck", "rows.jsonl", "--model", model, "--precision", "fp32", "--json"))
    assert {check["name"] for check in checks} >= {
        "chunked == dense",
        "packed == padded",
        "shared == duplicated",
        "cached == live",
    }
    assert all(check["passed"] and check["deviation"] <= check["tolerance"] for check in checks)
    built_in = prefopt("selfcheck", "--model", model, "--precision", "fp32")
    assert built_in.code == 0 and "FAIL" not in built_in.out


def test_selfcheck_fails_with_exit_code_1_where_the_fast_path_is_wrong(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = proofs.packed_batch

    def shifted(*args: Any, **options: Any) -> Any:
        from dataclasses import replace

        batch = true(*args, **options)
        return replace(batch, position_ids=batch.position_ids + 3 * (batch.position_ids > 5))

    monkeypatch.setattr(proofs, "packed_batch", shifted)
    done = prefopt("selfcheck", "rows.jsonl", "--model", model, "--precision", "fp32")
    assert done.code == 1
    assert re.search(r"^FAIL packed == padded", done.out, re.MULTILINE)
    assert re.search(r"^ok   chunked == dense", done.out, re.MULTILINE)
    assert "Traceback" not in done.err


def test_runs_of_no_folder_are_none(folder: Path) -> None:
    assert prefopt("runs").out == "no runs below runs\n"
    assert json_of(prefopt("runs", "--json")) == []


def test_sample_label_train_evaluate_score_report(folder: Path, model: Path) -> None:
    """The whole chain on a reward that a random model can follow: longer responses."""
    (folder / "prompts.txt").write_text("".join(f"What of {word}?\n" for word in ("rain", "my boat", "bread", "the night")))
    sampled = prefopt("sample", "prompts.txt", "-m", model, "-o", "samples.jsonl", "-n", 6, "--max-new-tokens", 12)
    assert sampled.code == 0, sampled.err
    assert "24 responses to 4 prompts" in sampled.err
    labelled = prefopt("label", "samples.jsonl", "-r", "length", "-o", "pairs.jsonl", "--how", "all-pairs", "--json")
    count = json_of(labelled)["rows"]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == count > 4
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)

    words = ["data.train=pairs.jsonl", "data.eval_rows=3", "train.max_steps=8", "train.lr=3e-3", "loss.beta=0.1"]
    trained = prefopt(*small(model, *words))
    assert trained.code == 0, trained.err

    evaluated = prefopt(
        "evaluate", "run", "--prompts", "prompts.txt", "-r", "length", "-n", 4, "--max-new-tokens", 12, "--json"
    )
    result = json_of(evaluated)
    assert result["heldout"]["pairs"] == 3
    assert result["reward"]["difference"]["n"] == 4
    assert result["settings"]["reference"] == str(model)
    assert json.loads((folder / "run" / "evaluation.json").read_text()) == result
    assert len(open_run(folder / "run").samples()) == 16
    spoken = prefopt("evaluate", "run", "--output", "elsewhere")
    assert spoken.code == 0 and "held-out accuracy" in spoken.out
    assert (folder / "elsewhere" / "evaluation.json").exists()

    scored = prefopt("score", "run", "pairs.jsonl", "-o", "scores.jsonl", "--tokens", "--json")
    assert json_of(scored) == {"rows": count, "refused": 0, "beta": 0.1}
    for line in (folder / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        for reward, ours, theirs, tokens in zip(
            row["rewards"], row["logps"], row["reference_logps"], row["tokens"], strict=True
        ):
            assert reward == pytest.approx(0.1 * (ours - theirs), abs=1e-5)
            assert reward == pytest.approx(sum(token["reward"] for token in tokens), abs=1e-4)

    written = prefopt("report", "run")
    assert written.code == 0 and written.out.strip() == "report: run/report.html"
    page = (folder / "run" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "http" not in re.sub(
        r"http://www\.w3\.org/\S*|https?://arxiv\S*", "", page[:2000]
    )
    assert json_of(prefopt("report", "run", "--json"))
    markdown = prefopt("report", "run", "--markdown").out
    assert markdown.startswith("# ")

    listed = json_of(prefopt("runs", ".", "--json"))
    assert [(row["path"], row["step"], row["total_steps"]) for row in listed] == [("run", 8, 8)]
    assert re.search(r"^ *run +\S+ +dpo", prefopt("runs", ".").out, re.MULTILINE)


def test_a_run_scores_rows_under_its_own_template(folder: Path, model: Path) -> None:
    assert prefopt(*small(model, "data.template=plain", "data.eval_rows=2")).code == 0

    def log_probs(*words: str) -> list[list[float]]:
        done = prefopt("score", "run", "rows.jsonl", "-o", "out.jsonl", *words)
        assert done.code == 0, done.err
        return [json.loads(line)["logps"] for line in (folder / "out.jsonl").read_text().splitlines()]

    own = log_probs()
    assert own == log_probs("--template", "plain")
    assert own != log_probs("--template", "chat")


def test_evaluate_measures_the_held_out_rows_of_training(folder: Path, model: Path) -> None:
    """Under a small prompt budget responses may fill the rest of the context, in training and in evaluation alike."""
    rows = [{**row, "rejected": row["rejected"] + " qwzx" * (number % 2) * 12} for number, row in enumerate(preference_rows())]
    write_rows(folder / "rows.jsonl", rows)
    done = prefopt(*small(model, "data.max_prompt_tokens=40", "data.eval_rows=12"))
    assert done.code == 0, done.err
    logged = [event for event in open_run(folder / "run").events() if event["kind"] == "eval"][-1]
    measured = json_of(prefopt("evaluate", "run", "--json"))["heldout"]
    assert measured["pairs"] == logged["eval/groups"] == 12
    assert measured["accuracy"]["value"] == pytest.approx(logged["eval/rewards/accuracies"])
    assert measured["loss"] == pytest.approx(logged["eval/loss"], abs=1e-4)


def test_without_a_terminal_lines_are_plain_and_json_is_alone_on_standard_output(folder: Path, model: Path) -> None:
    command = [sys.executable, "-c", "from prefopt.cli import main; main()"]
    words = [str(word) for word in small(model, "data.eval_rows=4")]
    plain = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == ""
    assert "\x1b" not in plain.stderr and "\r" not in plain.stderr
    words = [str(word) for word in small(model, "train.output_dir=again", "--json")]
    pure = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert json.loads(pure.stdout)["steps"] == 2
    assert pure.stderr == ""


def test_no_color_is_honoured_on_a_terminal(folder: Path, model: Path) -> None:
    shown = {}
    for colour in ("", "1"):
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
        environment.pop("NO_COLOR", None)
        if colour:
            environment["NO_COLOR"] = colour
        words = [str(word) for word in small(model, f"train.output_dir=run{colour}")]
        shown[colour] = on_a_terminal([sys.executable, "-c", "from prefopt.cli import main; main()", *words], environment)
        assert "training" in shown[colour]
    colours = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;5;\d+|9[0-7])[0-9;]*m")
    assert colours.search(shown[""])
    assert not colours.search(shown["1"])


def on_a_terminal(command: list[str], environment: dict[str, str]) -> str:
    """What a command writes where its outputs are a pseudo-terminal."""
    import pty

    first, second = pty.openpty()
    process = subprocess.Popen(command, stdin=second, stdout=second, stderr=second, env=environment)
    os.close(second)
    parts = []
    while True:
        try:
            part = os.read(first, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(first)
    assert process.wait(timeout=60) == 0, b"".join(parts)
    return b"".join(parts).decode(errors="replace")
