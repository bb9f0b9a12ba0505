"""A reward as a judge."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.core.errors import ConfigError
from prefopt.rollout.judges.verdict import Verdict, winner_of
from prefopt.rollout.prompts import Given
from prefopt.rollout.rewards import Reward


class RewardJudge:
    """The response with the higher reward wins; rewards within `tolerance` of each other are a tie."""

    sees_order = False

    def __init__(self, reward: Reward, *, tolerance: float = 0.0, name: str = "") -> None:
        if not 0 <= tolerance < float("inf"):
            raise ConfigError(
                f"tolerance: found {tolerance}", todo="It is a number from 0 on: scores closer than it are a tie."
            )
        self.reward = reward
        self.tolerance = tolerance
        self.name = name or f"reward:{reward.name}"

    def compare(self, prompts: Sequence[Given], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        """See `prefopt.rollout.judges.verdict.Judge`. Both responses of all comparisons are scored in one call."""
        together = [prompt for prompt in prompts for _ in range(2)]
        flat = [response for pair in zip(first, second, strict=True) for response in pair]
        scores = self.reward(together, flat)
        margins = [one - other for one, other in zip(scores[::2], scores[1::2], strict=True)]
        return [Verdict(winner_of(margin, self.tolerance), margin=margin) for margin in margins]
