"""Rewards give one finite number a response; checks agree with their definition."""

import math
import sys
from pathlib import Path

import pytest

from prefopt.core.errors import ConfigError, DataError
from prefopt.rollout.rewards import Reward, load_reward, reward_table


def score(name: str, *responses: str) -> list[float]:
    return load_reward(name)(["p"] * len(responses), list(responses))


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("no_comma", "one two", "one, two"),
        ("all_lowercase", "quiet words 1", "Quiet words"),
        ("all_uppercase", "LOUD 1!", "Loud"),
        ("json_format", '```json\n{"a": [1]}\n```', "{a: 1}"),
        ("json_format", "[1, 2]", "[1, 2] done"),
        ("quotation", ' "said" ', '"said'),
        ("title", "<<On Cats>>\ntext", "<< >> text"),
        ("postscript", "Bye.\nP.S. Write!", "psst."),
        ("min_words:3", "one two three", "one two"),
        ("max_words:2", "one two", "one two three"),
        ("min_sentences:2", "One. Two?", "One, two."),
        ("max_sentences:1", "One e.g two.", "One. Two."),
        ("paragraphs:2", "a\n\nb", "a\nb"),
        ("bullet_lists:2", "* a\n* b", "* a\n* b\n- c"),
        ("highlights:2", "*a* and **b**", "*a* and b"),
        ("placeholders:1", "Dear [name]", "Dear name"),
        ("regex:^[0-9:]+$", "12:30", "at 12:30"),
        ("contains:Cat", "a CATalogue", "a dog"),
        ("excludes:cat", "a dog", "a Cat"),
        ("starts_with:Dear", "dear all", "oh dear"),
        ("ends_with:Bye.", 'So long. "Bye."', "Bye. Then"),
    ],
)
def test_a_check_is_one_where_it_passes_and_zero_elsewhere(name: str, passes: str, fails: str) -> None:
    assert score(name, passes, fails, "", " \n") == [1.0, 0.0, 0.0, 0.0]


def test_length_counts_words() -> None:
    assert score("length", "", "one", "one, two  three.") == [0.0, 1.0, 3.0]


def test_vader_orders_plain_sentiments() -> None:
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is an optional package")
    good, neutral, bad = score("vader", "I love it, wonderful!", "It is a table.", "I hate it, terrible!")
    assert 1 >= good > neutral == 0 > bad >= -1


def test_vader_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"pip install 'prefopt\[demo\]'"):
        load_reward("vader")


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0], "1 scores for 2"),
        ([1.0, math.nan], "score 1 is nan"),
        ([math.inf, 0], "score 0 is inf"),
        ([0, "7"], "score 1 is '7'"),
        ([None, 0], "score 0 is None"),
        (3, "gave int"),
    ],
)
def test_bad_scores_name_the_reward_and_the_index(scores: object, said: str) -> None:
    with pytest.raises(DataError, match="reward mine") as caught:
        Reward("mine", lambda prompts, responses: scores)(["p", "p"], ["a", "b"])  # type: ignore[arg-type,return-value]
    assert said in str(caught.value)


def test_a_function_of_the_current_folder_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_of_a_user.py").write_text(
        "def both(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_reward("reward_of_a_user:both")(["abc", "a"], ["x", "xy"]) == [2.0, -1.0]
    assert sys.path == before
    with pytest.raises(ConfigError, match='no function "neither"'):
        load_reward("reward_of_a_user:neither")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vadre", 'did you mean "vader"'),
        ("contain:cat", 'did you mean "contains"'),
        ("min_words", "needs a whole number"),
        ("min_words:few", "needs a whole number"),
        ("contains:", "needs a text"),
        ("model:", "needs a trained reward model"),
        ("implicit:", "needs a run folder"),
        ("no_comma:1", "takes no argument"),
        ("regex:(", "regular expression"),
        ("no_such_module_here:f", 'no module "no_such_module_here"'),
    ],
)
def test_an_unusable_name_says_the_way_out(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_reward(name)
    assert said in str(caught.value)


def test_the_table_lists_only_rewards_that_load() -> None:
    for name, _ in reward_table():
        if name not in ("vader", "model:PATH", "implicit:RUN", "module:function"):
            assert load_reward(name.replace(":N", ":1").replace(":TEXT", ":x")).function
