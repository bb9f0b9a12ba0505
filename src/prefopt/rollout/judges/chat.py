"""What answers a conversation: a local model or an endpoint. Judges and revisions are written on this alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prefopt.core.errors import ModelError

Conversation = list[dict[str, str]]  # turns with role and content; the last one is not the assistant's


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer. `finished`: it came to its end, rather than to the limit of tokens. `too_long`: there is none,
    for the conversation leaves no room for it in the model's context."""

    text: str
    finished: bool = True
    too_long: bool = False


TOO_LONG = Answer("", finished=False, too_long=True)


@dataclass(slots=True)
class Usage:
    """What answers cost. `cached` answers came from disk and cost nothing; tokens and dollars are those of this process.

    `too_long` conversations left no room in the model's context. `requests`: everything that was sent, also what failed. `unknown`: requests that may have been charged and came back
    without a count. `cost_dollars` is None where no prices are given.
    """

    answers: int = 0
    cached: int = 0
    too_long: int = 0
    requests: int = 0
    unknown: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost_dollars: float | None = None
    failures: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """The same in one line for people."""
        parts = [f"{self.answers} answers asked for, {self.cached} found on disk"]
        if self.too_long:
            parts.append(f"{self.too_long} questions are longer than the model's context")
        if self.requests:
            parts.append(f"{self.requests} requests, {self.prompt_tokens} + {self.answer_tokens} tokens")
        if self.cost_dollars is not None:
            parts.append(f"${self.cost_dollars:.4f}")
        if self.failures:
            parts.append("tried again after " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.failures.items())))
        if self.unknown:
            parts.append(f"{self.unknown} requests may have been charged and came back without a count")
        return "; ".join(parts)


class ChatModel(Protocol):
    """Answers conversations. `name` says what answered; `usage` counts since it was made."""

    name: str
    usage: Usage

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        """One answer a conversation, in order; equal conversations get the same one. One that is too long for the model has
        an answer that says so; ModelError where all are.

        Each is kept on disk as it arrives, so that a call that is killed or fails goes on where it stopped. `unit`: what
        an answer is called in progress and errors.
        """
        ...


def without_room(answers: list[Answer], usage: Usage, name: str) -> list[Answer]:
    """`answers`, of which those that are too long are counted; ModelError where all are."""
    too_long = sum(answer.too_long for answer in answers)
    usage.too_long += too_long
    if answers and too_long == len(answers):
        raise ModelError(
            f"{name}: all {too_long} questions are longer than the model's context, or leave no room for an answer",
            todo="Lower max_answer_tokens, use a shorter template or shorter responses, or a model with a longer context.",
        )
    return answers
