"""The facts of a loss in words and as JSON: what `prefopt losses` and the docs show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefopt.core.losses.facts import INPUTS, Input, Kind, Knob, LossFacts

FAMILIES = (
    "pairs, against a reference",
    "pairs, without a reference",
    "desirable and undesirable responses",
    "K ranked or scored responses",
    "demonstrations",
    "a reward model",
    "the policy's own samples, by their rewards",
)

KINDS: dict[Kind, str] = {
    "demonstration": "demonstrations",
    "label": "labelled responses",
    "pair": "pairs",
    "ranking": "rankings",
    "scores": "scored responses",
}

MIXES = (
    "A weighted sum of several is an objective too: loss={dpo: 1, sft: 0.2, beta: 0.1}. A loss of your own is"
    " module:function of the quantities in prefopt losses --inputs."
)

SHAPES = (
    "The end of a name is its shape: _G one value a row, _S one a response, _GK one for each place of a ranking from best"
    " to worst, _N one a scored token, no ending one number for the whole step. Log-probs and log-ratios are in nats."
)


def family(facts: LossFacts) -> str:
    """What the loss learns from, one of FAMILIES."""
    pairs_with, pairs_without, labelled, ranked, demonstrations, reward_model, samples = FAMILIES
    if facts.needs_samples:
        return samples
    if facts.trains_reward_model:
        return reward_model
    for kind, name in (("demonstration", demonstrations), ("label", labelled), ("ranking", ranked)):
        if kind in facts.accepts:
            return name
    return pairs_with if facts.needs_reference else pairs_without


def by_family(losses: Iterable[LossFacts]) -> dict[str, list[LossFacts]]:
    """The losses of each family that has some, in the order of FAMILIES."""
    known = list(losses)
    return {name: found for name in FAMILIES if (found := [facts for facts in known if family(facts) == name])}


def either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def kinds_text(kinds: Sequence[Kind]) -> str:
    """`pairs, rankings or scored responses`."""
    return either([KINDS[kind] for kind in kinds])


def accepts_text(facts: LossFacts) -> str:
    """Rows that it learns from."""
    return kinds_text(facts.accepts) + (", ties too" if facts.learns_from_ties else "")


def needs_text(facts: LossFacts) -> str:
    """What it asks for besides the log-probs of the policy, in one line."""
    needs = ["a reference" if facts.needs_reference else "no reference"]
    if facts.needs_samples:
        needs = ["prompts and a reward (section rollout); a reference for the KL penalty"]
    if facts.needs_value_head:
        needs.append("a value head, which the policy is given")
    if facts.trains_reward_model:
        needs.append("a model with a head for one score, which any language model is given")
    return "; ".join([*needs, *extra_needs(facts)])


def extra_needs(facts: LossFacts) -> list[str]:
    """What sets it apart from the other losses of its family."""
    needs = ["the reference in memory, for its whole distribution at each token"] if facts.needs_live_reference else []
    needs += [f"a column {column}" for column in facts.columns]
    if facts.needs_mismatched:
        needs.append("responses scored under other prompts as well")
    if facts.strict_order:
        needs.append("rows without equal scores")
    return needs


_RATIOS = {"chosen_G", "ratio_S", "ranked_GK"}


def tokens_text(facts: LossFacts) -> str:
    """Whether what it compares is summed or averaged over the tokens of a response."""
    if facts.trains_reward_model:
        return "one score a response, read at its last token"
    if facts.unit == "every token":
        return "each token by itself"
    if facts.implicit_reward == "mean_logp":
        return "log-probs averaged over the tokens of a response"
    quantity = "log-ratios" if _RATIOS & set(facts.inputs) else "log-probs"
    how = {"sum": "summed", "mean": "averaged", "choice": "summed or averaged (loss.reduce)"}[facts.reduce]
    return f"{quantity} {how} over the tokens of a response"


def unit_text(facts: LossFacts) -> str:
    """What the loss of a step is a mean of."""
    group = "pairs" if facts.accepts == ("pair",) else "rows"
    return {
        "group": f"{group} of a step, by their weights",
        "response": "responses of a step, by the weights of their rows; a pair counts as two",
        "token": "all imitated tokens of a step, so that every token counts the same",
        "every token": "all tokens of all samples of a step, so that every token counts the same",
        "step": "quantiles of a step; its values belong to no row",
    }[facts.unit]


def coupling_text(facts: LossFacts) -> str:
    """Whether the rows of a step are seen together."""
    if facts.step_wide:
        return "all rows of a step at once"
    return "each row by itself" + (", beside one KL of the whole step" if facts.needs_mismatched else "")


def reward_text(facts: LossFacts) -> str:
    """What accuracy and margins are measured with."""
    beta = "beta * " if "beta" in facts.knobs else ""
    return {
        "ratio": f"{beta}log(policy / reference)",
        "mean_logp": f"{beta}mean log-prob of a token",
        "logp": f"{beta}log-prob",
        "score": "the model's score",
        "none": "none: no accuracy and no margins",
    }[facts.implicit_reward]


def range_text(knob: Knob) -> str:
    """Values that an option takes: `above 0`, `0 to 0.5`, `js or alpha`."""
    if knob.choices:
        return either(knob.choices)
    if isinstance(knob.default, bool):
        return "true or false"
    if isinstance(knob.default, str):
        return "text"
    low, high = f"{knob.low:g}", f"{knob.high:g}"
    if math.isinf(knob.low) and math.isinf(knob.high):
        return "any number"
    if math.isinf(knob.high):
        return f"above {low}" if knob.low_open else f"at least {low}"
    if math.isinf(knob.low):
        return f"below {high}" if knob.high_open else f"at most {high}"
    return f"{'above ' if knob.low_open else ''}{low} to {'below ' if knob.high_open else ''}{high}"


def default_text(knob: Knob) -> str:
    """The default as one would type it."""
    if isinstance(knob.default, bool):
        return str(knob.default).lower()
    return f"{knob.default:g}" if isinstance(knob.default, float) else str(knob.default)


def knob_text(knob: Knob) -> str:
    """What an option does, with what it depends on."""
    if knob.only_with is None:
        return knob.about
    other, wanted = knob.only_with
    return f"{knob.about}; only with loss.{other}={wanted}"


def inputs_by_kinds() -> dict[tuple[Kind, ...], dict[str, Input]]:
    """The quantities that a formula may ask for, by the rows that have them."""
    found: dict[tuple[Kind, ...], dict[str, Input]] = {}
    for name, quantity in INPUTS.items():
        found.setdefault(quantity.kinds, {})[name] = quantity
    return found


def input_text(quantity: Input) -> str:
    """What a quantity needs besides rows of its kinds; "" where nothing."""
    needs = []
    if quantity.live:
        needs.append("a reference in memory")
    elif quantity.reference:
        needs.append("a reference")
    if quantity.column:
        needs.append(f'a column "{quantity.column}"')
    if quantity.mismatched:
        needs.append("other prompts")
    if quantity.running:
        needs.append("the whole step")
    if quantity.reward_model:
        needs.append("a reward model")
    if quantity.sampled:
        needs.append("the policy's own samples")
    if quantity.value_head:
        needs.append("a value head")
    return ", ".join(needs)


_DERIVED = (
    *("accepts", "columns", "needs_reference", "needs_live_reference", "needs_mismatched"),
    *("trains_reward_model", "needs_samples", "needs_value_head", "estimator", "learns_from_ties", "implicit_reward"),
)


def facts_json(facts: LossFacts) -> dict[str, Any]:
    """All facts of a loss as plain JSON values, those that follow from its inputs too; an open end of a range is null."""
    values = {**asdict(facts), **{name: getattr(facts, name) for name in _DERIVED}, "learns_from": family(facts)}
    plain: dict[str, Any] = _plain(values)
    return plain


def inputs_json() -> list[dict[str, Any]]:
    """All quantities that a formula may ask for, as plain JSON values."""
    return [{"name": name, **_plain(asdict(quantity))} for name, quantity in INPUTS.items()]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isinf(value) else value
