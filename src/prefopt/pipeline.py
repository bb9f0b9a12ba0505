"""The whole system on one screen: rows -> groups -> tokens -> reference -> training -> run folder.

`train_run` is what `prefopt train` and `DPOTrainer.train` call. Everything it does is one call into a layer.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError, Interrupted, PrefoptError, StorageError
from prefopt.core.facts import loss_facts
from prefopt.core.files import check_writable
from prefopt.core.progress import progress, say
from prefopt.core.run_folder import RunFolder, environment
from prefopt.data.audit import audit
from prefopt.data.encode import TokenSet, fit_budget, token_budget
from prefopt.data.groups import GroupSet
from prefopt.data.splits import load_splits
from prefopt.data.token_cache import cached_encoding
from prefopt.model.engine import LanguageModel
from prefopt.model.load import load_model, load_tokenizer, model_facts
from prefopt.model.reference import LiveReference, Reference, ReferenceCache, fill_cache
from prefopt.objective.apply import Objective
from prefopt.train.checkpoint import load_checkpoint
from prefopt.train.loop import Observer, Training
from prefopt.train.observers import EvaluateHeldOut, LogSteps, SaveCheckpoints, StopOnSignal
from prefopt.train.sinks import Sinks


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
    full = cached_encoding(groups, tokenizer, template=data.template)
    train = _usable(fit_budget(full, budget, on_overlong=data.on_overlong), groups, config)
    held_out = TokenSet(())
    if held is not None:
        held_full = cached_encoding(held, tokenizer, template=data.template)
        held_out = _usable(fit_budget(held_full, budget, on_overlong=data.on_overlong), held, config)
    found = audit(groups, full, budget=budget, on_overlong=data.on_overlong, against=held)
    return Prepared(groups, train, held_out, found)


def _usable(tokens: TokenSet, groups: GroupSet, config: RunConfig) -> TokenSet:
    """Rows that the loss can learn from; DataError where none are left, or where bad rows are an error."""
    facts = loss_facts(config.loss.name)
    wrong = [group for group in tokens.groups if group.feedback.kind not in facts.accepts]
    if wrong:
        raise DataError(
            f'{wrong[0].source}: the loss "{facts.name}" learns from {" or ".join(facts.accepts)} rows, and this is a {wrong[0].feedback.kind} row',
            todo="Turn scored responses into pairs with `prefopt label`, or give rows with chosen and rejected.",
        )
    refused = [*groups.bad, *tokens.bad]
    if refused and config.data.on_bad_row == "error":
        raise DataError(
            f"{len(refused)} rows cannot be used; the first: {refused[0]}",
            todo="Mend or remove them, or set data.on_bad_row=drop.",
        )
    if not tokens.groups:
        first = f"; the first: {refused[0]}" if refused else ""
        raise DataError(
            f"{groups.name}: none of {groups.rows} rows can be used{first}", todo="See `prefopt check` for every reason."
        )
    if refused:
        say(f"{groups.name}: {len(refused)} of {groups.rows} rows refused; `prefopt check` lists them by reason")
    return tokens


def train_run(
    config: RunConfig,
    *,
    model: LanguageModel | None = None,
    reference_model: LanguageModel | None = None,
    train_rows: Any = None,
    eval_rows: Any = None,
    resume: bool = False,
) -> RunFolder:
    """Train as `config` says and return the run folder.

    Objects in memory may stand in for what the config names. With `resume` the newest complete checkpoint of the run
    folder is continued. Raises PrefoptError where anything cannot be right, before the first update where possible.
    """
    run = RunFolder(Path(config.train.output_dir))
    _claim(run, resume=resume)
    source: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    try:  # rows before weights: what is wrong with them is said in seconds
        tokenizer = model.tokenizer if model else load_tokenizer(config.model.name, **source)
        context_tokens = model.context_tokens if model else model_facts(config.model.name, **source).context_tokens
        rows = prepare_rows(config, tokenizer, context_tokens, train_rows=train_rows, eval_rows=eval_rows)
        policy = model or load_model(config.model.name, precision=config.train.precision, for_training=True, **source)
    except PrefoptError:
        with contextlib.suppress(OSError):  # a folder that holds something stays
            run.path.rmdir()
        raise
    if not resume:
        run.write("audit.json", rows.audit)
        run.write("env.json", {**environment(), "device": str(policy.device), "precision": policy.numerics})
        run.write("config.json", config.resolved())
    policy.confirm_sharing(rows.train.groups[:2])  # on the weights as loaded, before they are cast
    training = start_training(config, policy, rows, reference_model=reference_model)
    if resume:
        load_checkpoint(training, run.complete_checkpoints()[-1])
    _watch(config, run, training, rows, resume=resume)
    return run


def _claim(run: RunFolder, *, resume: bool) -> None:
    """Make sure that the run folder can be written and is new, or holds something to resume."""
    has_events = run.events_path.exists()
    if resume and not run.complete_checkpoints():
        raise StorageError(f"{run.path}: has no complete checkpoint to resume from", todo="Start it without --resume.")
    if not resume and has_events and any(event["kind"] == "step" for event in run.events()):
        raise StorageError(f"{run.path}: already holds a run", todo="Go on with --resume, or choose another train.output_dir.")
    check_writable(run.path)
    if not resume and has_events:
        run.events_path.unlink()


def start_training(
    config: RunConfig, policy: LanguageModel, rows: Prepared, *, reference_model: LanguageModel | None = None
) -> Training:
    """The Training of `config` at step 0, with its reference ready."""
    knobs = config.loss.knobs
    own_reference = reference_model is None and config.reference.model is None
    initial = copy.deepcopy(policy.model) if own_reference and config.reference.kind == "live" else None
    training = Training(
        policy=policy,
        groups=rows.train.groups,
        reference=_NoReference(),
        objective=Objective(config.loss.name, knobs),
        config=config.train,
        data_seed=config.data.seed,
        reference_is_initial=own_reference,
    )

    def other() -> LanguageModel:
        if initial is not None:
            from prefopt.model.load import as_language_model

            return as_language_model(
                initial, policy.tokenizer, name=policy.name, dtype=policy.dtype, device=policy.device, for_training=False
            )
        if own_reference:
            return policy
        return reference_model or load_model(str(config.reference.model), precision=config.train.precision)

    training.reference = _reference(config, policy if own_reference else None, other, rows)
    return training


class _NoReference:
    identity = "none"

    def of(self, groups: Any) -> Any:
        raise PrefoptError("The reference was asked before it was made")


def _reference(config: RunConfig, own: LanguageModel | None, load: Callable[[], LanguageModel], rows: Prepared) -> Reference:
    budget = 2 * config.train.micro_batch_tokens
    if config.reference.kind == "live":
        return LiveReference(load(), micro_batch_tokens=budget)
    model = own or load()
    root = Path(config.reference.cache_dir) if config.reference.cache_dir else None
    cache = ReferenceCache(model.identity, model.numerics, root=root)
    fill_cache(cache, [*rows.train.groups, *rows.held_out.groups], lambda: model, micro_batch_tokens=budget)
    return cache


def _watch(config: RunConfig, run: RunFolder, training: Training, rows: Prepared, *, resume: bool) -> None:
    """Run the loop under its observers and write how it began and ended."""
    log = run.log()
    sinks = Sinks(config.train.sinks, run.path, config.resolved())
    held_groups = rows.held_out.groups
    every = config.train.eval_every_steps or max(1, math.ceil(training.total_steps / 4))
    held_out = EvaluateHeldOut(training, held_groups, every, log, sinks) if held_groups else None
    saver = SaveCheckpoints(
        training, run, log, config.train.save_every_steps, config.train.keep_last, held_out if config.train.keep_best else None
    )
    stopper = StopOnSignal(saver, log, f"prefopt train {shlex.quote(str(run.path / 'config.json'))} --resume")
    if resume:
        log.write("resume", step=training.step, path=run.complete_checkpoints()[-1].name)
        if held_out is not None:
            held_out.remember(run.events())
    else:
        log.write("start", step=0, **_start_facts(training))
    started = time.monotonic()
    with progress("training", training.total_steps, "steps") as bar, stopper.listening():
        bar.done = training.step
        observers: list[Observer] = [LogSteps(log, sinks, bar), *([held_out] if held_out else []), saver, stopper]
        try:
            training.run(observers)
        except Interrupted:
            raise
        except PrefoptError as error:
            log.write("error", step=training.step, message=str(error))
            raise
    log.write("end", step=training.step, seconds=round(time.monotonic() - started, 3))


def _start_facts(training: Training) -> dict[str, Any]:
    return {
        "total_steps": training.total_steps,
        "groups": len(training.groups),
        "tokens": sum(group.unique_tokens for group in training.groups),
        "parameters": sum(master.numel() for master in training.optimizer.masters.values()),
        "reference": training.reference.identity,
        "precision": training.policy.numerics,
        "device": str(training.policy.device),
        "prompt_sharing": training.policy.sharing,
    }


def memory_estimate(
    parameters: int, *, dtype_bytes: int, micro_batch_tokens: int, hidden: int, layers: int, vocabulary: int
) -> dict[str, int]:
    """Bytes that training needs, by part: a planning figure, not a bound.

    Activations: about 34 hidden-sized values a token and layer for a decoder with gated MLP and no checkpointing.
    """
    return {
        "weights, fp32 masters": 4 * parameters,
        "compute copy": dtype_bytes * parameters if dtype_bytes < 4 else 0,
        "gradients": 4 * parameters,
        "AdamW moments": 8 * parameters,
        "activations": 34 * hidden * layers * micro_batch_tokens * dtype_bytes,
        "head, one chunk": 3 * 4 * 2**25 + 4 * hidden * vocabulary,
    }
