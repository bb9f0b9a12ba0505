"""Decoder layers through torch.compile: one program for all layers of a kind, with attention left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from prefopt.core.errors import ModelError
from prefopt.model import attention
from prefopt.model.engine import LanguageModel
from prefopt.model.fused import ADAPTERS, COMPILED, MLPS, NORMS, fuse


def compile_layers(model: LanguageModel) -> None:
    """Let the decoder layers of `model` run compiled, with any number of tokens; they are compiled at their first call.

    The compiler fuses norms, rotary embeddings, activations and residual sums, and decides itself what to keep for
    backward, so the project's own fused modules step aside. Values change by rounding: `paths.confirm` compares them, and
    goes back to the layers' own code where the compiler fails or differs. ModelError where the model has no list of layers.
    """
    layers = decoder_layers(model.model)
    if layers is None:
        raise ModelError(
            f"{model.name}: has no list of decoder layers that could be compiled", todo="Leave train.compile at false."
        )
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attention))
    for kind in {NORMS, MLPS, ADAPTERS}.intersection(model.fused.kinds):
        model.fused.remove(kind)
    programs: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        if type(layer) not in programs:
            programs[type(layer)] = torch.compile(type(layer).forward, dynamic=True)
    model.fused.forwards[COMPILED] = [(layer, programs[type(layer)]) for layer in layers]
    model.fused.put_in(COMPILED)


def give_up_compiling(model: LanguageModel) -> None:
    """Back to the layers' own code, with the project's fused modules in it."""
    model.fused.remove(COMPILED)
    model.fused = fuse(model.model)


def decoder_layers(model: Any) -> list[nn.Module] | None:
    """The decoder layers of a transformers model, in order: the one list of modules that is as long as it has layers."""
    wanted = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == wanted]
    return list(lists[0]) if lists else None
