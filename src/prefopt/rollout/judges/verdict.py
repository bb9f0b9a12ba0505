"""What a judge says of two responses, and what a judge is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prefopt.rollout.prompts import Given

Winner = Literal["first", "second", "tie"]
_OTHER_WAY: dict[Winner, Winner] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of two responses shown in one order.

    `winner` is None where its answer could not be read; such a comparison is counted and never guessed. `said` is the
    text of its answer, "" where the judge is a number. `margin`: score of the first less that of the second, where the judge
    gives scores.
    """

    winner: Winner | None
    said: str = ""
    margin: float | None = None


class Judge(Protocol):
    """Compares responses. `name` says who judged; it is written beside every verdict."""

    name: str

    def compare(self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        """One verdict a comparison, in order: `first[i]` and `second[i]` answer `prompts[i]`, shown in this order."""
        ...


def winner_of(margin: float, tolerance: float) -> Winner:
    """The higher score wins; scores within `tolerance` of each other are a tie."""
    if abs(margin) <= tolerance:
        return "tie"
    return "first" if margin > 0 else "second"


def sees_order(judge: Judge) -> bool:
    """Whether the order in which responses are shown can change what `judge` says: not where it scores each by itself."""
    return bool(getattr(judge, "sees_order", True))


def mirrored(verdict: Verdict) -> Verdict:
    """What a judge that sees no order says of the same two responses, shown the other way round."""
    winner = None if verdict.winner is None else _OTHER_WAY[verdict.winner]
    return Verdict(winner, verdict.said, None if verdict.margin is None else -verdict.margin)
