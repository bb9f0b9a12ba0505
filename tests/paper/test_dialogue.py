"""The dialogue task: its parts share no prompt and lose no row, and its recipes are valid."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from paper.quick_form import run_quick_form
from prefopt.core.errors import DataError
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.data.load import load_groups
from prefopt.rollout.prompts import read_prompts
from train.tiny_runs import write_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "paper" / "dialogue"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"dialogue_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


split = loaded("split")


def hh_rows(count: int) -> list[dict[str, str]]:
    """Transcripts; every third prompt comes twice."""
    rows = []
    for number in range(count):
        asked = f"\n\nHuman: What of {number - (number % 3 == 2)}?\n\nAssistant:"
        rows.append({"chosen": f"{asked} Good {number}.", "rejected": f"{asked} Poor {number}."})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_parts_hold_every_short_pair_once_and_share_no_prompt(tmp_path: Path) -> None:
    long = [(f"\n\nHuman: {'x' * 1100}\n\nAssistant:", "b"), ("\n\nHuman: y\n\nAssistant:", "b" * 301)]
    rows = [*hh_rows(60), *({"chosen": f"{asked} a", "rejected": f"{asked} {worse}"} for asked, worse in long)]
    parts = split.split(str(write_rows(tmp_path / "rows.jsonl", rows)), most=None)
    sources = [group.source for groups in parts.values() for group in groups]
    assert sorted(sources) == sorted(f"rows.jsonl:{number}" for number in range(1, 61))
    prompts = [{group.prompt for group in groups} for groups in parts.values()]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert parts == split.split(str(tmp_path / "rows.jsonl"), most=None)


def test_a_written_part_reads_as_what_it_was(tmp_path: Path) -> None:
    messages = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"}
    for rows in (hh_rows(4), [{"prompt": "p", "chosen": "a", "rejected": "b"}], [messages]):
        before = load_groups(rows).groups
        split.write(tmp_path / "part.jsonl", [split.row_of(group) for group in before])
        after = load_groups(tmp_path / "part.jsonl").groups
        assert [(one.prompt, one.responses, one.form) for one in before] == [
            (one.prompt, one.responses, one.form) for one in after
        ]


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few for three parts"):
        split.split(str(write_rows(tmp_path / "rows.jsonl", hh_rows(2))), most=None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_resolves(recipe: Path) -> None:
    config = resolve_config(read_recipe(recipe), source=str(recipe))
    assert resolve_config(config.resolved()).resolved() == config.resolved()
    assert config.train.output_dir == f"runs/paper/dialogue/{recipe.stem}"


@pytest.mark.slow
def test_the_quick_form_goes_through(tmp_path: Path) -> None:
    """On a copy of the recipes, with a tiny random model."""
    written = run_quick_form(
        "dialogue",
        tmp_path,
        PREFOPT_DIALOGUE_ROWS=str(write_rows(tmp_path / "rows.jsonl", hh_rows(60))),
        PREFOPT_DIALOGUE_MODEL=str(write_model(tmp_path / "model")),
    )
    results = written / "results"
    for name in ("sft", "dpo", "ppo", "best-of-4"):
        found = json.loads((results / name / "evaluation.json").read_text())["win_rates"]
        (section,) = (one for judges in found.values() for one in judges.values())
        assert section["comparisons"] > 0
    assert (results / "temperatures" / "temperatures.svg").exists()
    prompts = read_prompts(written / "data" / "prompts_held_out.jsonl")
    assert prompts and all(prompt.form == "hh" for prompt in prompts)
