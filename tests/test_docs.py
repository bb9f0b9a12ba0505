"""Docs that cannot rot: generated pages equal the code, links lead somewhere, recipes are valid."""

import importlib.util
import re
from pathlib import Path

import pytest

from prefopt.core.frontier_recipe import expand_frontier
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.core.stages import expand_stages, is_staged
from prefopt.frontier import planned_steps

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", list(generate.PAGES))
def test_generated_page_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generate.PAGES[name](), "run: python docs/generate.py"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "recipe", sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*/recipe.yaml")]), ids=str
)
def test_recipe_resolves(recipe: Path) -> None:
    values = read_recipe(recipe)
    words = [] if "rollout" in values else ["data.train=rows.jsonl"]
    if is_staged(values):
        configs = [stage.config for stage in expand_stages(values, words, source=str(recipe))]
    else:
        configs = [resolve_config(values, words, source=str(recipe))]
    for config in configs:
        assert resolve_config(config.resolved()).resolved() == config.resolved()


def test_the_iterative_example_samples_and_steps_as_often_as_the_one_shot_one(tmp_path: Path) -> None:
    plan = expand_frontier(read_recipe(ROOT / "examples" / "iterative" / "frontier.yaml"), output=tmp_path)
    configs = {job.method: job.config for job in plan.jobs}
    rounds = configs["iterative"].rollout
    assert rounds is not None and set(configs) == {"one-shot", "iterative"}
    assert planned_steps(configs["iterative"]) == configs["one-shot"].train.max_steps
    prompts = len((ROOT / rounds.prompts).read_text(encoding="utf-8").splitlines())
    assert 0 <= prompts - rounds.rounds * rounds.prompts_per_round < rounds.rounds


def test_exit_codes_of_the_docs_are_those_of_the_errors() -> None:
    from prefopt.core import errors

    codes = {
        value.exit_code for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PrefoptError)
    }
    assert codes <= {code for code, _ in generate.EXIT_CODES}


def test_first_hundred_words_of_the_readme_hold_the_two_commands() -> None:
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()[:100])
    assert "make demo" in words
    assert "make test" in words
