"""A run that learns from the policy's own samples: its prompts, its reward, and its Training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.checks import steps_per_round
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, DataError
from prefopt.core.progress import say
from prefopt.data.groups import Feedback, GroupSet
from prefopt.data.splits import load_held_out
from prefopt.data.tokens import Experience, TokenGroup, TokenSet
from prefopt.preparing import Prepared, usable_held_out
from prefopt.rollout.experience import Learning
from prefopt.rollout.prompts import Prompt, read_prompts
from prefopt.rollout.rewards import Reward, load_reward
from prefopt.rollout.sample import check_room, tokens_of
from prefopt.train.online import OnlineTraining

_LONGEST = 64  # prompts that stand for all others when memory is planned


@dataclass(frozen=True)
class PreparedPrompts(Prepared):
    """Prompts and a reward in the place of rows; `train` holds rows of the sizes that samples can have, to plan with."""

    prompts: tuple[Prompt, ...]
    reward: Reward

    def training(self, *, run_config: RunConfig, **parts: Any) -> OnlineTraining:
        """The OnlineTraining of `run_config`, at step 0; `parts` are the fields of every Training but its groups."""
        config = run_config
        assert config.rollout is not None
        kind = next((facts.estimator for facts in config.loss.facts if facts.needs_samples), None)
        return OnlineTraining(
            groups=(),
            prompts=self.prompts,
            reward=self.reward,
            learning=Learning(kind, config.rollout),
            steps_per_round=steps_per_round(config),
            folder=Path(config.train.output_dir) / "rollouts",
            template=config.data.template,
            **parts,
        )


def prepare_prompts(
    config: RunConfig, tokenizer: Any, context_tokens: int, *, train_rows: Any = None, eval_rows: Any = None
) -> PreparedPrompts:
    """Read the prompts and the reward of `config`; held-out rows are read as for any run.

    ConfigError where rows to train on are given as an object, ModelError where a prompt leaves no room for a response.
    """
    rollout = config.rollout
    assert rollout is not None
    if train_rows is not None:
        raise ConfigError(
            "rows to train on are given, and with rollout the policy learns from its own samples",
            todo="Leave them out, or remove the section rollout.",
        )
    reward = load_reward(rollout.reward)
    prompts = read_prompts(rollout.prompts)
    if rollout.prompts_per_round > len(prompts):
        raise DataError(
            f"{rollout.prompts}: has {len(prompts)} prompts, and rollout.prompts_per_round is {rollout.prompts_per_round}",
            todo=f"Give more prompts, or set rollout.prompts_per_round to at most {len(prompts)}.",
        )
    ids = tokens_of(prompts, tokenizer, template=config.data.template)
    check_room(prompts, ids, context_tokens=context_tokens, max_new_tokens=rollout.max_new_tokens)
    say(
        f"{rollout.prompts}: {len(prompts)} prompts; reward {reward.name}; {rollout.rounds} rounds of {rollout.prompts_per_round}"
    )
    longest = sorted(ids, key=len, reverse=True)[:_LONGEST]
    groups = [_largest(prompt, config) for prompt in longest]
    held = load_held_out(config.data, eval_rows=eval_rows)
    held_out = TokenSet(()) if held is None else usable_held_out(held, config, tokenizer, context_tokens)
    return PreparedPrompts(GroupSet(()), TokenSet(tuple(groups)), held_out, {}, prompts=tuple(prompts), reward=reward)


def _largest(prompt: Any, config: RunConfig) -> TokenGroup:
    """A group of the largest size that samples to this prompt can have in a step."""
    rollout = config.rollout
    assert rollout is not None
    of_pairs = not config.loss.needs_samples and rollout.pairing != "scores"
    count = 2 if of_pairs else rollout.samples_per_prompt
    response = np.resize(prompt, rollout.max_new_tokens).astype(np.int32)
    zeros = tuple(np.zeros(len(response), dtype=np.float32) for _ in range(count))
    group = TokenGroup(
        prompt_ids=prompt,
        response_ids=(response,) * count,
        scored=(np.ones(len(response), dtype=np.bool_),) * count,
        feedback=Feedback("pair") if of_pairs else Feedback("scores", scores=tuple(range(count))),
        source="the longest prompts",
        finished=(True,) * count,
    )
    return replace(group, experience=Experience(zeros, zeros, zeros, zeros, zeros))
