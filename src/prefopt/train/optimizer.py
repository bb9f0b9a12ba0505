"""AdamW on fp32 masters, whatever dtype the model computes in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prefopt.core.config import TrainConfig
from prefopt.model.engine import cast_parameters


class MasterOptimizer:
    """fp32 weights, fp32 gradients and AdamW's two moments. In bf16 compute the model holds a rounded copy.

    A bf16 weight loses updates below 1/256 of its size, which is all of them at common learning rates; so updates go
    to the masters, and gradients of micro-batches are added up in fp32.
    """

    def __init__(self, model: Any, config: TrainConfig, dtype: torch.dtype) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.model_parameters = named
        self.max_grad_norm = config.max_grad_norm
        if dtype == torch.float32:
            self.masters: dict[str, Tensor] = dict(named)
        else:
            self.masters = {name: parameter.detach().clone().float() for name, parameter in named.items()}
            cast_parameters(model, dtype)
            for name, parameter in named.items():
                self.masters[name].grad = torch.zeros_like(self.masters[name])
                parameter.register_post_accumulate_grad_hook(self._adder(self.masters[name]))
        self.separate = dtype != torch.float32
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        plain = [master for master in self.masters.values() if master.ndim <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.adam_betas,
            eps=config.adam_eps,
            fused=True,
        )

    @staticmethod
    def _adder(master: Tensor) -> Any:
        def add(parameter: Tensor) -> None:
            assert master.grad is not None and parameter.grad is not None
            master.grad.add_(parameter.grad)
            parameter.grad = None

        return add

    def clip(self) -> float:
        """Scale the gradients down to max_grad_norm and return their global norm before that."""
        return float(torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.max_grad_norm))

    def step(self, lr: float) -> None:
        """One AdamW update with learning rate `lr`; the gradients are cleared."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.clear()
        self.copy_to_model()

    def clear(self) -> None:
        """Forget the gradients."""
        for master in self.masters.values():
            if self.separate and master.grad is not None:
                master.grad.zero_()
            else:
                master.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model's weights; nothing to do in fp32."""
        if self.separate:
            torch._foreach_copy_(list(self.model_parameters.values()), list(self.masters.values()))

    def state(self) -> dict[str, Tensor]:
        """AdamW's state by weight name, as named in the model: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        return {
            f"{kind}.{name}": value
            for name, master in self.masters.items()
            for kind, value in self.adam.state.get(master, {}).items()
        }

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Put back masters and AdamW's state as `state()` gave them."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[master] = {kind: state[f"{kind}.{name}"].to(master.device).clone() for kind in kinds}
        self.copy_to_model()


def learning_rate(step: int, *, total: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule."""
    warmup = round(total * config.warmup_fraction)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
