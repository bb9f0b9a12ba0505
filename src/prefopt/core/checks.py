"""Combinations of options that cannot be right: refused before any row or weight is read, saying what would work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prefopt.core.errors import ConfigError
from prefopt.core.losses.facts import Kind
from prefopt.core.losses.table import LOSSES
from prefopt.core.rollout_checks import check_rollout

if TYPE_CHECKING:
    from prefopt.core.config import RunConfig

SYNC_EVERY_STEPS = 512  # TR-DPO's, where reference.sync_every_steps is not set

_KIND_OF_SHAPE: dict[str, Kind] = {
    "pair": "pair",
    "transcripts": "pair",
    "label": "label",
    "scores": "scores",
    "ranking": "ranking",
    "demonstration": "demonstration",
}


def check_combinations(config: RunConfig) -> None:
    """ConfigError where two options contradict each other, or one would be ignored."""
    _check_held_out(config)
    _check_loss(config)
    _check_reference(config)
    if config.train.max_steps is not None:
        check_reference_moves(config, config.train.max_steps)
    _check_adapter(config)
    _check_memory_options(config)
    check_rollout(config)


def check_reference_moves(config: RunConfig, total_steps: int) -> None:
    """ConfigError where a run of `total_steps` ends before reference.kind=tr-dpo would move the reference for the first time."""
    every = sync_every_steps(config)
    if config.reference_kind == "tr-dpo" and every >= total_steps:
        raise ConfigError(
            f"reference.kind=tr-dpo moves the reference every {every} steps (reference.sync_every_steps), and the run has {total_steps}: it would stay where it is",
            todo=f"Set reference.sync_every_steps below {total_steps}, or use reference.kind=live.",
        )


def sync_every_steps(config: RunConfig) -> int:
    """Optimizer steps between two moves of a tr-dpo reference: as set, else those of a round, else TR-DPO's own."""
    if config.reference.sync_every_steps is not None:
        return config.reference.sync_every_steps
    return SYNC_EVERY_STEPS if config.rollout is None else steps_per_round(config)


def steps_per_round(config: RunConfig) -> int:
    """Optimizer steps of a round of sampling; with replay each earlier round has as many."""
    assert config.rollout is not None
    rollout = config.rollout
    answered = rollout.prompts_per_round * rollout.epochs_per_round * (1 + rollout.replay_rounds)
    return math.ceil(answered / config.train.groups_per_step)


def check_reference_given(config: RunConfig) -> None:
    """ConfigError where a reference given as an object in memory would be ignored."""
    if config.reference.model is not None:
        why, todo = "and so is reference.model", "Give one of them."
    elif not config.loss.needs_reference and config.rollout is None:
        why, todo = f'and the loss "{config.loss.title}" uses no reference', "Leave it out."
    elif config.reference_kind == "adapter-off":
        why, todo = "and reference.kind is adapter-off: the policy without its adapter", "Leave one of them out."
    else:
        return
    raise ConfigError(f"a reference model is given, {why}", todo=todo)


def accepted_kinds(config: RunConfig) -> tuple[Kind, ...]:
    """Kinds of rows that every part of the loss learns from."""
    first, *others = config.loss.facts
    return tuple(kind for kind in first.accepts if all(kind in facts.accepts for facts in others))


def losses_for(kind: Kind) -> str:
    """Names of the losses that learn from rows of `kind`."""
    return ", ".join(facts.name for facts in LOSSES.values() if kind in facts.accepts and not facts.needs_samples)


def _check_held_out(config: RunConfig) -> None:
    if config.data.eval is not None and config.data.eval_rows:
        raise ConfigError(
            "data.eval and data.eval_rows are both set: held-out rows come from one of them",
            todo="Remove data.eval_rows to use the file, or data.eval to draw from data.train.",
        )
    has_eval = config.data.eval is not None or config.data.eval_rows > 0
    for option, is_set in (("keep_best", config.train.keep_best), ("eval_every_steps", config.train.eval_every_steps)):
        if is_set and not has_eval:
            raise ConfigError(
                f"train.{option} is set and there are no held-out rows",
                todo=f"Set data.eval=FILE or data.eval_rows=200, or remove train.{option}.",
            )


def _check_loss(config: RunConfig) -> None:
    title = config.loss.title
    rewarding = [facts.trains_reward_model for facts in config.loss.facts]
    if any(rewarding) and not all(rewarding):
        raise ConfigError(
            f'loss: "{title}" mixes the loss of a reward model with that of a policy',
            todo="Train the reward model in a run of its own.",
        )
    kinds = accepted_kinds(config)
    if not kinds:
        each = "; ".join(f"{facts.name} learns from {' or '.join(facts.accepts)} rows" for facts in config.loss.facts)
        raise ConfigError(f'loss: no kind of row serves all parts of "{title}": {each}', todo="Mix losses of the same rows.")
    kind = _KIND_OF_SHAPE.get(config.data.shape)
    if kind is not None and kind not in kinds:
        raise ConfigError(
            f'data.shape={config.data.shape} gives {kind} rows, and the loss "{title}" learns from {" or ".join(kinds)} rows',
            todo=f"Losses for {kind} rows: {losses_for(kind)}.",
        )
    if any(rewarding) and config.data.train_on != "all":
        raise ConfigError(
            f"data.train_on={config.data.train_on} is set, and a reward model scores whole responses",
            todo="Remove data.train_on.",
        )


def _check_reference(config: RunConfig) -> None:
    reference, title, kind = config.reference, config.loss.title, config.reference_kind
    if not config.loss.needs_reference and config.rollout is None:
        kind_set = None if reference.kind in ("auto", "none") else reference.kind
        for option, value in {"kind": kind_set, **reference.model_dump(exclude={"kind"})}.items():
            if value is not None:
                raise ConfigError(
                    f'reference.{option}={value} is set and the loss "{title}" uses no reference',
                    todo=f"Remove reference.{option}, or choose a loss with a reference: prefopt losses",
                )
    elif kind == "none":
        free = ", ".join(
            facts.name
            for facts in LOSSES.values()
            if not (facts.needs_reference or facts.needs_samples or facts.trains_reward_model)
        )
        raise ConfigError(
            f'reference.kind=none, and the loss "{title}" is defined against a reference',
            todo=f"Remove reference.kind, or use a loss without a reference: {free}.",
        )
    needs_live = any(facts.needs_live_reference for facts in config.loss.facts)
    if kind == "cached" and needs_live:
        raise ConfigError(
            f'reference.kind=cached, and the loss "{title}" needs the reference\'s whole distribution at each token, which is not kept',
            todo="Use reference.kind=live (or adapter-off with LoRA).",
        )
    only = {"cache_dir": "cached", "sync_every_steps": "tr-dpo", "sync_mix": "tr-dpo", "ema_decay": "ema"}
    for option, wanted in only.items():
        if getattr(reference, option) is not None and kind != wanted:
            other = "" if wanted == "cached" and needs_live else f", or use reference.kind={wanted}"
            raise ConfigError(
                f"reference.{option} is set and reference.kind is {kind}: it would be ignored",
                todo=f"Remove reference.{option}{other}.",
            )
    if kind == "adapter-off" and config.model.lora is None:
        raise ConfigError(
            "reference.kind=adapter-off, and no adapter is trained: without one the policy is its own reference",
            todo="Set model.lora, or remove reference.kind.",
        )
    if kind == "adapter-off" and reference.model is not None:
        raise ConfigError(
            "reference.model is set and reference.kind is adapter-off: the reference is the policy without its adapter",
            todo="Remove one of them.",
        )


def _check_adapter(config: RunConfig) -> None:
    if config.model.lora is None:
        return
    if config.reference_kind in ("tr-dpo", "ema"):
        raise ConfigError(
            f"reference.kind={config.reference_kind} moves the reference's weights, and with LoRA the policy has only an adapter to move",
            todo="Remove reference.kind, or train all weights: model.lora=null.",
        )
    if any(facts.trains_reward_model for facts in config.loss.facts):
        raise ConfigError(
            f'model.lora is set, and the loss "{config.loss.title}" trains a reward model, whose new head needs full training',
            todo="Remove model.lora.",
        )


def _check_memory_options(config: RunConfig) -> None:
    train, quantize = config.train, config.model.quantize
    if quantize is not None and config.model.lora is None:
        raise ConfigError(
            f"model.quantize={quantize} is set without model.lora: quantised weights are frozen, so nothing would train",
            todo="Set model.lora, for example model.lora.r=16, or remove model.quantize.",
        )
    if train.optimizer == "adamw_bf16" and train.precision == "fp32":
        raise ConfigError(
            "train.optimizer=adamw_bf16 holds the weights in bf16, and train.precision is fp32",
            todo="Set train.precision=bf16, or use train.optimizer=adamw_8bit, which keeps fp32 weights.",
        )
    if train.offload_activations and train.activation_checkpointing == "selective":
        raise ConfigError(
            "train.offload_activations is set, and train.activation_checkpointing=selective keeps its results where they cannot"
            " be moved from: almost nothing would be offloaded",
            todo="Use train.activation_checkpointing=full or none with it.",
        )
