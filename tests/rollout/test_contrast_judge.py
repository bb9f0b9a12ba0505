"""The judge of contrasting instructions: its margins are plain log-probs, and it goes by principles alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command_line import prefopt
from prefopt.core.errors import ConfigError, ModelError
from prefopt.model.load import load_model
from prefopt.rollout.judges.answers import AnswerStore
from prefopt.rollout.judges.contrast import ContrastJudge
from prefopt.rollout.judges.labelling import label_with_judge
from prefopt.rollout.judges.load import load_judge
from prefopt.rollout.judges.settings import JudgeSettings, judge_settings
from prefopt.rollout.principles import Principle, read_constitution, suited
from train.tiny_runs import write_model

KIND = Principle("kind", "c", "r", follow="Be kind.", violate="Be rude.")
PLAIN = Principle("plain", "c", "r", follow="Say it in short words.", violate="Say it at length.")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("contrast") / "model")


def judge_of(folder: Path, store: Path, **settings: Any) -> ContrastJudge:
    return ContrastJudge(load_model(str(folder)), judge_settings(settings), store=AnswerStore(store))


def logp(model: Any, turns: list[dict[str, str]], response: str) -> float:
    """By the tokenizer's chat template and plain transformers."""
    tokenizer = model.tokenizer
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, response))
    with torch.no_grad():
        logits = model.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    return float(torch.log_softmax(logits.double(), -1)[range(len(ids)), ids].sum())


def test_the_margin_is_that_of_plain_log_probs_under_both_instructions(model_folder: Path, tmp_path: Path) -> None:
    judge = judge_of(model_folder, tmp_path)
    prompts: list[Any] = ["What?", [{"role": "system", "content": "own"}, {"role": "user", "content": "Who?"}]]
    verdicts = judge.compare(prompts, ["good", "no one"], ["it is bad", "he"], principles=[KIND, PLAIN])
    conversations = [
        lambda said: [{"role": "system", "content": said}, {"role": "user", "content": "What?"}],
        lambda said: [{"role": "system", "content": f"{said}\n\nown"}, {"role": "user", "content": "Who?"}],
    ]
    pairs = [("good", "it is bad"), ("no one", "he")]
    for verdict, turns, pair, principle in zip(verdicts, conversations, pairs, (KIND, PLAIN), strict=True):
        scores = [
            logp(judge.model, turns(principle.follow), one) - logp(judge.model, turns(principle.violate), one) for one in pair
        ]
        assert verdict.margin == pytest.approx(scores[0] - scores[1], abs=1e-4)
        assert verdict.winner == ("first" if scores[0] > scores[1] else "second")
    turned = judge.compare(prompts, ["it is bad", "he"], ["good", "no one"], principles=[KIND, PLAIN])
    assert [one.margin for one in turned] == pytest.approx([-float(one.margin or 0) for one in verdicts], abs=1e-4)


def test_what_was_computed_is_not_computed_again(model_folder: Path, tmp_path: Path) -> None:
    asked: Any = (["What?"] * 3, ["a", "b", "c"], ["x", "y", "z"])
    first = judge_of(model_folder, tmp_path)
    verdicts = first.compare(*asked, principles=[KIND] * 3)
    again = judge_of(model_folder, tmp_path)
    again.model.score = None  # type: ignore[method-assign, assignment]
    assert again.compare(*asked, principles=[KIND] * 3) == verdicts
    assert (first.usage.answers, first.usage.cached, again.usage.cached) == (3, 0, 3)
    assert {one.winner for one in judge_of(model_folder, tmp_path, tolerance=1e9).compare(*asked, principles=[KIND] * 3)} == {
        "tie"
    }


def test_without_a_chat_template_the_instruction_is_text_before_the_prompt(tmp_path: Path) -> None:
    judge = judge_of(write_model(tmp_path / "plain", chat_template=False), tmp_path)
    assert judge.compare(["What?"], ["a"], ["b"], principles=[KIND])[0].margin is not None
    assert judge._instructed("What?", "Be kind.") == "Be kind.\n\nWhat?"


def test_what_is_longer_than_the_context_has_no_winner(model_folder: Path, tmp_path: Path) -> None:
    judge = judge_of(model_folder, tmp_path)
    verdicts = judge.compare(["p", "p"], ["qz" * 100, "a"], ["b", "b"], principles=[KIND] * 2)
    assert [verdict.winner is None for verdict in verdicts] == [True, False] and judge.usage.too_long == 1
    with pytest.raises(ModelError, match="all 1 questions are longer"):
        judge.compare(["p"], ["qz" * 100], ["b"], principles=[KIND])


def test_rows_have_a_probability_and_say_by_which_principle(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What {number}?", "responses": ["one", "two words", "three"]} for number in range(6)]
    result = label_with_judge(rows, judge_of(model_folder, tmp_path), principles=[KIND, PLAIN], seed=3)
    assert result.pairs == len(result.rows) == 18 and set(result.by_principle) == {"kind", "plain"}
    assert all(row["margin"] > 0 and 0.5 < row["probability"] < 1 for row in result.rows)
    assert (result.first_won, result.decided) == (0, 0), "no place is shown"


def test_it_needs_principles_with_both_instructions(model_folder: Path, tmp_path: Path) -> None:
    name = f"contrast:{model_folder}"
    assert isinstance(load_judge(name, by_principles=True), ContrastJudge)
    with pytest.raises(ConfigError, match="compares by principles, and there are none"):
        load_judge(name)
    with pytest.raises(ConfigError, match="is asked nothing, so a template does not apply"):
        load_judge(name, template="pairwise", by_principles=True)
    with pytest.raises(ConfigError, match='"max_answer_tokens" does not apply to a judge of the kind contrast'):
        load_judge(name, settings=JudgeSettings(max_answer_tokens=3), by_principles=True)
    judge = judge_of(model_folder, tmp_path)
    with pytest.raises(ConfigError, match="compares by follow and violate"):
        judge.compare(["p"], ["a"], ["b"], principles=[Principle("bare", "c", "r", "Which?")])
    with pytest.raises(ConfigError, match="no principle has follow and violate"):
        suited([Principle("bare", "c", "r", "Which?")], "file.yaml", contrast=True)
    half = tmp_path / "half.yaml"
    half.write_text("- {name: n, critique: c, revision: r, follow: f}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="one of follow and violate is given"):
        read_constitution(half)


def test_the_command_labels_by_a_constitution(model_folder: Path, tmp_path: Path) -> None:
    samples, constitution, made = tmp_path / "samples.jsonl", tmp_path / "principles.yaml", tmp_path / "pairs.jsonl"
    samples.write_text(json.dumps({"prompt": "What?", "responses": ["one", "two", "three"]}) + "\n", encoding="utf-8")
    principles = [{"name": "kind", "critique": "c", "revision": "r", "follow": "Be kind.", "violate": "Be rude."}]
    constitution.write_text(json.dumps(principles), encoding="utf-8")  # JSON is YAML
    words = ["label", samples, "--judge", f"contrast:{model_folder}", "-o", made]
    done = prefopt(*words, "--constitution", constitution)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(rows) == 3 and {(row["judge"], row["principle"]) for row in rows} == {(f"contrast:{model_folder}", "kind")}
    refused = prefopt(*words)
    assert refused.code == 2 and "there are none" in refused.err


def test_the_example_has_five_principles_for_every_kind_of_judge() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "constitution" / "constitution.yaml"
    principles = read_constitution(path)
    assert len(principles) == 5
    assert suited(principles, path, contrast=True) == suited(principles, path) == principles
