"""Judges that are asked in words: which response is better, or how good one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from prefopt.rollout.judges.chat import Answer, ChatModel, Conversation
from prefopt.rollout.judges.templates import JudgeTemplate, read_score, read_verdict
from prefopt.rollout.judges.verdict import Verdict, winner_of
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given

Read = TypeVar("Read")


class PairwiseJudge:
    """Shows both responses in one question, and reads the verdict. An answer without a clear one has no winner."""

    sees_order = True

    def __init__(self, model: ChatModel, template: JudgeTemplate) -> None:
        self.name = model.name
        self.usage = model.usage
        self.model = model
        self.template = template

    def compare(
        self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str], *, principles: Sequence[Principle] = ()
    ) -> list[Verdict]:
        """See `prefopt.rollout.judges.verdict.Judge`. `principles`: by whose question to go, one a comparison."""
        questions = comparisons(self.template, prompts, first, second, principles)
        answers = self.model.answer([in_words(question) for question in questions], unit="comparisons")
        return [Verdict(_whole(answer, read_verdict), answer.text) for answer in answers]


class PointwiseJudge:
    """Marks each response by itself; the higher mark wins, and marks within `tolerance` of each other are a tie.

    It never sees an order, and asks for each different response to a prompt once.
    """

    sees_order = False

    def __init__(self, model: ChatModel, template: JudgeTemplate, *, tolerance: float = 0.0) -> None:
        self.name = model.name
        self.usage = model.usage
        self.model = model
        self.template = template
        self.tolerance = tolerance

    def compare(
        self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str], *, principles: Sequence[Principle] = ()
    ) -> list[Verdict]:
        """See `prefopt.rollout.judges.verdict.Judge`. `principles`: by whose question to go, one a comparison."""
        by = [principle.compare for principle in principles] or [""] * len(prompts)
        questions = [
            self.template.marking(prompt, response, principle=principle)
            for prompt, one, other, principle in zip(prompts, first, second, by, strict=True)
            for response in (one, other)
        ]
        answers = self.model.answer([in_words(question) for question in questions], unit="marks")
        verdicts = []
        for one, other in zip(answers[::2], answers[1::2], strict=True):
            said = f"{one.text}\n\n{other.text}"
            marks = (_whole(one, read_score), _whole(other, read_score))
            if marks[0] is None or marks[1] is None:
                verdicts.append(Verdict(None, said))
            else:
                margin = marks[0] - marks[1]
                verdicts.append(Verdict(winner_of(margin, self.tolerance), said, margin))
        return verdicts


def comparisons(
    template: JudgeTemplate,
    prompts: Sequence[Given],
    first: Sequence[str],
    second: Sequence[str],
    principles: Sequence[Principle],
) -> list[str]:
    """The question of each comparison."""
    by = [principle.compare for principle in principles] or [""] * len(prompts)
    return [
        template.comparison(prompt, one, other, principle=principle)
        for prompt, one, other, principle in zip(prompts, first, second, by, strict=True)
    ]


def in_words(question: str) -> Conversation:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def _whole(answer: Answer, read: Callable[[str], Read | None]) -> Read | None:
    """What `read` finds in an answer that came to its end; one that was cut may have changed its mind."""
    return read(answer.text) if answer.finished else None
