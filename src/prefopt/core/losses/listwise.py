"""Facts of the losses of K ranked or scored responses against a reference. With two responses each of them is dpo."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts
from prefopt.core.losses.knobs import beta

_RANKED = ("ranked_GK", "present_GK")
_SCORED = ("ranked_GK", "value_GK", "present_GK")
_AS_FOR_DPO = beta(0.1, "price of KL, in reward per nat; as for dpo, which this is with two responses")

FACTS = (
    LossFacts(
        name="plackett_luce",
        title="DPO of a whole ranking (Plackett-Luce): the best wins against all, the second against the rest, and so on",
        function="prefopt.objective.listwise:plackett_luce",
        formula="- sum over ranks k of log(exp(beta r_k) / sum over j >= k of exp(beta r_j)),  r_k = log-ratio of rank k",
        paper="arXiv 2305.18290, appendix A.3, eq. 20",
        inputs=_RANKED,
        knobs=_AS_FOR_DPO,
        strict_order=True,
    ),
    LossFacts(
        name="all_pairs",
        title="DPO of all ordered pairs of a group, as a weighted mean",
        function="prefopt.objective.listwise:all_pairs",
        formula="- sum of w_ij log sigmoid(beta (r_i - r_j)) / sum of w_ij  over i better than j,  r = log-ratio",
        paper="uniform: the pairs of arXiv 2203.02155, eq. 1; lambda: the weights of LiPO-lambda, arXiv 2402.01878",
        inputs=_SCORED,
        knobs={
            **_AS_FOR_DPO,
            "weighting": Knob(
                "uniform",
                "what a pair counts within its group. uniform: the same; gap: its difference of scores; lambda:"
                " |2^score_i - 2^score_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, rank under the policy's log-ratios."
                " Equal scores count nothing",
                choices=("uniform", "gap", "lambda"),
            ),
        },
    ),
    LossFacts(
        name="best_of_k",
        title="Softmax-DPO: the best response against all others at once",
        function="prefopt.objective.listwise:best_of_k",
        formula="-log sigmoid(-log sum over worse j of exp(beta (r_j - r_best))),  r = log-ratio; the mean over equally best ones",
        paper="arXiv 2406.09215, the S-DPO loss",
        inputs=_SCORED,
        knobs=_AS_FOR_DPO,
    ),
)
