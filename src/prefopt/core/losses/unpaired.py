"""Facts of the losses of single responses that are desirable or not, against a reference. Pairs count as one of each."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts
from prefopt.core.losses.knobs import beta

_RESPONSES = ("ratio_S", "desirable_S")

_CLASS_WEIGHTS = {
    "desirable_weight": Knob(
        1.0,
        "weight of desirable responses. Where the classes are uneven the paper keeps (weight x count of desirable) :"
        " (weight x count of undesirable) between 1 and 4/3",
        low=0.0,
    ),
    "undesirable_weight": Knob(1.0, "weight of undesirable responses", low=0.0),
}

FACTS = (
    LossFacts(
        name="kto",
        title="Kahneman-Tversky Optimization",
        function="prefopt.objective.unpaired:kto",
        formula="w sigmoid(-beta (r - z)) if desirable, w sigmoid(beta (r - z)) if not,  r = log-ratio,"
        " z = max(0, mean log-ratio under other prompts)",
        paper="arXiv 2402.01306, eq. 8",
        inputs=(*_RESPONSES, "kl"),
        knobs={**beta(0.1, "how fast a gain or a loss saturates, in reward per nat; the paper's default"), **_CLASS_WEIGHTS},
        unit="response",
    ),
    LossFacts(
        name="bco",
        title="Binary Classifier Optimization",
        function="prefopt.objective.unpaired:bco",
        formula="-log sigmoid(beta r - d) if desirable, -log sigmoid(d - beta r) if not,  r = log-ratio,"
        " d = running mean of beta r over all responses",
        paper="arXiv 2404.04656, the loss with reward shift; without its matching of prompt distributions",
        inputs=(*_RESPONSES, "reward_mean"),
        knobs=beta(0.1, "reward per nat, the logit of the classifier; as for dpo, of whose loss this is an upper bound"),
        unit="response",
        step_wide=True,
    ),
    LossFacts(
        name="apo_zero_unpaired",
        title="Anchored Preference Optimization (zero) of single responses",
        function="prefopt.objective.unpaired:apo_zero_unpaired",
        formula="w sigmoid(-beta r) if desirable, w sigmoid(beta r) if not,  r = log-ratio",
        paper="arXiv 2408.06266, eq. 7, each half on its own",
        inputs=_RESPONSES,
        knobs={
            **beta(0.1, "how fast the push away from the reference fades, in reward per nat; as for dpo"),
            **_CLASS_WEIGHTS,
        },
        unit="response",
    ),
)
