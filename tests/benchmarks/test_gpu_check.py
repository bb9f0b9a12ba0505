"""How the check of a GPU keeps its parts apart: wheels, limits of time, figures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    __import__("gpu_check")
    return sys.modules["gpu_check"]


def write_wheel(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 7\n")
        # What a wheel depends on is not looked for: it may be on the machine already.
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-here\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_carried_wheels_are_installed_and_a_broken_one_stops_no_other(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip")
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    assert gpu_check.install_wheels(tmp_path / "site") == "wheels: none carried"
    write_wheel(tmp_path / "wheels", "carried_along")
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"")
    said = gpu_check.install_wheels(tmp_path / "site")
    assert said == "wheels: 1 of 2 installed; not broken-1.0-py3-none-any.whl"
    found = subprocess.run(
        [sys.executable, "-c", "import carried_along; print(carried_along.VALUE)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "7\n"


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_everything_that_it_started(gpu_check: Any, tmp_path: Path) -> None:
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    status, output = gpu_check.run([sys.executable, "-c", outer], 3.0, dict(os.environ), tmp_path / "log.txt")
    assert status == "stopped after 3 s"
    until = time.monotonic() + 5
    while Path(f"/proc/{output}").exists() and time.monotonic() < until:
        if Path(f"/proc/{output}/stat").read_text().split()[2] == "Z":  # ended, and waits for its parent
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{output}").exists()


def test_what_a_failed_part_printed_is_kept_and_its_error_is_in_the_log(gpu_check: Any, tmp_path: Path) -> None:
    code = "print('half a table', flush=True); raise SystemExit('out of luck')"
    status, output = gpu_check.run([sys.executable, "-c", code], 20.0, dict(os.environ), tmp_path / "log.txt")
    assert (status, output) == ("failed with status 1", "half a table")
    assert "out of luck" in (tmp_path / "log.txt").read_text()


def test_figures_are_one_value_or_one_a_line_and_are_taken_once(gpu_check: Any, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for text, value in (('{"a": 1}', {"a": 1}), ('{"a": 1}\n{"a": 2}\n{"a":', [{"a": 1}, {"a": 2}])):
        path.write_text(text)
        assert gpu_check.taken(path) == value
        assert gpu_check.taken(path) is None


def test_every_part_has_a_command_for_both_sizes_and_a_reason_where_it_cannot_start(gpu_check: Any, tmp_path: Path) -> None:
    facts = {
        "matmul": 1e12,
        "precision": "bf16",
        "installed": dict.fromkeys(gpu_check.OPTIONAL, True),
        "imports": {part.needs: "" for part in gpu_check.PARTS},
    }
    for tiny in (True, False):
        context = gpu_check.Context(tiny, True, ("train.lr=0",), facts, tmp_path / "figures.json")
        for part in gpu_check.PARTS:
            command = part.command(context, part.limit)
            assert command[0] == sys.executable and all(isinstance(word, str) for word in command)
            assert gpu_check.obstacle(part, facts, part.limit) == ""
            assert gpu_check.obstacle(part, facts, 5.0) == "5 s are left"
    broken = {**facts, "imports": dict.fromkeys(facts["imports"], "No module named 'pydantic'")}
    assert all("pydantic" in gpu_check.obstacle(part, broken, part.limit) for part in gpu_check.PARTS)
