"""Losses of a reward model: `*_score` is its score of a response, in nats of log-odds that it is the better one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prefopt.objective.listwise import better, lead, mean_of_pairs


def reward(chosen_score_G: Tensor, rejected_score_G: Tensor, offset_G: Tensor, *, centering: float = 0.01) -> Tensor:
    """Bradley-Terry loss of each pair, shape (G,), in nats. ln 2 where both scores and the margin are 0.

    `offset_G` is the row's margin, by which the scores should differ at least (arXiv 2307.09288 eq. 2), 0 without one.
    Only differences of scores count in this term; `centering` holds the scores near 0 (arXiv 2312.09244 eq. 2).
    """
    preference_G = -F.logsigmoid(chosen_score_G - rejected_score_G - offset_G)
    return preference_G + centering * (chosen_score_G + rejected_score_G) ** 2


def reward_ranking(ranked_score_GK: Tensor, value_GK: Tensor, present_GK: Tensor, *, centering: float = 0.01) -> Tensor:
    """Mean Bradley-Terry loss of the pairs of a group with a better and a worse response, shape (G,), in nats.

    arXiv 2203.02155 eq. 1: all K (K - 1) / 2 pairs of a prompt, as one example. Equal values say nothing. For K = 2 it is
    `reward` without a margin; 0 where all values are equal.
    """
    preference_GKK = -F.logsigmoid(-lead(ranked_score_GK))
    sum_GKK = ranked_score_GK[:, None, :] + ranked_score_GK[:, :, None]
    weight_GKK = better(value_GK, present_GK).to(ranked_score_GK.dtype)
    return mean_of_pairs(preference_GKK + centering * sum_GKK**2, weight_GKK)
