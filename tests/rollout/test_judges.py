"""Judges by name: a reward, a run's implicit reward, a local model that writes or is read by its log-probs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.core.errors import ConfigError, ModelError
from prefopt.data.encode import encode_groups
from prefopt.data.load import load_groups
from prefopt.model.load import load_model
from prefopt.pipeline import train_run
from prefopt.rollout.judges.answers import AnswerStore
from prefopt.rollout.judges.asked import PairwiseJudge, PointwiseJudge
from prefopt.rollout.judges.chat import Answer, Conversation, Usage
from prefopt.rollout.judges.load import load_chat, load_judge
from prefopt.rollout.judges.local import LetterJudge, LocalChat
from prefopt.rollout.judges.scores import RewardJudge
from prefopt.rollout.judges.settings import JudgeSettings, judge_settings, settings_table
from prefopt.rollout.judges.templates import JudgeTemplate, load_template
from prefopt.rollout.principles import read_constitution
from prefopt.rollout.rewards import load_reward
from prefopt.rollout.sample import sample
from train.tiny_runs import preference_rows, tiny_config, write_model

SHORT = JudgeTemplate("pairwise", "{{ prompt }} {{ first }} {{ second }}\nVerdict: A or B?", "short")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a few steps, and its model."""
    folder = tmp_path_factory.mktemp("judges")
    train_run(tiny_config(folder))
    return folder


def test_a_reward_judges_by_its_difference_and_its_tolerance() -> None:
    first, second = ["a b c", "a", "a b", ""], ["a b", "a b c", "a b", "a"]
    exact = load_judge("reward:length").compare(["p"] * 4, first, second)
    assert [verdict.winner for verdict in exact] == ["first", "second", "tie", "second"]
    assert [verdict.margin for verdict in exact] == [1, -2, 0, -1]
    wide = load_judge("reward:length", tolerance=1.0).compare(["p"] * 4, first, second)
    assert [verdict.winner for verdict in wide] == ["tie", "second", "tie", "tie"]
    with pytest.raises(ConfigError, match="tolerance"):
        RewardJudge(load_reward("length"), tolerance=-1)


def test_the_implicit_reward_is_beta_times_the_log_ratio(folder: Path) -> None:
    rows = preference_rows(6)
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[key] for row in rows for key in ("chosen", "rejected")]
    found = load_reward(f"implicit:{folder / 'run'}")(prompts, answers)
    policy, reference = load_model(str(folder / "run")), load_model(str(folder / "model"))
    groups = encode_groups(load_groups(rows), policy.tokenizer).groups
    ours, theirs = (
        np.array([logps.sum() for group in model.score(groups) for logps in group]) for model in (policy, reference)
    )
    assert found == pytest.approx((0.1 * (ours - theirs)).tolist(), abs=1e-5)
    assert np.abs(found).max() > 1e-4
    verdicts = load_judge(f"implicit:{folder / 'run'}").compare(prompts[::2], answers[::2], answers[1::2])
    margins = np.array(found[::2]) - np.array(found[1::2])
    assert [verdict.margin for verdict in verdicts] == pytest.approx(margins.tolist(), abs=1e-6)
    assert [verdict.winner for verdict in verdicts] == ["first" if margin > 0 else "second" for margin in margins]
    with pytest.raises(ConfigError, match="is not a run folder"):
        load_judge(f"implicit:{folder / 'model'}")


def test_a_local_model_answers_as_the_sampler_does_and_only_once(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder / "model"))
    questions: list[Conversation] = [[{"role": "user", "content": f"What {number}?"}] for number in (1, 2, 3, 1)]
    wanted = [row.response for row in sample(model, questions, temperature=0, max_new_tokens=6)]
    chat = LocalChat(model, judge_settings({"max_answer_tokens": 6}), store=AnswerStore(tmp_path))
    assert [answer.text for answer in chat.answer(questions[:2])] == wanted[:2]
    assert [answer.text for answer in chat.answer(questions)] == wanted
    assert (chat.usage.answers, chat.usage.cached, len(list(tmp_path.rglob("*.json")))) == (6, 3, 3)

    drawn = judge_settings({"max_answer_tokens": 6, "temperature": 1.0, "batch_size": 1})
    many: list[Conversation] = [[{"role": "user", "content": f"What {number}?"}] for number in range(9)]
    whole = LocalChat(model, drawn, store=AnswerStore(tmp_path / "whole")).answer(many)
    killed = LocalChat(model, drawn, store=AnswerStore(tmp_path / "killed"))
    killed.answer(many[:4])  # the answers of a first part, as a run leaves them that is killed behind it
    assert killed.answer(many) == whole
    assert len({answer.text for answer in whole}) > 5
    other = LocalChat(model, judge_settings(drawn.model_dump(exclude_unset=True) | {"seed": 1}), store=AnswerStore(tmp_path))
    assert other.answer(many) != whole


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    model = load_model(str(write_model(tmp_path / "plain", chat_template=False)))
    chat = LocalChat(model, judge_settings({"max_answer_tokens": 4}), store=AnswerStore(tmp_path))
    wanted = sample(model, ["What?\n\n"], temperature=0, max_new_tokens=4)[0].response
    assert chat.answer([[{"role": "user", "content": "What?"}]])[0].text == wanted


def test_a_question_beyond_the_context_has_no_answer_and_is_counted(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder / "model"))
    long: Conversation = [{"role": "user", "content": "qz" * 100}]
    short: Conversation = [{"role": "user", "content": "short"}]
    chat = LocalChat(model, judge_settings({"max_answer_tokens": 6}), store=AnswerStore(tmp_path))
    answers = chat.answer([long, short, long])
    assert [answer.too_long for answer in answers] == [True, False, True]
    assert answers[1] == chat.answer([short])[0]
    assert chat.usage.too_long == 2
    letters = LetterJudge(model, SHORT, JudgeSettings(), store=AnswerStore(tmp_path))
    verdicts = letters.compare(["p", "p"], ["qz" * 100, "a"], ["b", "b"])
    assert [verdict.winner is None for verdict in verdicts] == [True, False]
    assert verdicts[1] == letters.compare(["p"], ["a"], ["b"])[0]
    with pytest.raises(ModelError, match="all 1 questions are longer"):
        letters.compare(["p"], ["qz" * 100], ["b"])
    with pytest.raises(ModelError, match="all 2 questions are longer"):
        chat.answer([long, long])


def test_the_margin_of_letters_is_the_difference_of_plain_log_probs(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder / "model"))
    judge = LetterJudge(model, SHORT, JudgeSettings(), store=AnswerStore(tmp_path))
    firsts, seconds = ["good", "no", "it is"], ["bad", "yes", "it was"]
    verdicts = judge.compare(["What?"] * 3, firsts, seconds)
    tokenizer = model.tokenizer
    for verdict, first, second in zip(verdicts, firsts, seconds, strict=True):
        question = [{"role": "user", "content": SHORT.comparison("What?", first, second)}]
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        before = tokenizer(asked, add_special_tokens=False)["input_ids"]
        totals = []
        for letter in "AB":
            ids = tokenizer(f"Verdict: {letter}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model.model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
            totals.append(float(torch.log_softmax(logits, -1)[range(len(ids)), ids].sum()))
        assert verdict.margin == pytest.approx(totals[0] - totals[1], abs=1e-4)
        assert verdict.winner == ("first" if totals[0] > totals[1] else "second")
    again = LetterJudge(model, SHORT, JudgeSettings(), store=AnswerStore(tmp_path))
    assert again.compare(["What?"] * 3, firsts, seconds) == verdicts
    assert again.usage.cached == 3
    wide = LetterJudge(model, SHORT, judge_settings({"tolerance": 1e9}), store=AnswerStore(tmp_path))
    assert {verdict.winner for verdict in wide.compare(["What?"] * 3, firsts, seconds)} == {"tie"}


class Marks:
    """Answers with the number of words in the response as its score."""

    name = "marks"

    def __init__(self) -> None:
        self.usage = Usage()
        self.asked: list[str] = []

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        self.asked += [turns[-1]["content"] for turns in conversations]
        words = [turns[-1]["content"].split("<response>\n")[1].split("\n</response>")[0].split() for turns in conversations]
        return [Answer(f"Score: {len(of_one)}", finished="cut" not in of_one) for of_one in words]


def test_marks_are_compared_and_unreadable_ones_have_no_winner() -> None:
    first, second = ["a b", "a", "a b c", "a cut", " ".join("a" * 11)], ["a", "a b c", "a b c", "a", "a"]
    verdicts = PointwiseJudge(Marks(), load_template("pointwise"), tolerance=1.0).compare(["p"] * 5, first, second)
    assert [verdict.winner for verdict in verdicts] == ["tie", "second", "tie", None, None]
    assert [verdict.margin for verdict in verdicts] == [1.0, -2.0, 0.0, None, None]


def test_names_choose_the_judge(folder: Path) -> None:
    model = folder / "model"
    judge = load_judge(f"local:{model}", template="pairwise")
    assert isinstance(judge, PairwiseJudge)
    assert judge.name == f"local:{model}"
    assert isinstance(load_judge(f"local:{model}", template="pointwise"), PointwiseJudge)
    letters = load_judge(f"local:{model}", settings=judge_settings(["verdict_by=letters", "tolerance=0.5"]))
    assert isinstance(letters, LetterJudge)
    remote = load_judge("endpoint:org/model@v1@http://localhost:8000/v1", settings=judge_settings(["concurrency=2"]))
    assert remote.name == "endpoint:org/model@v1@http://localhost:8000/v1"
    assert load_chat(f"local:{model}").name == f"local:{model}"


@pytest.mark.parametrize(
    ("name", "settings", "template", "said"),
    [
        ("rewards:length", [], None, "reward:NAME"),
        ("length", [], None, "endpoint:MODEL@URL"),
        ("local:", [], None, "names no local"),
        ("reward:lenght", [], None, 'did you mean "length"'),
        ("reward:length", [], "pairwise", "a template does not apply"),
        ("reward:length", ["concurrency=2"], None, '"concurrency" does not apply'),
        ("local:m", ["concurrency=2"], None, '"concurrency" does not apply'),
        ("local:m", ["tolerance=1"], None, "no score that could be close"),
        ("local:m", ["verdict_by=letters", "temperature=1"], None, "nothing is written"),
        ("local:m", ["verdict_by=letters"], "pointwise", "compares two responses"),
        ("endpoint:m@http://h", ["verdict_by=letters"], None, '"verdict_by" does not apply'),
        ("endpoint:m", [], None, "endpoint:MODEL@URL"),
        ("endpoint:@http://h", [], None, "endpoint:MODEL@URL"),
        ("endpoint:m@http://me@h", [], None, "is not the address"),
    ],
)
def test_what_cannot_be_a_judge_says_the_way_out(name: str, settings: list[str], template: str | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_judge(name, settings=judge_settings(settings), template=template)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["concurency=2"], 'did you mean "concurrency"'),
        (["concurrency=0"], "greater than or equal to 1, found 0"),
        (["concurrency"], "key=value"),
        (["prompt_price=1"], "Give both"),
        (["max_cost=1"], "max_cost needs prices"),
        (["timeout_seconds=.inf"], "finite"),
    ],
)
def test_wrong_settings_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judge_settings(words)
    assert said in str(caught.value)


def test_the_page_lists_every_setting_and_its_examples_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "ai-feedback.md").read_text(encoding="utf-8")
    for name, default, kinds, what in settings_table():
        assert f"| `{name}` | {default} | {kinds} | {what} |" in page
    for language, read in (("jinja", load_template), ("yaml", read_constitution)):
        (example,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        path = tmp_path / f"example.{language}"
        path.write_text(example, encoding="utf-8")
        assert read(path)


def test_an_endpoint_is_asked_without_torch() -> None:
    program = (
        "import sys; from prefopt.rollout.judges.load import load_judge; load_judge('endpoint:m@http://localhost/v1');"
        "import prefopt.rollout.judges.labelling, prefopt.rollout.constitution; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_httpx_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'prefopt\[judges\]'"):
        load_judge("endpoint:m@http://localhost/v1")
