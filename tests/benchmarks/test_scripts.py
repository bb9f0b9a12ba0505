"""Every benchmark of speed and memory runs with the tiniest sizes, and what it shows is consistent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def figures_of(folder: Path, name: str, *words: str) -> Any:
    """The figures that a benchmark writes."""
    path = folder / "figures.json"
    shown(name, *words, "--json", str(path))
    return json.loads(path.read_text())


def shown(name: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pairs_does_the_same_work_on_both_sides(shared: Path, tmp_path: Path) -> None:
    model = str(shared / "models" / "stories15M")
    words = ["--steps", "2", "--batch", "2", "--trl-batch", "1", "--max-tokens", "100", "--precision", "fp32"]
    found = figures_of(tmp_path, "pairs", "--model", model, *words)
    ours, live, precomputed = found["sides"]
    assert [side["side"] for side in found["sides"]] == ["prefopt", "trl-live", "trl-precomputed"]
    for theirs in (live, precomputed):
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=2e-4)
        assert len(theirs["seconds"]) == 2 and theirs["peak_bytes"] > 0
    assert precomputed["reference_seconds"] > 0 == live["reference_seconds"]


@pytest.mark.parametrize("words", [[], ["--lora", "2"]], ids=["all weights", "lora"])
def test_lengths_does_the_same_work_on_both_sides(words: list[str], tmp_path: Path) -> None:
    sizes = ["--model", "tiny-qwen3", "--scale", "0.03", "--steps", "2", "--batch", "2", "--precision", "fp32", "--together"]
    found = figures_of(tmp_path, "lengths", *sizes, "--lengths", "HH-like", "prompt 200, response 1000", *words)
    for ours, theirs in found["lengths"].values():
        assert not ours["error"] and not theirs["error"]
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-4)


def test_kway_counts_the_tokens_of_each_way_and_the_log_probs_agree(tmp_path: Path) -> None:
    sizes = [
        "--model",
        "tiny-llama",
        "--prompt",
        "20",
        "--response",
        "6",
        "--repeats",
        "1",
        "-k",
        "2",
        "3",
        "--precision",
        "fp32",
    ]
    for row in figures_of(tmp_path, "kway", *sizes):
        k = row["k"]
        assert row["tokens"] == {"one group": 20 + 6 * k, "separate rows": 26 * k, "pairs": 32 * (k - 1)}
        assert row["log-probs differ by"] < 1e-3
        assert all(seconds > 0 for seconds in row["seconds"].values())


def test_memory_counts_16_bytes_a_weight_and_the_rest_grows_with_the_budget(tmp_path: Path) -> None:
    sizes = ["--model", "tiny-llama", "--vocabulary", "512", "--sequence", "64", "--rows", "64", "--precision", "fp32"]
    small, large = figures_of(tmp_path, "memory", *sizes, "--vary", "budget", "--values", "64", "4096")
    weights = 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    assert small["held"] == large["held"] == 16 * weights
    assert small["peak"] > small["held"]
    assert large["beyond"] > small["beyond"]
    assert large["planned"] > small["planned"] > 0


def test_every_head_gives_the_log_probs_and_gradients_of_full_logits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    shown("head", "--tokens", "50", "--hidden", "32", "--vocabulary", "300", "--chunks", "12", "25", "--json", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert float(row["log-probs differ by"]) < 1e-5
        assert float(row["gradients differ by"]) < 1e-5


def test_the_check_of_a_gpu_runs_from_its_first_part_to_its_last_on_tiny_shapes(tmp_path: Path) -> None:
    shown("gpu_check", "--tiny", "--minutes", "20", "--out", str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    assert {part["name"]: part["status"] for part in found["parts"]} == dict.fromkeys(
        ("tests", "selfcheck", "steps-1b", "attention", "head", "steps-0.6b", "steps-8b", "memory"), "done"
    )
    report = (tmp_path / "report.md").read_text()
    assert "FAILED" not in report and "Error" not in report
    for part in found["parts"]:
        if part["name"].startswith("steps"):
            ours, theirs = part["figures"]["lengths"]["HH-like"]
            rounding = 1e-4 if found["facts"]["precision"] == "fp32" else 0.05  # in bf16 where the machine multiplies it
            assert theirs["losses"] == pytest.approx(ours["losses"], abs=rounding)


def test_a_part_that_does_not_fit_in_the_time_is_skipped_with_a_line(tmp_path: Path) -> None:
    said = shown("gpu_check", "--tiny", "--minutes", "0.01", "--parts", "head", "--out", str(tmp_path))
    assert "head: skipped: 0 s are left" in said
