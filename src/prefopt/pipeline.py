"""The whole system on one screen: rows -> groups -> tokens -> reference -> training -> run folder.

`train_run` is what `prefopt train` and `DPOTrainer.train` call. Everything it does is one call into a layer.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.core.checks import check_reference_given, sync_every_steps
from prefopt.core.config import RunConfig
from prefopt.core.errors import Interrupted, PrefoptError, StorageError
from prefopt.core.events import EventLog
from prefopt.core.files import check_writable
from prefopt.core.progress import progress, say
from prefopt.core.run_folder import RunFolder, environment
from prefopt.data.mismatch import Counterparts
from prefopt.data.tokens import JoinedRows, TokenGroup, lengths_of
from prefopt.model.adapters import add_lora
from prefopt.model.allocator import release_freed_memory
from prefopt.model.compiled import compile_layers
from prefopt.model.engine import LanguageModel
from prefopt.model.load import as_language_model, load_model, load_reward_model, load_tokenizer, model_config, model_facts
from prefopt.model.paths import confirm
from prefopt.model.precision import matmul_flops, pick_device
from prefopt.model.reference import AdapterOffReference, LiveReference, NoReference, Reference, ReferenceCache, fill_cache
from prefopt.objective.apply import Objective
from prefopt.online import PreparedPrompts, prepare_prompts
from prefopt.preparing import Prepared, prepare_rows
from prefopt.rollout.experience import DrawnReference, Round
from prefopt.train.checkpoint import load_checkpoint
from prefopt.train.loop import Observer, Training
from prefopt.train.moving_reference import MovingReference
from prefopt.train.observers import EvaluateHeldOut, LogSteps, SaveCheckpoints, StopOnSignal
from prefopt.train.online import OnlineTraining
from prefopt.train.plan import FIRST_TRIED, Machine, fitting_budget
from prefopt.train.requirements import check_machine
from prefopt.train.sinks import Sinks


def prepare(
    config: RunConfig, tokenizer: Any, context_tokens: int, *, train_rows: Any = None, eval_rows: Any = None
) -> Prepared:
    """The rows of `config`, or with rollout its prompts; `train_rows` and `eval_rows` stand in for data.train and data.eval."""
    if config.rollout is None:
        return prepare_rows(config, tokenizer, context_tokens, train_rows=train_rows, eval_rows=eval_rows)
    return prepare_prompts(config, tokenizer, context_tokens, train_rows=train_rows, eval_rows=eval_rows)


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
        rows = prepare(config, tokenizer, context_tokens, train_rows=train_rows, eval_rows=eval_rows)
        config = _with_budget(config, run, rows, model, resume=resume)
        policy = model or _load_policy(config, source)
    except PrefoptError:
        with contextlib.suppress(OSError):  # a folder that holds something stays
            run.path.rmdir()
        raise
    if not resume:
        if rows.audit:
            run.write("audit.json", rows.audit)
        run.write("env.json", {**environment(), "device": str(policy.device), "precision": policy.numerics})
        run.write("config.json", config.resolved())
    policy.confirm_sharing(rows.train.groups[:2])  # on the weights as loaded, before they are cast
    training = start_training(config, policy, rows, reference_model=reference_model)
    if resume:
        load_checkpoint(training, run.complete_checkpoints()[-1])
    if isinstance(training, OnlineTraining):
        training.forget_rounds_after(training.step if resume else -1)
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
    objective = Objective(config.loss.resolved())
    if objective.needs_value_head:
        policy.add_value_head()
    parts: dict[str, Any] = {
        "policy": policy,
        "reference": NoReference(),
        "objective": objective,
        "config": config.train,
        "data_seed": config.data.seed,
        "by_prompt": config.data.by_prompt,
        "reference_is_initial": own_reference and kind != "none",
    }
    training = (
        rows.training(run_config=config, **parts)
        if isinstance(rows, PreparedPrompts)
        else Training(groups=rows.train.groups, **parts)
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
        reference = _reference(config, other, rows)
        still = config.rollout is not None and not isinstance(reference, MovingReference)
        training.reference = DrawnReference(reference) if still else reference
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
            mix = settings.sync_mix or (0.6 if config.rollout is None else 1.0)
            return MovingReference(model, micro_batch_tokens=budget, mix=mix, every=sync_every_steps(config))
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
    if isinstance(training, OnlineTraining):
        training.on_round = lambda number, made: _log_round(log, sinks, training.step, number, made)
        training.saved_step = lambda: _newest_step(run)
    started = time.monotonic()
    with progress("training", training.total_steps, "steps") as bar, stopper.listening():
        bar.done = training.step
        observers: list[Observer] = [LogSteps(log, sinks, bar), *([held_out] if held_out else []), saver, stopper]
        try:
            training.run(observers)
            if _newest_step(run) != training.step:  # it ended before its last step
                saver.save()
        except Interrupted:
            raise
        except PrefoptError as error:
            log.write("error", step=training.step, message=str(error))
            raise
    log.write("end", step=training.step, seconds=round(time.monotonic() - started, 3))


def _newest_step(run: RunFolder) -> int:
    """Optimizer step of the newest complete checkpoint; 0 without one."""
    found = run.complete_checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _log_round(log: EventLog, sinks: Sinks, step: int, number: int, made: Round) -> None:
    log.write("round", step=step, round=number, **made.metrics, shown=list(made.shown))
    sinks.log(made.metrics, step)
    reward, kl = made.metrics["objective/scores"], made.metrics["objective/kl"]
    say(f"round {number + 1}: mean reward {reward:.4f}, {kl:.2f} nats from the reference")


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
