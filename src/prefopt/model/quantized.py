"""Frozen linear layers in 4 or 8 bits under a LoRA adapter (QLoRA, arXiv 2305.14314), through transformers and bitsandbytes.

What is held: nf4, blocks of 64 weights in 4-bit NormalFloat, their scales in 8 bits with an fp32 scale for each 256 of
them, 4.13 bits a weight; int8, one fp32 scale for each row. Embedding, output head, norms and biases stay as they are,
and so do the experts of transformers' mixture models, which are no linear layers.

How it computes: each product takes the weight brought back to the compute dtype (QLoRA's equation 5), in forward and in
backward. bitsandbytes' own int8 product also rounds activations to 8 bits, with columns that depend on what else is in the
batch, and on a CPU computes something else in training than in evaluation: the policy would differ from its own
reference, and results would depend on how a step falls into micro-batches. Here they do not.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from prefopt.core.packages import needed


def bitsandbytes_of(kind: str) -> Any:
    """The module bitsandbytes; ConfigError where it is missing."""
    return needed("bitsandbytes", extra="memory", option=f"model.quantize={kind}")


def loading_options(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' from_pretrained takes to load a model in `kind`, nf4 or int8, layer by layer onto `device`."""
    import transformers

    bitsandbytes_of(kind)
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": config, "device_map": {"": device}}


class _Product(torch.autograd.Function):
    """x W^T + b with a frozen weight that exists in the compute dtype only while it is multiplied."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, layer.dequantized(inputs.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        gradient: Tensor = grads[0]
        return gradient @ ctx.layer.dequantized(gradient.dtype) if ctx.needs_input_grad[0] else None, None


class _Frozen:
    """In front of a linear layer of bitsandbytes: the product above instead of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is computed with, shape (out, in)."""
        weight: Any = self.weight  # type: ignore[attr-defined]
        if weight.dtype == torch.int8:
            scale = self.state.SCB if weight.SCB is None else weight.SCB  # type: ignore[attr-defined]
            codes: Tensor = weight.data
            return codes.float().mul_(scale[:, None] / 127).to(dtype)
        state = copy.copy(weight.quant_state)
        state.dtype = dtype
        shape, numbers = state.shape, math.prod(state.shape)
        if numbers % state.blocksize == 0:  # a block a row: its kernel for AVX-512 takes a block that two rows share for two
            state.shape = torch.Size((numbers // state.blocksize, state.blocksize))
        found: Tensor = bitsandbytes_of("nf4").functional.dequantize_4bit(weight.data, state)
        return found.reshape(shape)


_KINDS: dict[type, type] = {}


def _frozen(kind: type) -> type:
    """The class that is a `kind` of bitsandbytes and computes as _Frozen; the same one at every call."""
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Frozen{kind.__name__}", (_Frozen, kind), {})
    return _KINDS[kind]


def compute_by_dequantizing(model: Any, kind: str) -> None:
    """Make the quantised layers of a transformers model compute as said above."""
    layers = bitsandbytes_of(kind).nn
    for module in model.modules():
        if type(module) in (layers.Linear4bit, layers.Linear8bitLt):
            module.__class__ = _frozen(type(module))
            if kind == "int8":
                module.weight.CB = None  # its codes a second time, which a copy of the model would hold


def quantized_layers(model: Any) -> dict[str, Any]:
    """The quantised layers of a transformers model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Frozen)}


def packed_names(model: Any) -> set[str]:
    """Names in the model's state that belong to quantised weights: codes, scales and their bookkeeping, and no biases."""
    layers = quantized_layers(model).items()
    return {f"{name}.{key}" for name, layer in layers for key in layer.state_dict() if key != "bias"}


def plain_weight(layer: Any) -> Tensor:
    """fp32 weight of a quantised layer on the CPU, in the shape that its plain layer had."""
    weight: Tensor = layer.dequantized(torch.float32).to("cpu")
    return weight.T.contiguous() if issubclass(layer.source_cls, Conv1D) else weight


def plain_config(config: Any) -> Any:
    """A copy of a transformers configuration that says nothing of quantisation."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


@torch.no_grad()
def dequantized_model(model: Any) -> Any:
    """A plain fp32 model, on the CPU, with the weights that the quantised `model` computes with."""
    state = {name: value for name, value in model.state_dict().items() if name not in packed_names(model)}
    state |= {f"{name}.weight": plain_weight(layer) for name, layer in quantized_layers(model).items()}
    plain = type(model)(plain_config(model.config)).float()
    plain.load_state_dict(state)
    plain.name_or_path = model.name_or_path
    return plain.eval()


class _Counted(torch.nn.Linear):
    """Stands for a quantised layer where memory is counted: its products take what the real ones take."""

    kind: str

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.out_features, self.in_features
        if self.kind == "int8":
            return torch.empty(rows, columns, device=self.weight.device).mul_(1).to(dtype)
        return torch.empty(rows, columns, dtype=dtype, device=self.weight.device)


def count_as_quantized(model: Any, names: tuple[str, ...], kind: str) -> tuple[int, int]:
    """Make the linear layers `names` of a model without weights take the memory of quantised ones.

    Returns (weights in them, bytes that they are held in).
    """
    numbers = held = 0
    for name in names:
        module: Any = model.get_submodule(name)
        turned = isinstance(module, Conv1D)
        rows, columns = module.weight.T.shape if turned else module.weight.shape
        if turned:
            module.in_features, module.out_features = columns, rows
        module.__class__ = _Counted
        module.kind = kind
        numbers += rows * columns
        blocks = -(-rows * columns // 64)
        held += rows * columns // 2 + blocks + 4 * -(-blocks // 256) if kind == "nf4" else rows * columns + 4 * rows
    return numbers, held
