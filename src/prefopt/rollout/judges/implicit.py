"""A run's implicit reward, beta * log(policy / reference), as a reward of responses."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.core.errors import ConfigError
from prefopt.core.past_run import run_config
from prefopt.core.progress import silence
from prefopt.model.load import load_model
from prefopt.rollout.prompts import Given
from prefopt.rollout.rewards import RewardFunction
from prefopt.rollout.trained import response_groups

DEFAULT_BETA = 0.1  # of a run whose loss has none


def implicit_reward_of(run: str) -> RewardFunction:
    """A reward function: log(policy / reference) of the whole response with its end of turn, where it came to its end, times
    the beta of the run.

    arXiv 2305.18290 eq. 5 without the term of the prompt alone: only differences between responses to the same prompt mean
    something. Policy: the newest checkpoint of the run folder `run`; reference, beta and template are the run's own.
    ConfigError where `run` is no run folder.
    """
    config = run_config(run)
    if config is None:
        raise ConfigError(
            f'reward: "implicit:{run}" is not a run folder, so its reference is not known',
            todo="Give the train.output_dir of a finished run; prefopt runs lists them.",
        )
    policy, reference = load_model(run), load_model(config.reference.model or config.model.name)
    beta = config.loss.beta or DEFAULT_BETA
    template = config.data.template

    def rewards(prompts: Sequence[Given], responses: Sequence[str], finished: Sequence[bool] | None = None) -> list[float]:
        context = min(policy.context_tokens, reference.context_tokens)
        found = response_groups(
            run, prompts, responses, policy.tokenizer, finished=finished, context_tokens=context, template=template
        )
        with silence():
            ours, theirs = policy.score(found), reference.score(found)
        return [
            beta * float(one.sum(dtype="float64") - other.sum(dtype="float64"))
            for group, its_reference in zip(ours, theirs, strict=True)
            for one, other in zip(group, its_reference, strict=True)
        ]

    return rewards
