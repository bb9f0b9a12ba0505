"""Laws of splitting: nothing is lost, nothing is cut inside a word, and prompts end where the answers part."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.groups import Turn
from prefopt.data.transcripts import common_turns, is_hh, is_word_boundary, join_hh, split_common_prefix, split_hh

CONTENT = st.text(max_size=40).map(lambda text: re.sub(r"\n\n(?=Human:|Assistant:)", "", text).rstrip("\n"))
HH_TURNS = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), CONTENT, st.just("")), min_size=1, max_size=6).map(
    tuple
)
WORDS = st.lists(
    st.sampled_from(["a", "ab", "abc", "b", "don't", " ", "  ", "\n", "\n\n", "é", "e\u0301", "你好。", "ok?"]), max_size=12
)


@given(HH_TURNS)
def test_split_is_the_inverse_of_join(turns: tuple[Turn, ...]) -> None:
    assert split_hh(join_hh(turns)) == turns


def test_only_separators_are_taken_off() -> None:
    text = "\n\nHuman:  two spaces \n\nAssistant: line\n\nnext paragraph \n\n\nHuman:none\n\nAssistant:"
    contents = [turn.content for turn in split_hh(text)]
    assert contents == [" two spaces ", "line\n\nnext paragraph ", "none", ""]


@pytest.mark.parametrize("text", ["", "Human: hi", "\nHuman: hi", "\n\nHumans: hi", "hi\n\nAssistant: x"])
def test_text_without_a_marker_in_front_is_no_transcript(text: str) -> None:
    assert not is_hh(text)
    with pytest.raises(ValueError, match="not an HH-style transcript"):
        split_hh(text)


def test_a_transcript_has_no_turns_of_other_roles() -> None:
    with pytest.raises(ValueError, match='"system"'):
        join_hh([Turn("system", "be brief")])


@given(WORDS, WORDS, WORDS)
def test_prefix_and_rests_rebuild_both_texts_and_no_word_is_cut(shared: list[str], one: list[str], two: list[str]) -> None:
    first, second = "".join(shared + one), "".join(shared + two)
    prompt, rest_first, rest_second = split_common_prefix(first, second)
    assert (prompt + rest_first, prompt + rest_second) == (first, second)
    if prompt:
        assert rest_first.strip()
        assert rest_second.strip()
        for rest in (rest_first, rest_second):
            assert prompt[-1] in "\n。" or rest[0].isspace()


@given(WORDS, WORDS)
def test_the_prefix_is_the_longest_one_that_cuts_no_word(one: list[str], two: list[str]) -> None:
    first, second = "".join(one), "".join(two)
    prompt, _, _ = split_common_prefix(first, second)
    for cut in range(len(prompt) + 1, min(len(first), len(second))):
        agree = first[:cut] == second[:cut] and bool(first[cut:].strip()) and bool(second[cut:].strip())
        assert not (agree and is_word_boundary(first, cut) and is_word_boundary(second, cut))


@pytest.mark.parametrize(
    ("first", "second", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),
        ("Why?\n\nBecause.", "Why?\n\nBecome.", "Why?\n\n"),
        ("I don't", "I don", "I"),
        ("Tell me more", "Tell me", "Tell"),
        ("你好。今天", "你好。明天", "你好。"),
        ("yes", "no", ""),
    ],
)
def test_where_the_cut_falls(first: str, second: str, prompt: str) -> None:
    assert split_common_prefix(first, second)[0] == prompt


def conversation(text: str) -> tuple[Turn, ...]:
    """'u1 a1' as a user's turn "1" and an assistant's turn "1"."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return tuple(Turn(roles[word[0]], word[1:]) for word in text.split())


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("u1 a1", "u1 a2", 1),
        ("s0 u1 a1 u2 a2", "s0 u1 a1 u2 a3", 4),
        ("u1 a1 u2 a2", "u1 a9 u3 a3", 1),
        ("u1 a1", "u1 a1", 1),
        ("u1 a1", "u1 a1 u2 a2", 1),
        ("u1 a1 a2", "u1 a1 a2", 1),
        ("u1 a1", "u2 a1", 0),
        ("s0 u1 a1", "s0 u2 a1", 0),
        ("u1 a1 t1 a2", "u1 a1 t2 a2", 0),
    ],
)
def test_turns_in_common_end_where_the_assistant_takes_over(first: str, second: str, shared: int) -> None:
    assert common_turns(conversation(first), conversation(second)) == shared
    assert common_turns(conversation(second), conversation(first)) == shared
