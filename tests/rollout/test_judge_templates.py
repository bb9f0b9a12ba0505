"""Questions hold what is compared; an answer is read where it is clear, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import ConfigError
from prefopt.rollout.judges.templates import load_template, read_score, read_verdict

WINNERS = {"A": "first", "B": "second", "tie": "tie"}
reasons = st.text(max_size=80).filter(lambda text: "verdict" not in text.lower() and "score" not in text.lower())
lines = reasons.map(lambda text: " ".join(text.split()))


@given(
    reason=lines, verdict=st.sampled_from(sorted(WINNERS)), around=st.sampled_from(["{}", "**{}**", "{}.", "  {}", "`{}`\n"])
)
def test_a_clear_verdict_is_read_whatever_its_reason(reason: str, verdict: str, around: str) -> None:
    assert read_verdict(f"{reason}\n{around.format(f'Verdict: {verdict}')}") == WINNERS[verdict]
    assert read_verdict(f"{reason}\n{around.format(f'verdict: {verdict.upper()}')}\n") == WINNERS[verdict]


@given(reason=reasons)
def test_without_a_line_for_it_nothing_is_read(reason: str) -> None:
    assert read_verdict(reason) is None
    assert read_score(reason) is None


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A",
        "Response A is better.",
        "Verdict: A\nVerdict: B",
        "Verdict: A or B",
        "Verdict: AB",
        "Verdict: neither",
        "Verdict:",
        "Verdict:\nA good one",
        "My verdict: A",
        "If it were true, Verdict: A",
        "Verdict: A, by a little",
    ],
)
def test_an_unclear_verdict_is_none(answer: str) -> None:
    assert read_verdict(answer) is None


@given(score=st.integers(-20, 40))
def test_a_score_counts_within_its_range_only(score: int) -> None:
    wanted = float(score) if 1 <= score <= 10 else None
    assert read_score(f"Fine.\nScore: {score}") == wanted
    assert read_score(f"**Score:** {score}/10") == wanted
    assert read_score(f"Score: {score}\nScore: {score + 1}") is None


def test_a_verdict_that_comes_twice_is_one() -> None:
    assert read_verdict("Verdict: B\n...\n**Verdict: b**") == "second"
    assert read_score("Score: 7\nScore: 7.0") == 7.0


texts = st.text(min_size=1, max_size=40).filter(lambda text: text == text.strip())


@given(prompt=texts, first=texts, second=texts, principle=st.sampled_from(["", "Which is kinder?"]))
def test_a_question_holds_the_texts_as_they_are(prompt: str, first: str, second: str, principle: str) -> None:
    question = load_template().comparison(prompt, first, second, principle=principle)
    for text in (f"<request>\n{prompt}\n</request>", f"<response_a>\n{first}\n", f"<response_b>\n{second}\n", principle):
        assert text in question
    swapped = load_template().comparison(prompt, second, first, principle=principle)
    assert (swapped == question) == (first == second)
    mark = load_template("pointwise").marking(prompt, first, principle=principle)
    assert all(text in mark for text in (f"<request>\n{prompt}\n", f"<response>\n{first}\n", principle))


def test_a_template_in_a_response_is_not_filled() -> None:
    question = load_template().comparison("{{ first }}", "{% raw %}", "{{ 1 + 1 }}")
    assert "<request>\n{{ first }}\n" in question
    assert "<response_b>\n{{ 1 + 1 }}\n" in question


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    pairwise, pointwise = tmp_path / "two.jinja", tmp_path / "one.jinja"
    pairwise.write_text("{{ prompt }}|{{ first }}|{{ second }}\nend with Verdict: A, B or tie", encoding="utf-8")
    pointwise.write_text("{{ prompt }}|{{ response }}|{{ principle }}\nend with Score: N", encoding="utf-8")
    two, one = load_template(pairwise), load_template(str(pointwise))
    assert (two.kind, two.takes_principle, two.comparison("p", "a", "b").split("\n")[0]) == ("pairwise", False, "p|a|b")
    assert (one.kind, one.takes_principle, one.marking("p", "a", principle="c").split("\n")[0]) == ("pointwise", True, "p|a|c")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert two.comparison(messages, "a", "b").startswith("system: Be brief.\n\nuser: Hi|a|b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ prompt }} {{ first }} Verdict: A", "does not use second"),
        ("{{ first }} {{ second }} Verdict: A", "does not use prompt"),
        ("{{ response }} Score: N", "does not use prompt"),
        ("{{ prompt }} {{ first }} {{ second }} {{ promt }} Verdict:", 'did you mean "prompt"'),
        ("{{ prompt }} {{ first }} {{ second }}", 'a line "Verdict: ..."'),
        ("{{ prompt }} {{ response }}", 'a line "Score: ..."'),
        ("{{ prompt", "is not Jinja (line 1"),
    ],
)
def test_an_unusable_file_says_why(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_template(tmp_path / "own.jinja")
    assert said in str(caught.value)


def test_a_file_that_is_missing_or_reaches_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template("pairwize")
    own = tmp_path / "own.jinja"
    own.write_text("{{ prompt.__class__.__mro__ }} {{ first }} {{ second }} Verdict:", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be filled"):
        load_template(own).comparison("p", "a", "b")
