"""A local model as what answers, and as a judge by the log-probs of its two verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefopt.core.errors import DataError
from prefopt.core.files import digest
from prefopt.core.progress import progress, silence
from prefopt.data.encode import Ids, encode_groups
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.tokens import TokenGroup
from prefopt.model.engine import LanguageModel
from prefopt.rollout.judges.answers import AnswerStore, Request, key_of
from prefopt.rollout.judges.asked import comparisons, in_words
from prefopt.rollout.judges.chat import TOO_LONG, Answer, Conversation, Usage, without_room
from prefopt.rollout.judges.logps import BATCHES_KEPT_TOGETHER, kept_logps
from prefopt.rollout.judges.settings import JudgeSettings
from prefopt.rollout.judges.templates import JudgeTemplate
from prefopt.rollout.judges.verdict import Verdict, winner_of
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given, Prompt, as_prompt
from prefopt.rollout.sample import sample, tokens_of


class LocalChat:
    """A local model as a ChatModel: its sampler, greedy unless the temperature says otherwise.

    An answer is kept under the model's weights, the numerics, the conversation and the sampling options. Above temperature
    0 equal conversations get the same answer too: a draw is made once and stays. A model without a chat template is given
    the text of the turns.
    """

    def __init__(
        self, model: LanguageModel, settings: JudgeSettings, *, name: str = "", store: AnswerStore | None = None
    ) -> None:
        self.name = name or f"local:{model.name}"
        self.model = model
        self.settings = settings
        self.usage = Usage()
        self._store = store or AnswerStore()

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        """See `ChatModel`."""
        asked = [as_prompt(given_to(self.model, turns), source=f"question {at}") for at, turns in enumerate(conversations)]
        ids = tokens_of(asked, self.model.tokenizer, template="auto")
        room = self.model.context_tokens - self.settings.max_answer_tokens
        questions = [_Question(prompt, self._request(prompt, tokens)) for prompt, tokens in zip(asked, ids, strict=True)]
        keys = [question.key for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        found = {key: TOO_LONG for key, tokens in zip(keys, ids, strict=True) if len(tokens) > room}
        for key, question in by_key.items():
            kept = self._store.get(question.request)
            if kept is not None:
                found[key] = Answer(str(kept["text"]), bool(kept["finished"]))
        self.usage.answers += len(keys)
        self.usage.cached += sum(key in found and not found[key].too_long for key in keys)
        missing = [question for key, question in by_key.items() if key not in found]
        if missing:
            self._store.check()
            with progress(f"asking {self.model.name}", len(missing), unit) as shown:
                together = BATCHES_KEPT_TOGETHER * self.settings.batch_size
                for at in range(0, len(missing), together):
                    found |= self._asked(missing[at : at + together])
                    shown.advance(len(missing[at : at + together]))
        return without_room([found[key] for key in keys], self.usage, self.name)

    def _asked(self, questions: Sequence[_Question]) -> dict[str, Answer]:
        """Sampled answers, each of which is on disk when this returns."""
        with silence():
            rows = sample(
                self.model,
                [question.prompt for question in questions],
                temperature=self.settings.temperature or 0.0,
                max_new_tokens=self.settings.max_answer_tokens,
                seed=int(questions[0].key[:15], 16),  # of the content: parts must not repeat each other's draws
                batch_size=self.settings.batch_size,
            )
        answers: dict[str, Answer] = {}
        for question, row in zip(questions, rows, strict=True):
            self._store.put(question.request, {"text": row.response, "finished": row.finished})
            answers[question.key] = Answer(row.response, row.finished)
            self.usage.prompt_tokens += len(row.prompt_ids)
            self.usage.answer_tokens += len(row.response_ids)
        return answers

    def _request(self, prompt: Prompt, ids: Ids) -> Request:
        request: Request = {
            "weights": self.model.identity,
            "numerics": self.model.numerics,
            "prompt": prompt.given,
            "prompt_tokens": digest(ids.tobytes()),  # a chat template may change under the same weights
            "max_tokens": self.settings.max_answer_tokens,
            "temperature": self.settings.temperature or 0.0,
        }
        return request | ({"seed": self.settings.seed or 0} if self.settings.temperature else {})


class _Question(NamedTuple):
    prompt: Prompt
    request: Request

    @property
    def key(self) -> str:
        return key_of(self.request)


class LetterJudge:
    """A local model that is not asked to write: which of `Verdict: A` and `Verdict: B` is more likely as its answer.

    The margin is the difference of the log-probs in nats, so that sigmoid(margin) is the model's probability that the first
    is better, of these two verdicts. Every model has one, also one that is too small to keep to the format of an answer. A
    margin within `tolerance` is a tie.
    """

    sees_order = True
    has_probability = True

    def __init__(
        self,
        model: LanguageModel,
        template: JudgeTemplate,
        settings: JudgeSettings,
        *,
        name: str = "",
        store: AnswerStore | None = None,
    ) -> None:
        self.name = name or f"local:{model.name}"
        self.model = model
        self.template = template
        self.settings = settings
        self.usage = Usage()
        self._store = store or AnswerStore()

    def compare(
        self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str], *, principles: Sequence[Principle] = ()
    ) -> list[Verdict]:
        """See `prefopt.rollout.judges.verdict.Judge`. `principles`: the question by which to go, one a comparison.

        A comparison that is longer than the model's context has no winner; ModelError where all are.
        """
        questions = comparisons(self.template, prompts, first, second, principles)
        margins = self._margins(questions)
        without_room([Answer("") if question in margins else TOO_LONG for question in questions], self.usage, self.name)
        return [
            Verdict(winner_of(margins[question], self.settings.tolerance), margin=margins[question])
            if question in margins
            else Verdict(None)
            for question in questions
        ]

    def _margins(self, questions: Sequence[str]) -> dict[str, float]:
        by_question = self._groups(list(dict.fromkeys(questions)))
        scored = kept_logps(self.model, list(by_question.values()), self._store, batch_size=self.settings.batch_size)
        found = {question: one.logps[0] - one.logps[1] for question, one in zip(by_question, scored, strict=True)}
        cached = {question for question, one in zip(by_question, scored, strict=True) if one.cached}
        self.usage.answers += len(questions)
        self.usage.cached += sum(question in cached for question in questions)
        return found

    def _groups(self, questions: Sequence[str]) -> dict[str, TokenGroup]:
        """A group for each question that the context has room for, with the verdicts as responses that go on: no end of turn
        behind them."""
        verdicts = tuple((Turn("assistant", f"Verdict: {letter}"),) for letter in ("A", "B"))
        asked = [as_prompt(given_to(self.model, in_words(question))) for question in questions]
        groups = tuple(
            Group(prompt.turns, verdicts, Feedback("demonstration"), prompt.form, f"question {at}", finished=(False, False))
            for at, prompt in enumerate(asked)
        )
        tokens = encode_groups(GroupSet(groups, rows=len(groups), name=self.name), self.model.tokenizer)
        if tokens.bad:
            raise DataError(f"{self.name}: {tokens.bad[0]}", todo="Mend or remove this row.")
        context = self.model.context_tokens
        return {
            question: group
            for question, group in zip(questions, tokens.groups, strict=True)
            if len(group.prompt_ids) + max(map(len, group.response_ids)) <= context
        }


def given_to(model: LanguageModel, conversation: Conversation) -> Given:
    """The conversation as the model can read it: its text where there is no chat template."""
    if getattr(model.tokenizer, "chat_template", None):
        return conversation
    return "\n\n".join(turn["content"] for turn in conversation) + "\n\n"
