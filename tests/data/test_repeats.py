"""Repeats, contradictions and leakage by sorted digests are those that comparing the texts one by one finds."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.groups import Feedback, Group, Turn
from prefopt.data.repeats import EXAMPLES, GroupKeys, contradictions, duplicates, leakage

Said = tuple[str, str]


def group(source: int, prompt: str, responses: tuple[str, ...], feedback: Feedback) -> Group:
    turns = tuple((Turn("assistant", text),) for text in responses)
    return Group((Turn("user", prompt),), turns, feedback, source=f"rows:{source}")


LETTERS = st.sampled_from("abc")
PAIRS = st.tuples(st.sampled_from("pq"), LETTERS, LETTERS, st.booleans()).map(
    lambda row: (row[0], (row[1], row[2]), Feedback("pair", tie=row[3]))
)
LABELS = st.tuples(st.sampled_from("pq"), LETTERS, st.booleans()).map(
    lambda row: (row[0], (row[1],), Feedback("label", label=row[2]))
)
SCORES = st.tuples(st.sampled_from("pq"), st.permutations("abc"), st.lists(st.integers(0, 2), min_size=3, max_size=3)).map(
    lambda row: (row[0], tuple(row[1]), Feedback("scores", scores=tuple(map(float, row[2]))))
)
GROUPS = st.lists(PAIRS | LABELS | SCORES, max_size=12).map(lambda rows: [group(at, *row) for at, row in enumerate(rows, 1)])


def said(one: Group) -> list[Said]:
    """(better, worse) texts of a group."""
    texts, feedback = [turns[0].content for turns in one.responses], one.feedback
    if feedback.kind == "pair":
        return [] if feedback.tie else [(texts[0], texts[1])]
    if feedback.kind == "label":
        return [(texts[0], "") if feedback.label else ("", texts[0])]
    scored = list(zip(texts, feedback.scores, strict=True))
    ordered = [(one, other) if one[1] > other[1] else (other, one) for one, other in combinations(scored, 2)]
    return [(better, worse) for (better, high), (worse, low) in ordered if high > low]


def prompt(one: Group) -> str:
    return one.prompt[0].content


def answers(one: Group) -> list[str]:
    return sorted(turns[0].content for turns in one.responses)


@given(groups=GROUPS)
def test_repeats_are_those_of_comparing_every_two(groups: list[Group]) -> None:
    wanted = []
    for at, one in enumerate(groups):
        same = (other for other in groups[:at] if (prompt(other), answers(other)) == (prompt(one), answers(one)))
        first = next((other for other in same if sorted(said(other)) == sorted(said(one))), None)
        if first is not None:
            wanted.append(f"{one.source} repeats {first.source}")
    assert duplicates(groups, GroupKeys.of(groups)) == {"count": len(wanted), "examples": wanted[:EXAMPLES]}


@given(groups=GROUPS)
def test_contradictions_are_those_of_comparing_every_two(groups: list[Group]) -> None:
    claims = [(prompt(one), pair, one.source) for one in groups for pair in said(one) if pair[0] != pair[1]]
    wanted: dict[tuple[str, frozenset[str]], str] = {}
    for at, (asked, (better, worse), source) in enumerate(claims):
        opposite = next((other for there, pair, other in claims[:at] if (there, pair) == (asked, (worse, better))), None)
        if opposite is not None:
            wanted.setdefault((asked, frozenset((better, worse))), f"{source} contradicts {opposite}")
    found = contradictions(groups, GroupKeys.of(groups))
    assert found == {"count": len(wanted), "examples": list(wanted.values())[:EXAMPLES]}


@given(groups=GROUPS, others=GROUPS)
def test_leakage_is_that_of_comparing_every_two(groups: list[Group], others: list[Group]) -> None:
    shared = [(one, next((other for other in others if prompt(other) == prompt(one)), None)) for one in groups]
    wholes = {(prompt(other), tuple(answers(other))) for other in others}
    found = leakage(groups, GroupKeys.of(groups), others, GroupKeys.of(others))
    examples = [f"{one.source} has the prompt of {other.source}" for one, other in shared if other is not None]
    assert (found["prompts"], found["examples"]) == (len(examples), examples[:EXAMPLES])
    assert found["groups"] == sum((prompt(one), tuple(answers(one))) in wholes for one in groups)
