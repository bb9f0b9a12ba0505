"""The quantities that formulas ask for by name (`prefopt.core.losses.facts.INPUTS`), made from log-probs on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prefopt.objective.divergences import divergence_score
from prefopt.objective.measured import Drawn, Measured, Rows
from prefopt.objective.reference_free import log_complement


@dataclass(frozen=True, slots=True)
class Reading:
    """How log-ratios are read from tokens: options that many losses share.

    `reduce`: summed or averaged over tokens. `ld_alpha`: weight of the tokens of a response of a pair beyond the length
    of the shorter one (LD-DPO). `divergence`: which f-divergence stands in for the reverse KL.
    """

    reduce: str = "sum"
    ld_alpha: float = 1.0
    divergence: str = "reverse_kl"
    divergence_alpha: float = 1.0


class Quantities:
    """Quantities of one Measured under one Reading. `running` holds the statistics that are carried between steps."""

    def __init__(self, measured: Measured, reading: Reading, running: Mapping[str, float] | None = None) -> None:
        self.measured = measured
        self.reading = reading
        self.running = running or {}

    def __getitem__(self, name: str) -> Tensor:
        for side, place_G in (("chosen", 0), ("rejected", 1)):
            if name.startswith(side):
                of = _OF_RESPONSE[name.removeprefix(side).removesuffix("_G")]
                return of(self)[self.rows.first_G + place_G]
        return _NAMED[name](self)

    @cached_property
    def rows(self) -> Rows:
        return self.measured.rows

    def per_response(self, values_N: Tensor) -> Tensor:
        """Sum over the scored tokens of each response, shape (S,)."""
        total_S = torch.zeros(len(self.rows.group_S), dtype=values_N.dtype, device=values_N.device)
        return total_S.index_add(0, self.measured.response_N, values_N)

    @cached_property
    def tokens_S(self) -> Tensor:
        return self.per_response(torch.ones_like(self.measured.policy_N))

    @cached_property
    def plain_ratio_S(self) -> Tensor:
        """log(policy / reference) of each response, summed over its tokens, whatever the reading."""
        return self.per_response(self.measured.policy_N - self._reference_N)

    @cached_property
    def ratio_S(self) -> Tensor:
        """The log-ratio as the loss reads it."""
        reading = self.reading
        if reading.ld_alpha != 1.0:
            ratio_S = self.per_response(self._length_weight_N * (self.measured.policy_N - self._reference_N))
        else:
            ratio_S = self.plain_ratio_S
        if reading.divergence != "reverse_kl":
            ratio_S = divergence_score(ratio_S, divergence=reading.divergence, alpha=reading.divergence_alpha)
        return ratio_S / self.tokens_S if reading.reduce == "mean" else ratio_S

    @cached_property
    def logp_S(self) -> Tensor:
        return self.per_response(self.measured.policy_N)

    @cached_property
    def reference_S(self) -> Tensor:
        return self.per_response(self._reference_N)

    @cached_property
    def score_S(self) -> Tensor:
        assert self.measured.score_S is not None, "the model gave no scores"
        return self.measured.score_S

    @cached_property
    def kl_S(self) -> Tensor:
        assert self.measured.kl_N is not None, "the KL of each token was not measured"
        return self.per_response(self.measured.kl_N)

    @cached_property
    def on_policy_weight_G(self) -> Tensor:
        """WPO's weight of each pair (arXiv 2406.11827 eq. 2), no gradient: the product over its two responses of
        exp(mean over tokens of (log-prob - log of the sum of squared probabilities))."""
        assert self.measured.log_square_N is not None, "sums of squared probabilities were not measured"
        aligned_S = self.per_response(self.measured.policy_N.detach() - self.measured.log_square_N) / self.tokens_S
        first_G = self.rows.first_G
        return torch.exp(aligned_S[first_G] + aligned_S[first_G + 1])

    @property
    def drawn(self) -> Drawn:
        assert self.measured.drawn is not None, "the loss needs samples of the policy and got rows"
        return self.measured.drawn

    @cached_property
    def value_N(self) -> Tensor:
        assert self.measured.value_N is not None, "the policy has no value head"
        return self.measured.value_N

    @property
    def _reference_N(self) -> Tensor:
        assert self.measured.reference_N is not None, "the loss needs a reference and got none"
        return self.measured.reference_N

    @property
    def _length_weight_N(self) -> Tensor:
        """1 for tokens within the length of the pair's shorter response, `ld_alpha` beyond."""
        first_G = self.rows.first_G
        shared_G = torch.minimum(self.tokens_S[first_G], self.tokens_S[first_G + 1])
        response_N = self.measured.response_N
        start_S = torch.cumsum(self.tokens_S, 0) - self.tokens_S
        place_N = torch.arange(len(response_N), device=response_N.device) - start_S[response_N]
        beyond_N = place_N >= shared_G[self.rows.group_S[response_N]]
        return torch.where(beyond_N, self.reading.ld_alpha, 1.0).to(self.measured.policy_N.dtype)

    @cached_property
    def present_GK(self) -> Tensor:
        return self.rows.order_GK >= 0

    def ranked(self, values_S: Tensor) -> Tensor:
        """Values of responses from best to worst, shape (G, K), 0 beyond the last one."""
        return values_S[self.rows.order_GK.clamp(min=0)].masked_fill(~self.present_GK, 0.0)

    def best(self, values_S: Tensor) -> Tensor:
        """Values of the best response of each group, shape (G,)."""
        return values_S[self.rows.order_GK[:, 0]]

    def carried(self, name: str) -> Tensor:
        """A running statistic as a tensor without gradient."""
        return self.measured.policy_N.new_full((), self.running[name])

    @property
    def step_margin(self) -> Tensor:
        """Mean log-ratio difference of the pairs, by the weights of their rows; 0 where all weigh nothing."""
        margin_G, weight_G = (self["chosen_G"] - self["rejected_G"]).detach(), self.rows.weight_G
        return (margin_G * weight_G).sum() / weight_G.sum().clamp(min=torch.finfo(weight_G.dtype).tiny)

    @property
    def mismatched_kl(self) -> Tensor:
        assert self.measured.mismatch is not None, "mismatched prompts were not measured"
        like = self.measured.policy_N
        return like.new_full((), max(0.0, self.measured.mismatch))


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "the samples were drawn without a value head"
    return value


_Of = Callable[[Quantities], Tensor]

_OF_RESPONSE: dict[str, _Of] = {
    "": lambda q: q.ratio_S,
    "_logp": lambda q: q.logp_S,
    "_mean_logp": lambda q: q.logp_S / q.tokens_S,
    "_reference": lambda q: q.reference_S,
    "_tokens": lambda q: q.tokens_S,
    "_kl": lambda q: q.kl_S,
    "_score": lambda q: q.score_S,
    "_mean_log_complement": lambda q: q.per_response(log_complement(q.measured.policy_N)) / q.tokens_S,
}

_NAMED: dict[str, _Of] = {
    "margin_G": lambda q: q.rows.margin_G,
    "offset_G": lambda q: q.rows.margin_G,
    "probability_G": lambda q: q.rows.probability_G,
    "tie_G": lambda q: q.rows.tie_G,
    "ratio_S": lambda q: q.ratio_S,
    "desirable_S": lambda q: q.rows.target_S > 0.5,
    "kl": lambda q: q.mismatched_kl,
    "reward_mean": lambda q: q.carried("reward_mean"),
    "step_margin": lambda q: q.step_margin,
    "margin_mean": lambda q: q.carried("margin_mean"),
    "ranked_GK": lambda q: q.ranked(q.ratio_S),
    "ranked_score_GK": lambda q: q.ranked(q.score_S),
    "present_GK": lambda q: q.present_GK,
    "value_GK": lambda q: q.ranked(q.rows.target_S),
    "best_logp_G": lambda q: q.best(q.logp_S),
    "best_tokens_G": lambda q: q.best(q.tokens_S),
    "logp_N": lambda q: q.measured.policy_N,
    "old_logp_N": lambda q: q.drawn.old_logp_N,
    "advantage_N": lambda q: q.drawn.advantage_N,
    "value_N": lambda q: q.value_N,
    "old_value_N": lambda q: _known(q.drawn.old_value_N),
    "return_N": lambda q: _known(q.drawn.return_N),
    "sampled_logp_S": lambda q: q.logp_S,
    "old_logp_S": lambda q: q.per_response(q.drawn.old_logp_N),
    "advantage_S": lambda q: q.per_response(q.drawn.advantage_N) / q.tokens_S,
}
