"""What the rows, sides and rewards of a run are called: pairs, labelled responses, K responses, demonstrations, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.core.losses.facts import LossFacts
from prefopt.core.losses.table import parts_of_section
from prefopt.report.history import Interval, num, part, percent, percent_spread, plural, spread

_KINDS = {"transcripts": "pair", "scores": "ranking"}  # shapes of rows that are called like another one


@dataclass(frozen=True, slots=True)
class Words:
    """Names for one kind of row.

    `row`: what is counted. `ranked`: what rewards put into order, in the plural. `good`, `other`: the two sides.
    `difference`: what a margin is. `accuracy`, `axis`, `about`: title, axis and caption of the accuracy; `claim` says it
    of held-out rows. `ahead`: what a margin above 0 says. `mix_up`: what may be the wrong way round where accuracy is below chance.
    """

    row: str
    ranked: str
    good: str
    other: str
    difference: str
    accuracy: str
    axis: str
    about: str
    claim: str
    ahead: str
    mix_up: str


_PAIRS = Words(
    row="pair",
    ranked="pairs",
    good="chosen",
    other="rejected",
    difference="chosen minus rejected",
    accuracy="accuracy",
    axis="pairs ranked as labelled",
    about="Share of pairs whose chosen response has the higher {reward}.",
    claim="ranked {share} of held-out pairs as labelled",
    ahead="Pairs right of 0 are ranked as labelled.",
    mix_up="chosen and rejected are swapped",
)
_LABELLED = Words(
    row="response",
    ranked="responses",
    good="desirable",
    other="undesirable",
    difference="desirable minus undesirable",
    accuracy="area under the ROC curve",
    axis="area under the ROC curve",
    about="How likely a desirable response has a higher {reward} than an undesirable one of the same step.",
    claim="put a desirable held-out response above an undesirable one with probability {share}",
    ahead="",
    mix_up="the labels are inverted",
)
_SEVERAL = Words(
    row="prompt",
    ranked="responses",
    good="best",
    other="others",
    difference="best minus the mean of the others",
    accuracy="accuracy",
    axis="comparisons decided as labelled",
    about="Share of comparisons between two responses to a prompt in which the better one has the higher {reward}, mean over prompts.",
    claim="decided {share} of the comparisons between held-out responses as labelled",
    ahead="Right of 0 the best response is ahead of the mean of the others.",
    mix_up="scores or ranks are inverted",
)
_DEMONSTRATIONS = Words(
    row="demonstration",
    ranked="demonstrations",
    good="response",
    other="others",
    difference="",
    accuracy="accuracy",
    axis="",
    about="",
    claim="",
    ahead="",
    mix_up="",
)
_OF_KIND = {"pair": _PAIRS, "label": _LABELLED, "ranking": _SEVERAL, "demonstration": _DEMONSTRATIONS}
_REWARDS = {
    "ratio": "beta times the log-ratio of policy to reference",
    "mean_logp": "beta times the mean log-prob of a token under the policy",
    "logp": "beta times the log-prob under the policy",
    "score": "the model's score of a response",
    "none": "",
}


@dataclass(frozen=True, slots=True)
class Wording:
    """How to speak of one run: `words` of its rows, and what its losses make of them.

    `reward_about`: what the reward of a response is. `imitates`: every part is imitation, so the loss is in nats a token.
    `moving_reference`: the reference follows the policy, so log-ratios and what is made of them start anew.
    """

    words: Words
    reward_about: str
    reward_model: bool
    imitates: bool
    moving_reference: bool

    @property
    def reward(self) -> str:
        return "score" if self.reward_model else "implicit reward"

    @property
    def is_area(self) -> bool:
        """Whether accuracy is an area under a curve, which is not a share of anything that could be counted."""
        return self.words is _LABELLED

    def share(self, value: float) -> str:
        """An accuracy as shown."""
        return num(value) if self.is_area else percent(value)

    def share_spread(self, value: Interval) -> str:
        """The interval of an accuracy as shown."""
        return spread(value) if self.is_area else percent_spread(value)

    def heldout(self, value: Interval) -> str:
        """`held-out accuracy 71.0 % (62.0 to 80.0 %, 240 pairs)`."""
        counted = f", {plural(value[3], self.words.row)}" if value[3] else ""
        return f"held-out {self.words.accuracy} {self.share(value[0])} ({self.share_spread(value)}{counted})"

    def claim(self, value: Interval) -> str:
        """What held-out rows say, to follow a subject."""
        return f"{self.words.claim.format(share=self.share(value[0]))} ({self.share_spread(value)})"


def wording(config: Mapping[str, Any] | None, audit: Mapping[str, Any] | None) -> Wording:
    """The wording of a run with this configuration and audit; that of pairs where neither says what the rows are."""
    facts = [one.facts for one in parts_of_section(part(config, "loss"))]
    imitates = bool(facts) and all(one.unit == "token" for one in facts)
    kind = "demonstration" if imitates else _kind(config, audit, facts)
    rewards = [one.implicit_reward for one in facts if one.implicit_reward != "none"]
    return Wording(
        words=_OF_KIND.get(_KINDS.get(kind, kind), _PAIRS),
        reward_about=_REWARDS[rewards[0] if rewards else "ratio"],
        reward_model=any(one.trains_reward_model for one in facts),
        imitates=imitates,
        moving_reference=part(config, "reference", "kind") in ("tr-dpo", "ema"),
    )


PAIRS = Wording(_PAIRS, _REWARDS["ratio"], reward_model=False, imitates=False, moving_reference=False)


def _kind(config: Mapping[str, Any] | None, audit: Mapping[str, Any] | None, facts: list[LossFacts]) -> str:
    """Kind of the rows by the audit, else as the configuration sets it, else the first that all parts of the loss take."""
    for shape in (part(audit, "shape"), part(config, "data", "shape")):
        if shape and shape != "auto":
            return str(shape)
    kinds = ("pair", "label", "ranking", "scores", "demonstration")
    return next((kind for kind in kinds if all(kind in one.accepts for one in facts)), "pair")
