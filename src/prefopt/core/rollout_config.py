"""The section `rollout`: a run that learns from the policy's own samples, round after round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefopt.core.section import Section


class RolloutConfig(Section):
    """Each round samples responses of the policy as it is, scores them, and trains on them.

    With a policy-gradient loss (ppo, rloo, grpo) the scores become advantages; with a loss of pairs or of scored responses
    they become preferences (online or iterative DPO), and with sft the best response of each prompt is imitated
    (rejection-sampling fine-tuning).
    """

    prompts: str = Field(description="Prompts to answer: .jsonl with prompt, messages or turns; .txt, one a line.")
    reward: str = Field(
        description="What scores the responses: vader, a check such as min_words:20, a trained reward model as model:PATH, or"
        " module:function of your own (a ground-truth reward)."
    )
    rounds: int = Field(10, ge=1, description="Rounds of sampling and training.")
    prompts_per_round: int = Field(
        64,
        ge=1,
        description="Prompts answered in a round, drawn without replacement from data.seed. As many as train.groups_per_step: on-policy steps.",
    )
    samples_per_prompt: int = Field(
        1, ge=1, description="Responses to each prompt: a group. At least 2 for all losses but those with a value head (ppo)."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest response.")
    temperature: float = Field(1.0, gt=0, description="Of sampling. Policy gradients need samples of the policy itself: 1.")
    epochs_per_round: int = Field(1, ge=1, description="Passes over the samples of a round before new ones are drawn.")
    batch_size: int = Field(64, ge=1, description="Responses in progress at once.")
    kl_coefficient: float = Field(
        0.05,
        ge=0,
        description="Policy gradients: price of KL(policy || reference) in reward per nat, taken off the reward token by token"
        " (ppo) or of the whole response (rloo, grpo). It is beta in arXiv 2305.18290 eq. 3.",
    )
    kl_target: float | None = Field(
        None,
        gt=0,
        description="Policy gradients: nats a response. Set, kl_coefficient is moved towards it after each round (arXiv 1909.08593, section 2.2).",
    )
    kl_horizon: float = Field(
        10_000, gt=0, description="With kl_target: responses over which the coefficient may change by a fifth."
    )
    discount: float = Field(1.0, gt=0, le=1, description="ppo: discount of later rewards, for each token.")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="ppo: lambda of generalised advantage estimation (arXiv 1506.02438 eq. 16)."
    )
    whiten_rewards: bool = Field(
        False,
        description="ppo: divide the rewards of a round, penalties included, by their standard deviation over tokens; their mean stays.",
    )
    normalise_advantages: bool = Field(
        True, description="ppo: advantages of a round get mean 0 and standard deviation 1 over tokens."
    )
    missing_end_penalty: float = Field(
        0.0, ge=0, description="Taken off the score of a response that was cut at max_new_tokens."
    )
    stop_at_kl: float | None = Field(
        None,
        gt=0,
        description="End the run, with a checkpoint, once the samples of a round are this many nats a response from the reference.",
    )
    pairing: Literal["best-worst", "all-pairs", "bradley-terry", "scores"] = Field(
        "best-worst",
        description="Losses of preferences: which rows a prompt's scored responses become. best-worst: one pair; all-pairs: every pair"
        " with different scores; bradley-terry: every pair, the label drawn with probability sigmoid of the difference; scores: one"
        " row of K scored responses, for losses that learn from those, and for sft.",
    )
    replay_rounds: int = Field(
        0, ge=0, description="Losses of preferences: rows of so many earlier rounds are trained on again."
    )
