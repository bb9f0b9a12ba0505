"""A reference that follows the policy: TR-DPO's soft and hard updates, and an exponential moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prefopt.model.engine import LanguageModel, cast_parameters
from prefopt.model.reference import LiveReference


class MovingReference(LiveReference):
    """A live reference moved to `mix * policy + (1 - mix) * reference` after every `every` optimizer steps.

    mix 1 is the hard and mix < 1 the soft update of TR-DPO (arXiv 2404.09656 eq. 4 and 5); every step with a small mix
    is an exponential moving average of decay 1 - mix. Its weights are kept in fp32, whatever dtype it computes in, and
    are part of every checkpoint: give it a model as loaded, in fp32, which is cast to its compute dtype here.
    """

    def __init__(self, model: LanguageModel, *, micro_batch_tokens: int, mix: float, every: int) -> None:
        super().__init__(model, micro_batch_tokens=micro_batch_tokens)
        self.mix = mix
        self.every = every
        self.identity = f"{self.identity}-moving-{mix:g}-every-{every}"
        named = dict(model.model.named_parameters())
        self.weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in named.items()}
        self.computing: dict[str, Tensor] = {}
        if model.dtype != torch.float32:
            self.weights = {name: weight.clone().float() for name, weight in self.weights.items()}
            cast_parameters(model.model, model.dtype)
            self.computing = {name: parameter.detach() for name, parameter in named.items()}

    @torch.no_grad()
    def follow(self, step: int, policy: Mapping[str, Tensor]) -> bool:
        """Move towards the trained weights `policy` where optimizer step `step` (from 1) is one to move at; whether it did."""
        if step % self.every:
            return False
        for name, weight in self.weights.items():
            weight.lerp_(policy[name].detach().to(weight), self.mix)
        self._to_compute()
        return True

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put back the weights of a checkpoint."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        self._to_compute()

    def _to_compute(self) -> None:
        for name, compute in self.computing.items():
            compute.copy_(self.weights[name])
