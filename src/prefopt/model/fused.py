"""RMS norms and gated MLPs that keep less for their backward: a model's own modules with another forward.

Written with plain operations, autograd keeps every intermediate: of a gated MLP the gate, its activation, the up projection
and their product. Here only the gate and the up projection are kept; a norm keeps its input and one number a position.
What is dropped is elementwise, so computing it again costs little beside the matrix products. The forward makes the same
operations in the same order as the module's own: its results are equal to the bit, and only the gradients' rounding differs.

A module is recognised by what it computes, not by its name: a small copy with random weights is compared with the fused
form first. Shapes: T positions (any leading ones), D hidden size, I size between gate and down projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.model.low_rank import LowRank, looks_like_lora, lora_forward, low_rank_of
from prefopt.model.tables import embedding_forward, looks_like_embedding

NORMS, MLPS, EMBEDDING, COMPILED = "fused norms", "fused gated MLPs", "direct embedding", "compiled layers"
ADAPTERS = "fused adapters"
_OURS = {__name__, lora_forward.__module__, embedding_forward.__module__}  # where forwards put in here are written
# Each activation with its derivative times a gradient.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu, tanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}
# w * norm(x), as in Llama; the same multiplied before it is rounded, as in OLMo 2; norm(x) * (1 + w) likewise, as in Gemma.
_NORM_FORMS = ("scaled", "scaled in fp32", "one-plus")
_SCALES = torch.logspace(-4, 3, 64)[:, None]  # of probes: a clamp shows at large numbers, an epsilon at small ones


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps), times the weight as `form` says; the norm itself in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, form: str) -> Tensor:
        x32 = x_TD.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        normed = x32 * scale
        ctx.save_for_backward(x_TD, weight_D, scale)
        ctx.form = form
        if form == "scaled":
            return weight_D * normed.to(x_TD.dtype)
        if form == "scaled in fp32":
            return (weight_D * normed).to(x_TD.dtype)
        return (normed * (1.0 + weight_D.float())).type_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, scale = ctx.saved_tensors
        grad = grads[0].float()
        normed = x_TD.float() * scale
        factor = 1.0 + weight_D.float() if ctx.form == "one-plus" else weight_D.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        inner = grad * factor
        inner.sub_(normed.mul_((inner * normed).mean(-1, keepdim=True))).mul_(scale)
        return inner.to(x_TD.dtype), grad_weight, None, None


class _GatedDown(torch.autograd.Function):
    """`act(gate) * up` through the down projection: the product exists only while it is needed."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, weight_DI: Tensor, bias_D: Tensor | None, act: str) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI, weight_DI)
        ctx.act = act
        return F.linear(_ACTIVATIONS[act][0](gate_TI) * up_TI, weight_DI, bias_D)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate_TI, up_TI, weight_DI = ctx.saved_tensors
        grad = grads[0]
        activation, derivative = _ACTIVATIONS[ctx.act]
        active = activation(gate_TI)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = grad.flatten(0, -2).T @ (active * up_TI).flatten(0, -2)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0)
        product = grad @ weight_DI
        grad_up = active.mul_(product)
        return derivative(product.mul_(up_TI), gate_TI), grad_up, grad_weight, grad_bias, None


class _GatedLowRank(torch.autograd.Function):
    """The same where the down projection has a LoRA adapter."""

    @staticmethod
    def forward(
        ctx: Any, gate_TI: Tensor, up_TI: Tensor, a_RI: Tensor, b_DR: Tensor, base: Any, scale: float, act: str
    ) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI, a_RI, b_DR)
        ctx.base, ctx.scale, ctx.act = base, scale, act
        return LowRank(a_RI, b_DR, base, scale).output(_ACTIVATIONS[act][0](gate_TI) * up_TI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate_TI, up_TI, a_RI, b_DR = ctx.saved_tensors
        activation, derivative = _ACTIVATIONS[ctx.act]
        active = activation(gate_TI)
        down = LowRank(a_RI, b_DR, ctx.base, ctx.scale)
        product, grad_a, grad_b = down.gradients(grads[0], active * up_TI, (True, *ctx.needs_input_grad[2:4]))
        assert product is not None
        grad_up = active.mul_(product)
        return derivative(product.mul_(up_TI), gate_TI), grad_up, grad_a, grad_b, None, None, None


class _Gated(torch.autograd.Function):
    """`act(gate) * up` alone, in front of a down projection of another kind."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.act = act
        return _ACTIVATIONS[act][0](gate_TI) * up_TI

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate_TI, up_TI = ctx.saved_tensors
        activation, derivative = _ACTIVATIONS[ctx.act]
        return derivative(grads[0] * up_TI, gate_TI), grads[0] * activation(gate_TI), None


def _norm_forward(form: str) -> Callable[[Any, Tensor], Tensor]:
    apply: Callable[..., Tensor] = _RMSNorm.apply

    def forward(self: Any, x: Tensor) -> Tensor:
        return apply(x, self.weight, _eps(self), form)

    return forward


def _mlp_forward(act: str) -> Callable[[Any, Tensor], Tensor]:
    gated_down: Callable[..., Tensor] = _GatedDown.apply
    gated_low_rank: Callable[..., Tensor] = _GatedLowRank.apply
    gated: Callable[..., Tensor] = _Gated.apply

    def forward(self: Any, x: Tensor) -> Tensor:
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        down = self.down_proj
        if type(down) is nn.Linear and not down._forward_hooks and not down._forward_pre_hooks:
            return gated_down(gate, up, down.weight, down.bias, act)
        if getattr(down.__dict__.get("forward"), "__func__", None) is lora_forward and not down._forward_hooks:
            low_rank = low_rank_of(down, gate.dtype)
            if low_rank is not None:
                return gated_low_rank(gate, up, low_rank.a_RI, low_rank.b_OR, low_rank.base, low_rank.scale, act)
        hidden: Tensor = down(gated(gate, up, act))
        return hidden

    return forward


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _activation(mlp: Any) -> Any:
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def _looks_like_norm(module: nn.Module) -> bool:
    has_eps = isinstance(getattr(module, "variance_epsilon", getattr(module, "eps", None)), float)
    return has_eps and [*module._parameters] == ["weight"] and not module._modules and not module._buffers


def _looks_like_mlp(module: nn.Module) -> bool:
    children = set(module._modules)
    projections = {"gate_proj", "up_proj", "down_proj"} <= children or {"gate_up_proj", "down_proj"} <= children
    has_act = callable(getattr(module, "act_fn", getattr(module, "activation_fn", None)))
    return projections and has_act and not module._parameters and len(children) <= 4


@torch.no_grad()
def _norm_form(module: Any) -> str | None:
    """Which form gives this norm's own results to the bit in fp32 and bf16; None for neither."""
    if module.weight is None or module.weight.ndim != 1:
        return None
    small = copy.copy(module)
    random = torch.Generator().manual_seed(0)
    found = None
    for form in _NORM_FORMS:
        equal = True
        for dtype in (torch.float32, torch.bfloat16):
            small._parameters = {"weight": nn.Parameter(torch.randn(16, generator=random).to(dtype))}
            x = (_SCALES * torch.randn(len(_SCALES), 16, generator=random)).to(dtype)
            equal &= torch.equal(type(module).forward(small, x), _norm_forward(form)(small, x))
        found = form if equal else found
    return found


@torch.no_grad()
def _mlp_activation(module: Any) -> str | None:
    """With which activation the fused form gives this MLP's own results to the bit, on small random projections; None for none."""
    small = copy.copy(module)
    with torch.random.fork_rng(devices=[]):  # loading a model draws nothing from the program's random numbers
        made = {"gate_proj": nn.Linear(8, 12), "up_proj": nn.Linear(8, 12), "gate_up_proj": nn.Linear(8, 24)}
        made["down_proj"] = nn.Linear(12, 8)
    small._modules = {name: made.get(name, child) for name, child in module._modules.items()}
    x = _SCALES * torch.randn(len(_SCALES), 8, generator=torch.Generator().manual_seed(0))
    own = type(module).forward(small, x)
    return next((act for act in _ACTIVATIONS if torch.equal(own, _mlp_forward(act)(small, x))), None)


@dataclass
class FusedModules:
    """The modules of one model whose forward is a fused one, by kind."""

    forwards: dict[str, list[tuple[nn.Module, Callable[..., Tensor]]]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.forwards)

    def put_in(self, kind: str) -> None:
        """Let the modules of `kind` compute the fused way."""
        for module, forward in self.forwards[kind]:
            module.forward = MethodType(forward, module)

    def take_out(self, kind: str) -> None:
        """Let the modules of `kind` compute as their class says."""
        for module, _ in self.forwards[kind]:
            module.__dict__.pop("forward", None)

    @contextmanager
    def without(self, kind: str) -> Iterator[None]:
        """The modules' own forward within the block."""
        self.take_out(kind)
        try:
            yield
        finally:
            self.put_in(kind)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Every module's own forward within the block."""
        with ExitStack() as stack:
            for kind in self.kinds:
                stack.enter_context(self.without(kind))
            yield

    def remove(self, kind: str) -> None:
        """Give `kind` up for good."""
        self.take_out(kind)
        del self.forwards[kind]


def fuse(model: Any) -> FusedModules:
    """Give every norm and gated MLP of `model` that is known to agree its fused forward, in place; the others stay."""
    found: dict[str, list[tuple[nn.Module, Callable[..., Tensor]]]] = {NORMS: [], MLPS: [], ADAPTERS: [], EMBEDDING: []}
    known: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
    for module in model.modules():
        ours = getattr(module.__dict__.get("forward"), "__func__", None)
        if "forward" in module.__dict__ and getattr(ours, "__module__", None) not in _OURS:
            continue  # someone else has replaced it
        module.__dict__.pop("forward", None)
        if looks_like_lora(module):
            found[ADAPTERS].append((module, lora_forward))
            continue
        kind = NORMS if _looks_like_norm(module) else MLPS if _looks_like_mlp(module) else None
        if kind is None:
            continue
        key = (type(module), _eps(module)) if kind == NORMS else (type(module), type(_activation(module)))
        if key not in known:
            known[key] = _fused_forward(kind, module)
        forward = known[key]
        if forward is not None:
            found[kind].append((module, forward))
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is not None and looks_like_embedding(embedding) and "forward" not in embedding.__dict__:
        found[EMBEDDING].append((embedding, embedding_forward))
    fused = FusedModules({kind: modules for kind, modules in found.items() if modules})
    for kind in fused.kinds:
        fused.put_in(kind)
    return fused


def _fused_forward(kind: str, module: nn.Module) -> Callable[..., Tensor] | None:
    try:
        if kind == NORMS:
            form = _norm_form(module)
            return None if form is None else _norm_forward(form)
        act = _mlp_activation(module)
        return None if act is None else _mlp_forward(act)
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
        return None  # it wants other inputs, or computes something else
