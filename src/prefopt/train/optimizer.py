"""AdamW on fp32 masters, whatever dtype the model computes in, with moments in fp32 or in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prefopt.core.config import TrainConfig
from prefopt.core.packages import needed
from prefopt.model.engine import cast_parameters
from prefopt.train.bf16_optimizer import Bf16Optimizer


class MasterOptimizer:
    """fp32 weights, fp32 gradients and AdamW's two moments. In bf16 compute the model holds a rounded copy.

    A bf16 weight loses updates below 1/256 of its size, which is all of them at common learning rates; so updates go
    to the masters, and gradients of micro-batches are added up in fp32. Where few weights train (LoRA), their gradients
    stay allocated: made anew between large activations, they would leave gaps that the CPU's allocator cannot fill.
    `own_head`: parameters by name that are trained besides and are no part of the model (a value head).
    """

    def __init__(
        self, model: Any, config: TrainConfig, dtype: torch.dtype, own_head: Mapping[str, torch.nn.Parameter] | None = None
    ) -> None:
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
        self.keeps_gradients = self.separate or any(not parameter.requires_grad for parameter in model.parameters())
        if self.keeps_gradients and not self.separate:
            for master in self.masters.values():
                master.grad = torch.zeros_like(master)
        self.masters |= own_head or {}  # fp32 whatever the model computes in
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        plain = [master for master in self.masters.values() if master.ndim <= 1]
        self.groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.options: dict[str, Any] = {"lr": config.lr, "betas": config.adam_betas, "eps": config.adam_eps}

    @cached_property
    def adam(self) -> Any:
        """The optimizer that makes the update."""
        return torch.optim.AdamW(self.groups, **self.options, fused=True)

    def make_moments(self) -> None:
        """Allocate AdamW's state now, zero: what is made only in the first update lies between that step's activations."""
        for master in self.masters.values():
            if not self.adam.state[master]:
                moments = {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}
                self.adam.state[master] = {"step": torch.zeros((), dtype=torch.float32, device=master.device), **moments}

    @property
    def moment_bytes(self) -> int:
        """Size of both moments."""
        return 8 * sum(master.numel() for master in self.masters.values())

    @property
    def update_bytes(self) -> int:
        """Size of the temporary tensors of an update."""
        return 0

    @staticmethod
    def _adder(master: Tensor) -> Any:
        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:  # None: what the pass had for it went where table_gradients said
                assert master.grad is not None
                master.grad.add_(parameter.grad)
                parameter.grad = None

        return add

    def table_gradients(self, model: Any) -> dict[Tensor, Tensor]:
        """The model's embedding and head weights that train, each with its fp32 gradient, for `gradients_into`; those with
        hooks on their gradient stay with autograd, which calls them."""
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = [module.weight for module in modules if module is not None]
        found: dict[Tensor, Tensor] = {}
        for name, weight in self.model_parameters.items():
            if any(weight is table for table in tables) and not weight._backward_hooks:
                master = self.masters[name]
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                found[weight] = master.grad
        return found

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
            if self.keeps_gradients and master.grad is not None:
                master.grad.zero_()
            else:
                master.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model's weights; nothing to do in fp32."""
        if self.separate:
            masters = [self.masters[name] for name in self.model_parameters]
            torch._foreach_copy_(list(self.model_parameters.values()), masters)

    def state(self) -> dict[str, Tensor]:
        """AdamW's state by weight name, as named in the model: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        return {
            f"{kind}.{name}": value
            for name, master in self.masters.items()
            for kind, value in self.adam.state.get(master, {}).items()
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Put back masters and AdamW's state as `state()` gave them."""
        self.make_moments()
        for name, master in self.masters.items():
            master.copy_(weights[name])
            for kind, value in self.adam.state[master].items():
                value.copy_(state[f"{kind}.{name}"])
        self.copy_to_model()


class EightBitOptimizer(MasterOptimizer):
    """fp32 masters and gradients as above; the moments in 8 bits, by bitsandbytes (arXiv 2110.02861).

    Each block of 256 numbers has its own fp32 scale and a code of 256 levels, finer near 0: 2.03 bytes a weight for both
    moments instead of 8, with a relative error of some per cent. Weights of fewer than 4096 numbers (norms, biases) keep
    fp32 moments. Update and rounding are deterministic.
    """

    @cached_property
    def adam(self) -> Any:
        return needed("bitsandbytes", extra="memory", option="train.optimizer=adamw_8bit").optim.AdamW8bit(
            self.groups, **self.options
        )

    def make_moments(self) -> None:
        for group_number, group in enumerate(self.adam.param_groups):
            for number, master in enumerate(group["params"]):
                if not self.adam.state[master]:
                    self.adam.init_state(group, master, group_number, number)

    @property
    def moment_bytes(self) -> int:
        sizes = [master.numel() for master in self.masters.values()]
        return sum(8 * size if size < _FEWEST_IN_8_BITS else 2 * size + 8 * -(-size // _BLOCK) for size in sizes)

    @property
    def update_bytes(self) -> int:
        """On a CPU bitsandbytes brings both moments of a weight back to fp32, and its gradient and step besides."""
        largest = max(self.masters.values(), key=Tensor.numel)
        return 16 * largest.numel() if largest.device.type == "cpu" else 0

    def state(self) -> dict[str, Tensor]:
        """As above; moments in 8 bits are uint8 codes with `exp_avg_scale.NAME` and `exp_avg_sq_scale.NAME`, one a block."""
        named: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            held = self.adam.state.get(master, {})
            named.update({f"{kind}.{name}": held[key] for kind, key in _EIGHT_BIT_STATE.items() if key in held})
            if held:
                named[f"step.{name}"] = torch.tensor(float(held["step"]))
        return named

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.make_moments()
        for name, master in self.masters.items():
            master.copy_(weights[name])
            held = self.adam.state[master]
            held["step"] = int(state[f"step.{name}"])
            for kind, key in _EIGHT_BIT_STATE.items():
                if key in held:
                    held[key].copy_(state[f"{kind}.{name}"])
        self.copy_to_model()


# bitsandbytes: numbers of a block with one scale, and of the smallest weight whose moments take 8 bits.
_BLOCK, _FEWEST_IN_8_BITS = 256, 4096
_EIGHT_BIT_STATE = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scale": "absmax1", "exp_avg_sq_scale": "absmax2"}

Optimizer = MasterOptimizer | Bf16Optimizer


def make_optimizer(
    model: Any,
    config: TrainConfig,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    own_head: Mapping[str, torch.nn.Parameter] | None = None,
) -> Optimizer:
    """The optimizer of train.optimizer for the weights of `model` that train; `model` is cast to `dtype`.

    `seed`: of adamw_bf16's rounding. `own_head`: see MasterOptimizer; adamw_bf16 has none.
    """
    if config.optimizer == "adamw_bf16":
        return Bf16Optimizer(model, config, seed=seed)
    return (EightBitOptimizer if config.optimizer == "adamw_8bit" else MasterOptimizer)(model, config, dtype, own_head)


def learning_rate(step: int, *, total: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule."""
    warmup = round(total * config.warmup_fraction)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
