"""Facts of the losses of a chosen and a rejected response that need no reference."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts
from prefopt.core.losses.knobs import beta

FACTS = (
    LossFacts(
        name="simpo",
        title="Simple Preference Optimization: the mean log-prob of a token is the reward",
        function="prefopt.objective.reference_free:simpo",
        formula="-log sigmoid(beta (mean log-prob of chosen - mean log-prob of rejected) - gamma)",
        paper="arXiv 2405.14734, eq. 6",
        inputs=("chosen_mean_logp_G", "rejected_mean_logp_G"),
        knobs={
            **beta(
                2.0,
                "reward per nat and token; 2 to 2.5 in the paper: an average over tokens is small, so this is about 20 times"
                " dpo's",
            ),
            "gamma": Knob(
                1.0,
                "by how much the reward of chosen should be larger, in reward; 0.3 to 1.6 in the paper. Implementations that"
                " scale the margin by beta call gamma / beta their option",
                low=0.0,
            ),
        },
    ),
    LossFacts(
        name="cpo",
        title="Contrastive Preference Optimization",
        function="prefopt.objective.reference_free:cpo",
        formula="-log sigmoid(beta (log-prob of chosen - log-prob of rejected)) - alpha (mean log-prob of chosen)",
        paper="arXiv 2401.08417, eq. 3 and 4; the second term there is summed over tokens, here averaged over the response's",
        inputs=("chosen_logp_G", "rejected_logp_G", "chosen_tokens_G"),
        knobs={
            **beta(0.1, "reward per nat of the log-prob; the paper's value, as for dpo, whose reference is left out"),
            "alpha": Knob(
                1.0,
                "weight of the chosen response's negative log-likelihood per token; 0 leaves the preference term alone, to be"
                " mixed with sft, which averages over all tokens of a step",
                low=0.0,
            ),
        },
    ),
    LossFacts(
        name="orpo",
        title="Odds Ratio Preference Optimization: imitation of chosen and an odds ratio, from one model",
        function="prefopt.objective.reference_free:orpo",
        formula="-a - beta log sigmoid(logit(a) - logit(b)),  a, b = mean log-prob of chosen, of rejected;"
        "  logit(a) = a - log(1 - exp a)",
        paper="arXiv 2403.07691, eq. 6 and 7 (lambda there is beta here)",
        inputs=("chosen_mean_logp_G", "rejected_mean_logp_G"),
        knobs=beta(0.1, "weight of the odds-ratio term beside the imitation of chosen; 0.1 to 0.2 in the paper"),
    ),
    LossFacts(
        name="unlikelihood",
        title="Unlikelihood: imitation of chosen, and each token of rejected made unlikely",
        function="prefopt.objective.reference_free:unlikelihood",
        formula="-(mean log p of chosen's tokens) - alpha (mean log(1 - p) of rejected's tokens)",
        paper="arXiv 1908.04319, eq. 4; the baseline of arXiv 2305.18290, section 6, where log-probs are summed and how the"
        " probability of rejected is minimised is left open",
        inputs=("chosen_mean_logp_G", "rejected_mean_log_complement_G"),
        knobs={
            "alpha": Knob(
                1.0,
                "weight of the unlikelihood term, 1 in arXiv 1908.04319; 0 leaves imitation of chosen alone",
                low=0.0,
                high=1.0,
            ),
        },
    ),
)
