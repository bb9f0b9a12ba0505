"""AdamW without masters: bf16 weights, gradients and moments, 8 bytes a trained weight instead of 16 to 18."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefopt.core.config import TrainConfig
from prefopt.model.engine import cast_parameters
from prefopt.train.rounding import Noise, piece_numbers, pieces


class Bf16Optimizer:
    """AdamW on the bf16 weights that the model computes with.

    All arithmetic is fp32: weight, moments and gradient are read into fp32, updated as AdamW says (arXiv 1711.05101), and
    each of weight and moments is rounded back stochastically (see `prefopt.train.rounding`), so that what is stored is
    right on average. The second moment needs this as much as the weights: with beta2 = 0.999 it changes by at most 0.1 %
    a step, below the resolution of bf16, and rounded to nearest it would never fall. Its noise is then some 5 %, that of
    a step some 3 %. Gradients of micro-batches are bf16, as the backward pass makes them; their sum is kept in bf16,
    rounded stochastically from the second micro-batch on. The norm and its bound are computed and applied in fp32.

    The random bits are a function of `seed`, optimizer step, micro-batch and weight: seed and step are all the random
    state there is, and both are in `state()`.
    """

    separate = False  # masters and the model's weights are the same tensors

    def __init__(self, model: Any, config: TrainConfig, *, seed: int = 0) -> None:
        cast_parameters(model, torch.bfloat16)
        self.model_parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.masters: dict[str, Tensor] = dict(self.model_parameters)
        self.config = config
        self.steps = 0
        self.noise = Noise(seed, next(iter(self.masters.values())).device)
        self.scale = 1.0
        self.gradients = {name: torch.zeros_like(weight) for name, weight in self.masters.items()}
        self.added = dict.fromkeys(self.masters, 0)  # micro-batches in the gradient of each weight
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight in self.model_parameters.items():
            weight.register_post_accumulate_grad_hook(self._adder(name))

    def table_gradients(self, model: Any) -> dict[Tensor, Tensor]:
        """None: sums of micro-batches are rounded stochastically, which is not what adding in place does."""
        return {}

    def make_moments(self) -> None:
        """Allocate both moments of each weight now, zero."""
        for name, weight in self.masters.items():
            if name not in self.moments:
                self.moments[name] = (torch.zeros_like(weight.detach()), torch.zeros_like(weight.detach()))

    @property
    def moment_bytes(self) -> int:
        """Size of both moments."""
        return 4 * sum(weight.numel() for weight in self.masters.values())

    @property
    def update_bytes(self) -> int:
        """Size of the temporary tensors of an update."""
        largest = max(self.masters.values(), key=Tensor.numel)
        return 24 * min(piece_numbers(largest.device), largest.numel())

    def _adder(self, name: str) -> Any:
        @torch.no_grad()
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total = self.gradients[name]
            if self.added[name] == 0:
                total.copy_(parameter.grad)
            else:
                self.noise.begin("gradient", self.steps, self.added[name], name)
                for part, new in pieces(total, parameter.grad):
                    self.noise.store(part.float().add_(new), part)
            self.added[name] += 1
            parameter.grad = None

        return add

    @torch.no_grad()
    def clip(self) -> float:
        """The global norm of the gradients, in fp32; `step` scales them down to max_grad_norm as it reads them."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients.values()]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        self.scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW update with learning rate `lr`; the gradients are cleared."""
        self.steps += 1
        self.make_moments()
        for name, weight in self.masters.items():
            self.noise.begin("update", self.steps, name)
            for part in pieces(weight.detach(), self.gradients[name], *self.moments[name]):
                self._update(*part, lr=lr, decay=self.config.weight_decay if weight.ndim > 1 else 0.0)
        self.clear()

    def _update(self, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, lr: float, decay: float) -> None:
        beta1, beta2 = self.config.adam_betas
        grad = gradient.float().mul_(self.scale)
        mean = first.float().mul_(beta1).add_(grad, alpha=1 - beta1)
        square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (square / (1 - beta2**self.steps)).sqrt_().add_(self.config.adam_eps)
        new = weight.float().mul_(1 - lr * decay).addcdiv_(mean, size, value=-lr / (1 - beta1**self.steps))
        for values, into in ((new, weight), (mean, first), (square, second)):
            self.noise.store(values, into)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the gradients."""
        self.scale = 1.0
        for name, gradient in self.gradients.items():
            gradient.zero_()
            self.added[name] = 0

    def state(self) -> dict[str, Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` of each weight, bf16, `step`, and `seed` of the random bits."""
        named = {
            f"{kind}.{name}": value
            for name, moments in self.moments.items()
            for kind, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)
        }
        return {**named, "step": torch.tensor(self.steps), "seed": torch.tensor(self.noise.seed)}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Put back weights, moments, step and seed as `state()` gave them."""
        self.steps, self.noise.seed = int(state["step"]), int(state["seed"])
        self.make_moments()
        for name, weight in self.masters.items():
            weight.copy_(weights[name])
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), self.moments[name], strict=True):
                moment.copy_(state[f"{kind}.{name}"])
