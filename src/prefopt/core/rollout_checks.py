"""Combinations of the section rollout with others that cannot be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.core.errors import ConfigError
from prefopt.core.section import Section

if TYPE_CHECKING:
    from prefopt.core.config import RunConfig
    from prefopt.core.rollout_config import RolloutConfig

_OF_POLICY_GRADIENTS = ("kl_coefficient", "kl_target", "kl_horizon")
_OF_VALUE_HEAD = ("discount", "gae_lambda", "whiten_rewards", "normalise_advantages")
_OF_PREFERENCES = ("pairing", "replay_rounds")


def check_rollout(config: RunConfig) -> None:
    """ConfigError where the loss and the section rollout do not fit together, or an option would be ignored."""
    rollout, title = config.rollout, config.loss.title
    if rollout is None:
        if config.loss.needs_samples:
            raise ConfigError(
                f'the loss "{title}" learns from the policy\'s own samples, and there is no section rollout',
                todo="Set rollout.prompts=FILE and rollout.reward=NAME (for example vader, or model:runs/reward).",
            )
        return
    _check_rows(config)
    _check_ignored(config, rollout)
    if any(facts.trains_reward_model for facts in config.loss.facts):
        raise ConfigError(
            f'rollout is set, and the loss "{title}" trains a reward model, which learns from rows',
            todo="Remove the section rollout.",
        )
    value_head = any(facts.needs_value_head for facts in config.loss.facts)
    if rollout.samples_per_prompt < 2 and not value_head:
        raise ConfigError(
            f'rollout.samples_per_prompt=1, and the loss "{title}" compares the samples of a prompt with each other',
            todo="Set rollout.samples_per_prompt=4, or use loss.name=ppo, which has a value head.",
        )
    _check_policy_gradient(config, rollout, value_head)
    _check_preferences(config, rollout)
    if config.reference.kind in ("cached", "none"):
        raise ConfigError(
            f"reference.kind={config.reference.kind}, and new samples are compared with the reference in each round",
            todo="Use reference.kind=live, or adapter-off with LoRA.",
        )
    if config.model.lora is not None and config.model.lora.dropout > 0:
        raise ConfigError(
            "model.lora.dropout is set with rollout: samples are drawn without dropout, so a step would take another policy for the old one",
            todo="Remove model.lora.dropout.",
        )


def _changed(section: Section, name: str) -> bool:
    """Whether an option differs from its default: a saved configuration names them all."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _check_rows(config: RunConfig) -> None:
    given = [name for name in ("train", "max_rows") if getattr(config.data, name) is not None]
    given += ["eval_rows"] if config.data.eval_rows else []
    if given:
        raise ConfigError(
            f"data.{given[0]} is set, and with rollout the policy learns from its own samples",
            todo=f"Remove data.{given[0]}, or the section rollout. Held-out rows: data.eval.",
        )
    if _changed(config.train, "epochs"):
        raise ConfigError(
            "train.epochs is set, and with rollout the length of a run is rollout.rounds",
            todo="Set rollout.rounds and rollout.epochs_per_round.",
        )


def _check_ignored(config: RunConfig, rollout: RolloutConfig) -> None:
    value_head = any(facts.needs_value_head for facts in config.loss.facts)
    ignored = {
        **dict.fromkeys(_OF_POLICY_GRADIENTS, config.loss.needs_samples),
        **dict.fromkeys(_OF_VALUE_HEAD, value_head),
        **dict.fromkeys(_OF_PREFERENCES, not config.loss.needs_samples),
    }
    for name, used in ignored.items():
        if _changed(rollout, name) and not used:
            raise ConfigError(
                f'rollout.{name} is set, and the loss "{config.loss.title}" does not use it',
                todo=f"Remove rollout.{name}; what each option belongs to: prefopt train --options.",
            )
    if _changed(rollout, "kl_horizon") and rollout.kl_target is None:
        raise ConfigError("rollout.kl_horizon is set without rollout.kl_target", todo="Set rollout.kl_target, or remove it.")


def _check_policy_gradient(config: RunConfig, rollout: RolloutConfig, value_head: bool) -> None:
    if not config.loss.needs_samples:
        return
    if rollout.temperature != 1:
        raise ConfigError(
            f"rollout.temperature={rollout.temperature:g}, and a policy gradient needs samples of the policy itself",
            todo="Remove rollout.temperature.",
        )
    if config.data.eval is not None:
        raise ConfigError(
            f'data.eval is set, and the loss "{config.loss.title}" has no value on rows that the policy did not draw',
            todo="Remove data.eval; prefopt evaluate RUN --pairs FILE measures the run on rows.",
        )
    estimators = {facts.name: facts.estimator for facts in config.loss.facts if facts.needs_samples}
    if len(set(estimators.values())) > 1:
        each = ", ".join(f"{name}: {estimator}" for name, estimator in estimators.items())
        raise ConfigError(
            f'the parts of the loss "{config.loss.title}" make advantages in different ways ({each})',
            todo="Mix losses of one way, or train with one of them.",
        )
    if value_head and config.train.optimizer == "adamw_bf16":
        raise ConfigError(
            "train.optimizer=adamw_bf16 keeps no fp32 weights, which a value head needs",
            todo="Use train.optimizer=adamw or adamw_8bit.",
        )


def _check_preferences(config: RunConfig, rollout: RolloutConfig) -> None:
    if config.loss.needs_samples:
        return
    from prefopt.core.checks import accepted_kinds

    kind = "scores" if rollout.pairing == "scores" else "pair"
    if kind not in accepted_kinds(config):
        raise ConfigError(
            f'rollout.pairing={rollout.pairing} gives {kind} rows, and the loss "{config.loss.title}" learns from'
            f" {' or '.join(accepted_kinds(config))} rows",
            todo="Set rollout.pairing=best-worst for losses of pairs, scores for losses of K responses.",
        )
