"""What a loss is: its facts, its options, and the quantities that a formula may ask for by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["demonstration", "label", "pair", "ranking", "scores"]
Value = float | str | bool

PAIR: tuple[Kind, ...] = ("pair",)
LABELLED: tuple[Kind, ...] = ("label", "pair")
RANKED: tuple[Kind, ...] = ("pair", "ranking", "scores")
ANY: tuple[Kind, ...] = ("demonstration", "label", "pair", "ranking", "scores")


@dataclass(frozen=True, slots=True)
class Input:
    """A quantity that a formula may name as a positional parameter, and what it asks of rows, model and reference.

    `kinds`: rows that have it. `column`: field that every row must have. `live`: needs the reference's whole
    distribution, not only cached log-probs. `mismatched`: needs each response scored under another prompt as well.
    `running`: a statistic of a whole step, or one that is carried from step to step. `sampled`: known only of the policy's
    own samples (section rollout). `value_head`: needs a head that predicts the reward to come.
    """

    about: str
    kinds: tuple[Kind, ...]
    reference: bool = False
    column: str = ""
    live: bool = False
    mismatched: bool = False
    running: bool = False
    reward_model: bool = False
    sampled: bool = False
    value_head: bool = False


_RATIO = "log(policy / reference), summed over its scored tokens"


def _both(quantity: str, about: str, **needs: Any) -> dict[str, Input]:
    """The quantity of the chosen and of the rejected response of each pair."""
    return {f"{side}{quantity}_G": Input(f"{side} response: {about}", PAIR, **needs) for side in ("chosen", "rejected")}


def _drawn(about: str, *, value_head: bool = False) -> Input:
    return Input(about, ("scores",), sampled=True, value_head=value_head)


_SAMPLED = {
    "logp_N": _drawn("each scored token: log-prob of the policy"),
    "old_logp_N": _drawn("each scored token: log-prob of the policy that drew it; no gradient"),
    "advantage_N": _drawn("each scored token: its advantage; no gradient"),
    "value_N": _drawn("each scored token: value of what is before it, by the value head", value_head=True),
    "old_value_N": _drawn("each scored token: value when it was drawn; no gradient", value_head=True),
    "return_N": _drawn("each scored token: advantage plus old value; no gradient", value_head=True),
    "sampled_logp_S": _drawn("each response: log-prob of the policy, summed over its scored tokens"),
    "old_logp_S": _drawn("each response: log-prob of the policy that drew it; no gradient"),
    "advantage_S": _drawn("each response: its advantage, the mean over its scored tokens; no gradient"),
}

INPUTS: dict[str, Input] = {
    **_both("", _RATIO, reference=True),
    **_both("_logp", "log-prob of the policy, summed over its scored tokens"),
    **_both("_mean_logp", "log-prob of the policy, averaged over its scored tokens"),
    **_both("_reference", "log-prob of the reference, summed over its scored tokens", reference=True),
    **_both("_tokens", "count of scored tokens"),
    **_both("_kl", "KL(reference || policy) of the next token, summed over its scored tokens", reference=True, live=True),
    **_both("_score", "score of the reward model", reward_model=True),
    "margin_G": Input("the row's margin", PAIR, column="margin"),
    "offset_G": Input("the row's margin, 0 where it has none", PAIR),
    "probability_G": Input("the row's probability that chosen is better", PAIR, column="probability"),
    "tie_G": Input("1 where the row is a tie, else 0", PAIR),
    "ratio_S": Input(f"each response: {_RATIO}", LABELLED, reference=True),
    "desirable_S": Input("True for desirable responses (label true, or chosen)", LABELLED),
    "kl": Input(
        "mean log(policy / reference) of the step's responses under other prompts, by the weights of their rows, at least 0; no gradient",
        LABELLED,
        reference=True,
        mismatched=True,
    ),
    "reward_mean": Input(
        "running mean of beta * log(policy / reference) over all responses so far; no gradient",
        LABELLED,
        reference=True,
        running=True,
    ),
    "step_margin": Input(
        "mean log-ratio difference of the step's pairs, by the weights of their rows; no gradient",
        PAIR,
        reference=True,
        running=True,
    ),
    "margin_mean": Input(
        "moving average over steps of the mean log-ratio difference of pairs; no gradient", PAIR, reference=True, running=True
    ),
    "ranked_GK": Input(f"responses from best to worst, 0 beyond the last one: {_RATIO}", RANKED, reference=True),
    "ranked_score_GK": Input(
        "responses from best to worst, 0 beyond the last one: score of the reward model", RANKED, reward_model=True
    ),
    "present_GK": Input("True where a group has a response of that rank", RANKED),
    "value_GK": Input("the row's scores from best to worst; K - rank where it has a ranking, (1, 0) for pairs", RANKED),
    "best_logp_G": Input("best or only response: log-prob of the policy, summed over its scored tokens", ANY),
    "best_tokens_G": Input("best or only response: count of scored tokens", ANY),
    **_both("_mean_log_complement", "log(1 - probability under the policy), averaged over its scored tokens"),
    **_SAMPLED,
}


@dataclass(frozen=True, slots=True)
class Knob:
    """One option of a loss: its default, the range it must lie in, and what it does.

    `only_with`: (other option, value) without which this one would do nothing; setting it then is an error.
    """

    default: Value
    about: str
    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    only_with: tuple[str, Value] | None = None


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts of one loss. `formula` is plain text in the symbols of the docs; `function` is `module:name`.

    `inputs`: the positional parameters of the function, names of INPUTS. `unit`: what its values are averaged over
    within a step: groups, responses, tokens of the best response, every token of all responses, or "step" for a formula that couples all groups of
    the step and whose values belong to none of them. `step_wide`: needs all groups of a step at once.
    `advantage`: how rewards of the policy's samples become advantages, where it is not `estimator`'s default. `strict_order`: tied scores cannot be used. `reduce`: log-ratios are summed or averaged over tokens, or by choice.
    """

    name: str
    title: str
    function: str
    formula: str
    paper: str
    inputs: tuple[str, ...]
    knobs: dict[str, Knob] = field(default_factory=dict)
    reduce: Literal["sum", "mean", "choice"] = "sum"
    unit: Literal["group", "response", "token", "every token", "step"] = "group"
    step_wide: bool = False
    strict_order: bool = False
    advantage: Literal["", "gae", "leave_one_out", "group_normalised"] = ""
    since: str = "0.2"

    @property
    def accepts(self) -> tuple[Kind, ...]:
        """Kinds of rows that it learns from."""
        return tuple(kind for kind in ANY if all(kind in INPUTS[name].kinds for name in self.inputs))

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields that every row must have."""
        return tuple(INPUTS[name].column for name in self.inputs if INPUTS[name].column)

    @property
    def needs_reference(self) -> bool:
        return any(INPUTS[name].reference for name in self.inputs)

    @property
    def needs_live_reference(self) -> bool:
        return any(INPUTS[name].live for name in self.inputs)

    @property
    def needs_mismatched(self) -> bool:
        return any(INPUTS[name].mismatched for name in self.inputs)

    @property
    def trains_reward_model(self) -> bool:
        return any(INPUTS[name].reward_model for name in self.inputs)

    @property
    def needs_samples(self) -> bool:
        return any(INPUTS[name].sampled for name in self.inputs)

    @property
    def estimator(self) -> str:
        """How rewards of samples become advantages: as the loss says, else gae with a value head and leave_one_out without."""
        if self.advantage or not self.needs_samples:
            return self.advantage
        return "gae" if self.needs_value_head else "leave_one_out"

    @property
    def needs_value_head(self) -> bool:
        return any(INPUTS[name].value_head for name in self.inputs)

    @property
    def learns_from_ties(self) -> bool:
        return "tie_G" in self.inputs

    @property
    def implicit_reward(self) -> Literal["ratio", "mean_logp", "logp", "score", "none"]:
        """Which quantity of a response, times beta, is its reward: what accuracy and margins are measured with."""
        if self.trains_reward_model:
            return "score"
        if self.needs_reference:
            return "ratio"
        if any("mean_logp" in name for name in self.inputs):
            return "mean_logp"
        return "logp" if any(name.startswith("chosen_logp") for name in self.inputs) else "none"
