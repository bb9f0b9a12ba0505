"""The whole system on one screen: rows -> groups -> tokens -> reference -> training -> run folder.

`train_run` is what `prefopt train` and `DPOTrainer.train` call. Everything it does is one call into a layer.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.core.checks import SYNC_EVERY_STEPS, check_reference_given, check_reference_moves
from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError, Interrupted, PrefoptError, StorageError
from prefopt.core.files import check_writable
from prefopt.core.progress import progress, say
from prefopt.core.run_folder import RunFolder, environment
from prefopt.data.audit import audit
from prefopt.data.budget import fit_budget, token_budget
from prefopt.data.groups import GroupSet
from prefopt.data.mismatch import Counterparts, with_mismatched
from prefopt.data.pack import total_steps
from prefopt.data.splits import load_splits
from prefopt.data.suitable import suitable, unused_columns
from prefopt.data.token_cache import cached_encoding
from prefopt.data.tokens import JoinedRows, TokenGroup, TokenSet, feedbacks_of, lengths_of
from prefopt.model.adapters import add_lora
from prefopt.model.allocator import release_freed_memory
from prefopt.model.compiled import compile_layers
from prefopt.model.engine import LanguageModel
from prefopt.model.load import as_language_model, load_model, load_reward_model, load_tokenizer, model_config, model_facts
from prefopt.model.paths import confirm
from prefopt.model.precision import matmul_flops, pick_device
from prefopt.model.reference import AdapterOffReference, LiveReference, NoReference, Reference, ReferenceCache, fill_cache
from prefopt.objective.apply import Objective
from prefopt.train.checkpoint import load_checkpoint
from prefopt.train.loop import Observer, Training
from prefopt.train.moving_reference import MovingReference
from prefopt.train.observers import EvaluateHeldOut, LogSteps, SaveCheckpoints, StopOnSignal
from prefopt.train.plan import FIRST_TRIED, Machine, fitting_budget
from prefopt.train.requirements import check_machine
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
    full = _encoded(groups, tokenizer, config)
    fitted = fit_budget(full, budget, on_overlong=data.on_overlong)
    train = _usable(fitted, groups, config)
    check_reference_moves(config, steps_of(config, train))
    held_out = TokenSet(())
    if held is not None:
        held_out = _usable(fit_budget(_encoded(held, tokenizer, config), budget, on_overlong=data.on_overlong), held, config)
    for_loss = replace(full, bad=(*full.bad, *train.bad[len(fitted.bad) :]))  # with what the loss has no place for
    found = audit(groups, for_loss, budget=budget, on_overlong=data.on_overlong, against=held)
    return Prepared(groups, train, held_out, found)


def steps_of(config: RunConfig, tokens: TokenSet) -> int:
    train = config.train
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
    check_machine(config, model)
    if reference_model is not None:
        check_reference_given(config)
    run = RunFolder(Path(config.train.output_dir))
    _claim(run, resume=resume)
    source: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    try:  # rows before weights: what is wrong with them is said in seconds
        tokenizer = model.tokenizer if model else load_tokenizer(config.model.name, **source)
        context_tokens = model.context_tokens if model else model_facts(config.model.name, **source).context_tokens
        rows = prepare_rows(config, tokenizer, context_tokens, train_rows=train_rows, eval_rows=eval_rows)
        config = _with_budget(config, run, rows, model, resume=resume)
        policy = model or _load_policy(config, source)
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
    training.matmul_flops = matmul_flops(policy.device, policy.dtype)
    _watch(config, run, training, rows, resume=resume)
    return run


def _with_budget(config: RunConfig, run: RunFolder, rows: Prepared, model: LanguageModel | None, *, resume: bool) -> RunConfig:
    """`config` with train.micro_batch_tokens as a number: that of the run which is resumed, else one that fits."""
    if config.train.micro_batch_tokens != "auto":
        return config
    saved = (run.read("config.json") or {}).get("train", {}).get("micro_batch_tokens") if resume else None
    if not isinstance(saved, int):
        source: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
        architecture = model.model.config if model is not None else model_config(config.model.name, **source)
        held = sum(weight.nbytes for weight in model.model.parameters()) if model is not None else 0
        saved = fitting_budget(config, architecture, rows.train.groups, Machine.here(config, held=held))
        if saved < FIRST_TRIED[pick_device().type]:
            say(f"micro-batches of at most {saved} tokens, which fit into memory; `prefopt plan` says more")
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": saved})})


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


def _load_policy(config: RunConfig, source: dict[str, Any]) -> LanguageModel:
    options: dict[str, Any] = {"precision": config.train.precision, "for_training": True, **source}
    if config.loss.facts[0].trains_reward_model:
        return load_reward_model(config.model.name, **options)
    return load_model(config.model.name, quantize=config.model.quantize, **options)


def start_training(
    config: RunConfig, policy: LanguageModel, rows: Prepared, *, reference_model: LanguageModel | None = None
) -> Training:
    """The Training of `config` at step 0, with its adapter and its reference ready."""
    own_reference = reference_model is None and config.reference.model is None
    kind = config.reference_kind
    moving = kind in ("tr-dpo", "ema")  # its weights stay in fp32 as well
    initial = copy.deepcopy(policy.model) if own_reference and (kind == "live" or moving) else None
    if config.model.lora is not None:
        add_lora(policy, config.model.lora, seed=config.data.seed)
    if config.train.compile:
        compile_layers(policy)
    training = Training(
        policy=policy,
        groups=rows.train.groups,
        reference=NoReference(),
        objective=Objective(config.loss.resolved()),
        config=config.train,
        data_seed=config.data.seed,
        reference_is_initial=own_reference and kind != "none",
    )
    confirm(policy, [min(rows.train.groups[:16], key=lambda group: group.unique_tokens)])  # in the dtype that trains

    def other() -> LanguageModel:
        if initial is not None:
            name, dtype, device = policy.name, policy.dtype, policy.device
            return as_language_model(
                initial,
                policy.tokenizer,
                name=name,
                dtype=dtype,
                device=device,
                for_training=moving,
                quantized=policy.quantized,
            )
        if own_reference:
            return policy
        if reference_model is not None:
            return reference_model
        return load_model(str(config.reference.model), precision=config.train.precision, for_training=moving)

    if kind != "none":
        training.reference = _reference(config, other, rows)
    release_freed_memory()
    training.optimizer.make_moments()
    return training


def _reference(config: RunConfig, load: Callable[[], LanguageModel], rows: Prepared) -> Reference:
    """The reference of the configured kind; `load` gives its model."""
    budget = 2 * config.train.budget_tokens
    model, settings = load(), config.reference
    match config.reference_kind:
        case "adapter-off":
            return AdapterOffReference(model, micro_batch_tokens=budget)
        case "live":
            return LiveReference(model, micro_batch_tokens=budget)
        case "tr-dpo":
            mix, every = settings.sync_mix or 0.6, settings.sync_every_steps or SYNC_EVERY_STEPS
            return MovingReference(model, micro_batch_tokens=budget, mix=mix, every=every)
        case "ema":
            return MovingReference(model, micro_batch_tokens=budget, mix=1 - (settings.ema_decay or 0.99), every=1)
    root = Path(settings.cache_dir) if settings.cache_dir else None
    cache = ReferenceCache(model.identity, model.numerics, root=root)
    parts: list[Sequence[TokenGroup]] = [rows.train.groups, rows.held_out.groups]
    if any(facts.needs_mismatched for facts in config.loss.facts):
        parts += [Counterparts(part) for part in parts]
    fill_cache(cache, JoinedRows(parts), lambda: model, micro_batch_tokens=budget)
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
        if held_out is not None and config.train.eval_at_start:
            held_out.measure(0)
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
        "tokens": int(lengths_of(training.groups).unique_G.sum()),
        "parameters": sum(master.numel() for master in training.optimizer.masters.values()),
        "reference": training.reference.identity,
        "precision": training.policy.numerics,
        "matmul_flops_per_second": training.matmul_flops,
        "device": str(training.policy.device),
        "prompt_sharing": training.policy.sharing,
    }
