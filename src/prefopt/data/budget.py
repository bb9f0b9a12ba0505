"""How many tokens a prompt and a response may have, and what becomes of rows that have more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefopt.core.config import DataConfig
from prefopt.core.errors import ConfigError, DataError
from prefopt.data.groups import BadRow, Feedback
from prefopt.data.tokens import Ids, Lengths, TokenGroup, TokenRows, TokenSet, lengths_of, pick


def token_budget(data: DataConfig, context_tokens: int) -> tuple[int, int]:
    """(prompt, response) budgets in tokens; ConfigError where together they exceed the model's context."""
    half = context_tokens // 2
    prompt = data.max_prompt_tokens or min(1024, half)
    response = data.max_response_tokens or min(1024, context_tokens - min(prompt, half))
    if prompt + response > context_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens={prompt} and data.max_response_tokens={response} exceed the model's context of"
            f" {context_tokens} tokens",
            todo=f"Lower them so that their sum is at most {context_tokens}.",
        )
    return prompt, response


def fit_budget(tokens: TokenSet, budget: tuple[int, int], *, on_overlong: str) -> TokenSet:
    """Apply the (prompt, response) `budget` in tokens: `drop` refuses a row over a budget, `truncate` cuts it, `error` raises DataError.

    A cut prompt keeps its end, a cut response its start (and then has no end-of-turn token, because it did not end).
    A pair whose responses become identical, and a response left without scored tokens, are refused.
    """
    max_prompt_tokens, max_response_tokens = budget
    lengths = lengths_of(tokens.groups)
    over = (lengths.prompt_G > max_prompt_tokens) | (lengths.longest_G > max_response_tokens)
    if not over.any():
        return tokens if not tokens.truncated else replace(tokens, truncated=())
    kept = ~over
    bad = list(tokens.bad)
    truncated: list[str] = []
    for place, prompt, longest in zip(
        np.flatnonzero(over).tolist(), lengths.prompt_G[over].tolist(), lengths.longest_G[over].tolist(), strict=True
    ):
        group = tokens.groups[place]
        field, found, limit = (
            ("prompt", prompt, max_prompt_tokens) if prompt > max_prompt_tokens else ("response", longest, max_response_tokens)
        )
        row = BadRow(group.source, f"{field} over the token budget", field, f"{found} tokens", f"at most {limit}")
        if on_overlong == "error":
            raise DataError(str(row), todo=f"Raise data.max_{field}_tokens, or set data.on_overlong=drop or truncate.")
        if on_overlong == "drop":
            bad.append(row)
            continue
        reason = _unusable(_truncate(group, budget))
        if reason:
            bad.append(BadRow(group.source, reason, "responses", f"{found} tokens", f"a difference within {limit} tokens"))
        else:
            kept[place] = True
            truncated.append(group.source)
    groups = pick(tokens.groups, np.flatnonzero(kept).tolist())
    if truncated:
        groups = _cut(groups, budget)
    return replace(tokens, groups=groups, bad=tuple(bad), truncated=tuple(truncated))


class CutRows(TokenRows):
    """`rows`, each cut to `budget` tokens of prompt and of each response where it is longer."""

    def __init__(self, rows: TokenRows, budget: tuple[int, int]) -> None:
        self.rows = rows
        self.budget = budget

    def __len__(self) -> int:
        return len(self.rows)

    def group(self, place: int) -> TokenGroup:
        return _truncate(self.rows.group(place), self.budget)

    def prompt(self, place: int) -> Ids:
        return self.rows.prompt(place)[-self.budget[0] :]

    def lengths(self) -> Lengths:
        whole = self.rows.lengths()
        prompt, response = (np.minimum(*both) for both in zip((whole.prompt_G, whole.response_S), self.budget, strict=True))
        return Lengths(prompt, response, whole.responses_G)

    @property
    def feedbacks(self) -> Sequence[Feedback]:
        return self.rows.feedbacks


def _cut(groups: Sequence[TokenGroup], budget: tuple[int, int]) -> Sequence[TokenGroup]:
    if isinstance(groups, TokenRows):
        return CutRows(groups, budget)
    return tuple(group if _fits(group, budget) else _truncate(group, budget) for group in groups)


def _fits(group: TokenGroup, budget: tuple[int, int]) -> bool:
    return len(group.prompt_ids) <= budget[0] and all(len(ids) <= budget[1] for ids in group.response_ids)


def _truncate(group: TokenGroup, budget: tuple[int, int]) -> TokenGroup:
    max_prompt_tokens, max_response_tokens = budget
    return replace(
        group,
        prompt_ids=group.prompt_ids[-max_prompt_tokens:],
        response_ids=tuple(ids[:max_response_tokens] for ids in group.response_ids),
        scored=tuple(flags[:max_response_tokens] for flags in group.scored),
        finished=tuple(
            done and len(ids) <= max_response_tokens for done, ids in zip(group.finished, group.response_ids, strict=True)
        ),
    )


def _unusable(group: TokenGroup) -> str:
    if any(not flags.any() for flags in group.scored):
        return "no scored token after truncation"
    if group.feedback.kind == "pair" and np.array_equal(group.response_ids[0], group.response_ids[1]):
        return "identical after truncation"
    return ""
