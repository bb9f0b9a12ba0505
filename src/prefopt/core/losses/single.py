"""Facts of imitation and of the reward model."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts

_CENTERING = {
    "centering": Knob(
        0.01,
        "weight of (sum of the two scores)^2. Only differences of scores are learnt, so a constant is free to drift; this"
        " holds their mean near 0 and moves differences little (arXiv 2312.09244, eq. 2). 0 leaves it out",
        low=0.0,
    ),
}

FACTS = (
    LossFacts(
        name="sft",
        title="Supervised fine-tuning: imitation of the best, or only, response",
        function="prefopt.objective.demonstrations:sft",
        formula="-log-prob of the response, over all scored tokens of the step that are imitated",
        paper="maximum likelihood; arXiv 2203.02155, step 1. Undesirable responses and ties are not imitated",
        inputs=("best_logp_G",),
        unit="token",
    ),
    LossFacts(
        name="reward",
        title="Reward model from pairs (Bradley-Terry)",
        function="prefopt.objective.reward:reward",
        formula="-log sigmoid(score of chosen - score of rejected - margin) + centering (score of chosen + score of rejected)^2",
        paper="Bradley and Terry 1952; margin: arXiv 2307.09288, eq. 2; centering: arXiv 2312.09244, eq. 2",
        inputs=("chosen_score_G", "rejected_score_G", "offset_G"),
        knobs=_CENTERING,
    ),
    LossFacts(
        name="reward_ranking",
        title="Reward model from rankings or scores: all pairs of a group",
        function="prefopt.objective.reward:reward_ranking",
        formula="mean over i better than j of -log sigmoid(s_i - s_j) + centering (s_i + s_j)^2,  s = score of the model",
        paper="arXiv 2203.02155, eq. 1; centering: arXiv 2312.09244, eq. 2",
        inputs=("ranked_score_GK", "value_GK", "present_GK"),
        knobs=_CENTERING,
    ),
)
