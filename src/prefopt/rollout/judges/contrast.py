"""A local model as a judge that is asked nothing: how likely each response is where a principle is kept and where it is broken."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.core.errors import ConfigError, DataError
from prefopt.data.encode import encode_groups
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.tokens import TokenGroup
from prefopt.model.engine import LanguageModel
from prefopt.rollout.judges.answers import AnswerStore
from prefopt.rollout.judges.chat import TOO_LONG, Answer, Usage, without_room
from prefopt.rollout.judges.logps import kept_logps
from prefopt.rollout.judges.settings import JudgeSettings
from prefopt.rollout.judges.verdict import Verdict, winner_of
from prefopt.rollout.principles import Principle
from prefopt.rollout.prompts import Given, as_prompt, prompt_text


class ContrastJudge:
    """The response wins whose log-prob rises more from the instruction to break a principle to the one to keep to it.

    A response scores log p(response | follow, prompt) - log p(response | violate, prompt), in nats, its tokens summed and the
    end of its turn left out; the margin is the difference of two scores. Of two responses of which one was written under each
    instruction, sigmoid(margin) is the model's probability that the first was the one that kept to the principle. Nothing is
    written and no place is shown, so models that are too small to compare in words judge too. The reward of contrasting
    prompts is that of arXiv 2402.11907.
    """

    sees_order = False
    has_probability = True
    contrasts = True

    def __init__(
        self, model: LanguageModel, settings: JudgeSettings, *, name: str = "", store: AnswerStore | None = None
    ) -> None:
        self.name = name or f"contrast:{model.name}"
        self.model = model
        self.settings = settings
        self.usage = Usage()
        self._store = store or AnswerStore()

    def compare(
        self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str], *, principles: Sequence[Principle] = ()
    ) -> list[Verdict]:
        """See `prefopt.rollout.judges.verdict.Judge`. `principles`: with `follow` and `violate`, one a comparison.

        A comparison that is longer than the model's context has no winner; ModelError where all are.
        """
        if len(principles) != len(prompts) or not all(principle.follow for principle in principles):
            raise ConfigError(
                f"judge: {self.name} compares by follow and violate of a principle, one for each comparison",
                todo="Give a constitution whose principles have both.",
            )
        groups = self._groups(prompts, list(zip(first, second, strict=True)), principles)
        context = self.model.context_tokens
        fitting = [
            number
            for number, pair in enumerate(groups)
            if all(len(group.prompt_ids) + max(map(len, group.response_ids)) <= context for group in pair)
        ]
        flat = [group for number in fitting for group in groups[number]]
        scored = kept_logps(self.model, flat, self._store, batch_size=self.settings.batch_size)
        found: dict[int, float] = {}
        for number, kept, broken in zip(fitting, scored[::2], scored[1::2], strict=True):
            found[number] = (kept.logps[0] - broken.logps[0]) - (kept.logps[1] - broken.logps[1])
            self.usage.cached += kept.cached and broken.cached
        self.usage.answers += len(groups)
        without_room([Answer("") if number in found else TOO_LONG for number in range(len(groups))], self.usage, self.name)
        return [
            Verdict(winner_of(found[number], self.settings.tolerance), margin=found[number])
            if number in found
            else Verdict(None)
            for number in range(len(groups))
        ]

    def _groups(
        self, prompts: Sequence[Given], pairs: Sequence[tuple[str, str]], principles: Sequence[Principle]
    ) -> list[tuple[TokenGroup, TokenGroup]]:
        """Both responses of each comparison, under `follow` and under `violate`."""
        groups = []
        for number, (prompt, pair, principle) in enumerate(zip(prompts, pairs, principles, strict=True)):
            responses = tuple((Turn("assistant", response),) for response in pair)
            for instruction in (principle.follow, principle.violate):
                asked = as_prompt(self._instructed(prompt, instruction))
                source = f"comparison {number}"
                nothing = Feedback("demonstration")
                groups.append(Group(asked.turns, responses, nothing, asked.form, source, finished=(False, False)))
        tokens = encode_groups(GroupSet(tuple(groups), rows=len(groups), name=self.name), self.model.tokenizer)
        if tokens.bad:
            raise DataError(f"{self.name}: {tokens.bad[0]}", todo="Mend or remove this row.")
        return list(zip(tokens.groups[::2], tokens.groups[1::2], strict=True))

    def _instructed(self, prompt: Given, instruction: str) -> Given:
        """The prompt behind the instruction: as its system message where the model has a chat template, else as text."""
        if not getattr(self.model.tokenizer, "chat_template", None):
            return f"{instruction}\n\n{prompt_text(prompt)}"
        turns = [{"role": turn.role, "content": turn.content} for turn in as_prompt(prompt).turns]
        own = [turn.pop("content") for turn in turns[:1] if turn["role"] == "system"]
        return [{"role": "system", "content": "\n\n".join([instruction, *own])}, *turns[len(own) :]]
