"""Rows made ready to train on: read, refused, tokenised, fitted to the budget and audited."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from prefopt.core.checks import check_reference_moves, steps_per_round
from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError
from prefopt.core.progress import say
from prefopt.data.audit import audit
from prefopt.data.budget import fit_budget, token_budget
from prefopt.data.groups import GroupSet
from prefopt.data.mismatch import with_mismatched
from prefopt.data.pack import total_steps
from prefopt.data.splits import load_splits
from prefopt.data.suitable import suitable, unused_columns
from prefopt.data.token_cache import cached_encoding
from prefopt.data.tokens import TokenSet, feedbacks_of

_PARTLY_CUT = 0.05  # share of rows from which on they are worth a line
_ROWS_A_PROMPT = 1.5  # from which on it pays to keep rows of a prompt together


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready to train on: groups as read, token ids within budget, and the audit of both."""

    groups: GroupSet
    train: TokenSet
    held_out: TokenSet
    audit: dict[str, Any]


def prepare_rows(
    config: RunConfig, tokenizer: Any, context_tokens: int, *, train_rows: Any = None, eval_rows: Any = None
) -> Prepared:
    """Read, refuse, tokenise, fit and audit. `train_rows` and `eval_rows` stand in for data.train and data.eval."""
    data = config.data
    groups, held = load_splits(data, train_rows=train_rows, eval_rows=eval_rows)
    for note in (*groups.notes, *(held.notes if held is not None else ())):
        say(note)
    budget = token_budget(data, context_tokens)
    full = _encoded(groups, tokenizer, config)
    fitted = fit_budget(full, budget, on_overlong=data.on_overlong)
    train = _usable(fitted, groups, config)
    check_reference_moves(config, steps_of(config, train))
    held_out = TokenSet(())
    if held is not None:
        held_out = usable_held_out(held, config, tokenizer, context_tokens)
    for_loss = replace(full, bad=(*full.bad, *train.bad[len(fitted.bad) :]))  # with what the loss has no place for
    found = audit(groups, for_loss, budget=budget, on_overlong=data.on_overlong, against=held)
    rows, prompts, partly = found["groups"], found["feedback"]["prompts"], found["truncation"]["partly_over"]
    if data.on_overlong == "truncate" and partly > _PARTLY_CUT * rows:
        say(
            f"{groups.name}: in {partly} of {rows} rows a response is cut at {budget[1]} tokens beside one that ends, and that"
            " alone can be learned; data.on_overlong=drop leaves them out, data.max_response_tokens is the limit"
        )
    if not data.by_prompt and rows >= _ROWS_A_PROMPT * prompts > 0:
        say(f"{groups.name}: {rows} rows have {prompts} prompts: data.by_prompt=true computes what rows of a prompt share once")
    return Prepared(groups, train, held_out, found)


def usable_held_out(held: GroupSet, config: RunConfig, tokenizer: Any, context_tokens: int) -> TokenSet:
    """Token ids of the held-out groups that the loss can be measured on."""
    budget = token_budget(config.data, context_tokens)
    return _usable(fit_budget(_encoded(held, tokenizer, config), budget, on_overlong=config.data.on_overlong), held, config)


def steps_of(config: RunConfig, tokens: TokenSet) -> int:
    """Optimizer steps of a run on the rows `tokens`, or of all its rounds."""
    train = config.train
    if config.rollout is not None:
        planned = config.rollout.rounds * steps_per_round(config)
        return planned if train.max_steps is None else min(planned, train.max_steps)
    return total_steps(
        len(tokens.groups), epochs=train.epochs, groups_per_step=train.groups_per_step, max_steps=train.max_steps
    )


def _encoded(groups: GroupSet, tokenizer: Any, config: RunConfig) -> TokenSet:
    return cached_encoding(groups, tokenizer, template=config.data.template, train_on=config.data.train_on)


def _usable(tokens: TokenSet, groups: GroupSet, config: RunConfig) -> TokenSet:
    """Rows that the loss can learn from; DataError where none are left, or where bad rows are an error."""
    tokens = suitable(tokens, config, name=groups.name)
    refused = [*groups.bad, *tokens.bad]
    if refused and config.data.on_bad_row == "error":
        raise DataError(
            f"{len(refused)} rows cannot be used; the first: {refused[0]}",
            todo="Mend or remove them, or set data.on_bad_row=drop.",
        )
    if not tokens.groups:
        first = f"; the first: {refused[0]}" if refused else ""
        raise DataError(
            f"{groups.name}: none of {groups.rows} rows can be used{first}",
            todo="Mend them or give others; `prefopt check` shows what they are like.",
        )
    if refused:
        reasons = Counter(str(row.reason) for row in refused).most_common()
        counted = ", ".join(f"{count} for {reason}" for reason, count in reasons)
        say(f"{groups.name}: {len(refused)} of {groups.rows} rows refused: {counted}")
    for line in unused_columns(feedbacks_of(tokens.groups), config):
        say(f"{groups.name}: {line}")
    if any(facts.needs_mismatched for facts in config.loss.facts):
        try:
            tokens = replace(tokens, groups=with_mismatched(tokens.groups, seed=config.data.seed))
        except DataError as error:
            raise DataError(f"{groups.name}: {error.what}", todo=error.todo) from None
    return tokens
