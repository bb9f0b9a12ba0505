"""What is imported when: the command line and the package are light until something heavy is asked for."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

import prefopt

HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "scipy")


def child(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["losses"], ["losses", "dpo"], ["runs"], ["--version"]])
def test_light_verbs_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, json, contextlib, io\n"
        "from prefopt.cli import main\n"
        "sys.argv = ['prefopt', *sys.argv[1:]]\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code, end.code\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules] + ['said' if out.getvalue() else 'silent']))\n"
    )
    assert json.loads(child(code, *words)) == ["said"]


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="CPU time of one child is not known here")
def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    """The least of three, because the first start of an interpreter also writes its byte code."""

    def seconds() -> float:
        process = subprocess.Popen([sys.executable, "-m", "prefopt", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_package_has_few_names_and_each_is_there() -> None:
    assert len(prefopt.__all__) <= 15
    assert sorted(prefopt._HOMES) == list(prefopt.__all__) == dir(prefopt)
    for name in prefopt.__all__:
        home = importlib.import_module(prefopt._HOMES[name])
        assert getattr(prefopt, name) is getattr(home, name)
        assert getattr(prefopt, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prefopt.no_such_name


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, prefopt; print([n for n in sys.modules if n.startswith('prefopt.') or n in ('torch', 'numpy')])"
    assert child(code).strip() == "[]"


@pytest.mark.parametrize("layer", ["core.resolve", "core.run_folder", "data.read", "data.encode", "data.audit", "report.build"])
def test_layers_without_torch_import_none(layer: str) -> None:
    code = f"import sys, prefopt.{layer}; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert child(code).strip() == "[]"
