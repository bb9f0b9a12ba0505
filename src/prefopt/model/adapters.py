"""LoRA: a low-rank adapter on the linear layers of a policy, which itself stays a transformers model.

A target computes W x + alpha / r * B A x with A of shape (r, in) and B of shape (out, r). A is random and B starts
at 0, so that the policy starts as its base to the bit. arXiv 2106.09685; the layers are peft's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from prefopt.core.config import LoraConfig
from prefopt.core.errors import ConfigError, ModelError, nearest
from prefopt.core.files import digest
from prefopt.core.progress import say
from prefopt.model.engine import LanguageModel
from prefopt.model.fused import fuse
from prefopt.model.quantized import packed_names, plain_weight, quantized_layers

_NAME = "default"  # peft's name of the only adapter
_LINEAR = (torch.nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, with W of shape (in, out)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The LoRA adapter of a policy.

    `targets`: names of the adapted layers. `base`: where the base was loaded from, an absolute folder or a Hub id, and
    "" for a model made in memory; `revision`: its commit on the Hub. `unrounded`: fp32 copies of the frozen weights
    that the compute dtype cannot hold, kept on the CPU where merged weights will be saved.
    """

    config: LoraConfig
    targets: tuple[str, ...]
    base: str
    revision: str | None
    unrounded: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.config.alpha / self.config.r


def add_lora(model: LanguageModel, config: LoraConfig, *, seed: int = 0) -> None:
    """Put an adapter into `model` in place and freeze everything else. A is drawn from `seed`, B is 0.

    Call it on fp32 weights, before they are cast and before their optimizer is made. Raises ConfigError for targets
    that are not there, are not linear layers, or are the output head; ModelError where there is an adapter already.
    """
    if model.adapter is not None or hasattr(model.model, "peft_config"):
        raise ModelError(f"{model.name}: carries an adapter already", todo="Load its base, or merge the adapter first.")
    targets = target_layers(model, config.targets)
    base, revision = _origin(model.model)
    adapter = Adapter(config, targets, base, revision, _unrounded(model) if config.save == "merged" else {})
    _inject(model, adapter)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _layers(model):
            weight = layer.lora_A[_NAME].weight
            fresh = torch.empty(weight.shape)
            torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=random)  # peft's, but from a seed of our own
            weight.copy_(fresh)
    model.adapter = adapter
    model.fused = fuse(model.model)
    trained = sum(parameter.numel() for parameter in model.model.parameters() if parameter.requires_grad)
    ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    say(f"{model.name}: LoRA of rank {config.r} on {len(targets)} layers ({ends}), {trained / 1e6:.2f} M weights train")
    if config.save == "merged" and model.quantized:
        say(f"{model.name}: merged checkpoints hold its base brought back from {model.quantized} to fp32")
    if config.save == "adapter" and not base:
        say(f"{model.name}: was made in memory; checkpoints of this run hold an adapter without the name of its base")


def target_layers(model: LanguageModel, wanted: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names of the linear layers that `wanted` (all-linear, or names and ends of names) reaches, in the model's order."""
    modules: dict[str, Any] = dict(model.model.named_modules())
    outer = {id(model.model.get_output_embeddings()), id(model.model.get_input_embeddings())}
    inner = [name for name, module in modules.items() if isinstance(module, _LINEAR) and id(module) not in outer]
    ends = sorted({name.rpartition(".")[2] for name in inner})
    known = f"Linear layers of this model: {', '.join(ends)}."
    if wanted == "all-linear":
        if not inner:
            raise ConfigError(
                f"model.lora.targets: {model.name} has no linear layers", todo="Train all weights: model.lora=null."
            )
        return tuple(inner)
    reached: set[str] = set()
    for target in wanted:
        names = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not names:
            raise ConfigError(
                f'model.lora.targets: no module of {model.name} is called "{target}"', todo=f"{nearest(target, ends)}{known}"
            )
        for name in names:
            if id(modules[name]) in outer:
                raise ConfigError(
                    f'model.lora.targets: "{target}" is the output head or the embedding; log-probs are computed from their'
                    " weights directly, so an adapter on them would be ignored",
                    todo=f"Leave it out. {known}",
                )
            if not isinstance(modules[name], _LINEAR):
                raise ConfigError(
                    f'model.lora.targets: "{target}" reaches {name}, a {type(modules[name]).__name__}, and not a linear layer',
                    todo=known,
                )
        reached.update(names)
    return tuple(name for name in modules if name in reached)


def _inject(model: LanguageModel, adapter: Adapter) -> None:
    """Let peft put its layers into the model; ConfigError where it refuses, or takes other layers than were asked for."""
    import peft

    config = adapter.config
    conv = {isinstance(model.model.get_submodule(name), Conv1D) for name in adapter.targets}
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv == {True},
        base_model_name_or_path=adapter.base or None,
        revision=adapter.revision,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings that peft itself derives from the model
            peft.inject_adapter_in_model(settings, model.model, adapter_name=_NAME)
    except ValueError as error:
        raise ConfigError(
            f"model.lora: peft cannot adapt {model.name} ({str(error).splitlines()[0][:200]})",
            todo="Choose other layers with model.lora.targets.",
        ) from error
    adapted = tuple(name for name, _ in _layers(model))
    if adapted != adapter.targets:
        other = sorted(set(adapted) ^ set(adapter.targets))[0]
        raise ConfigError(
            f"model.lora: peft adapts other layers of {model.name} than were asked for, among them {other}",
            todo="Choose the layers of the attention only, for example model.lora.targets=[q_proj,k_proj,v_proj,o_proj].",
        )


def _layers(model: LanguageModel) -> list[tuple[str, Any]]:
    """Name and module of each adapted layer, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.model.named_modules() if isinstance(module, LoraLayer)]


def _origin(model: Any) -> tuple[str, str | None]:
    """Where a transformers model was loaded from: an absolute folder, or a Hub id with its commit."""
    name = str(getattr(model, "name_or_path", "") or "")
    if name and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve()), None
    return name, getattr(model.config, "_commit_hash", None) if name else None


def _unrounded(model: LanguageModel) -> dict[str, Tensor]:
    """fp32 copies, on the CPU, of the weights that the compute dtype rounds: none where the base was saved in that dtype."""
    copies: dict[int, Tensor] = {}
    kept = {}
    packed = packed_names(model.model)
    for name, value in model.model.state_dict(keep_vars=True).items():
        if name not in packed and value.is_floating_point() and not torch.equal(value.to(model.dtype).to(value.dtype), value):
            kept[name] = copies.setdefault(id(value), value.detach().to("cpu", torch.float32, copy=True))
    return kept


def adapter_of(model: LanguageModel) -> Adapter:
    """The adapter of `model`; ModelError where it has none."""
    if model.adapter is None:
        raise ModelError(f"{model.name}: has no LoRA adapter", todo="Set model.lora, for example model.lora.r=16.")
    return model.adapter


@contextmanager
def adapters_off(model: LanguageModel) -> Iterator[None]:
    """Inside the block the policy computes as its base model, to the bit."""
    adapter_of(model)
    layers = [layer for _, layer in _layers(model) if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def seed_dropout(seed: int, step: int, part: int = 0) -> None:
    """Make the dropout from here on a function of `seed`, optimizer step and micro-batch alone.

    A resumed run then draws the same, and so does a second forward of the same micro-batch.
    """
    torch.manual_seed(int(digest("dropout", str(seed), str(step), str(part))[:12], 16))


def lora_identity(model: LanguageModel) -> dict[str, Any]:
    """What must be the same for an adapter to be the same one, as plain values: options, layers and base weights."""
    adapter = adapter_of(model)
    options = {"r": adapter.config.r, "alpha": adapter.config.alpha, "dropout": adapter.config.dropout}
    quantize = {"quantize": f"{model.quantized}-{model.device.type}"} if model.quantized else {}
    return {**options, "targets": sorted(adapter.targets), "base": model.identity, **quantize}


def merged_state(model: LanguageModel, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the plain model with W + alpha / r * B A, in fp32 on the CPU, under its names without an adapter.

    `masters`: the adapter's weights by name in the model. Names that share a weight share it here too.
    """
    adapter = adapter_of(model)
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    packed = packed_names(model.model)
    for name, value in model.model.state_dict(keep_vars=True).items():
        layer, is_base, rest = name.partition(".base_layer.")
        if name in packed or name.partition(".lora_")[0] in adapter.targets:
            continue
        plain = f"{layer}.{rest}" if is_base and layer in adapter.targets else name
        if plain in adapter.unrounded:
            state[plain] = adapter.unrounded[plain]
        else:
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            state[plain] = copies.setdefault(id(value), value.detach().to("cpu", dtype))
    for name, quantized in quantized_layers(model.model).items():
        state[f"{name.removesuffix('.base_layer')}.weight"] = plain_weight(quantized)
    for layer in adapter.targets:
        a_weight, b_weight = (masters[f"{layer}.lora_{part}.{_NAME}.weight"].detach().to("cpu", torch.float32) for part in "AB")
        change = b_weight @ a_weight
        base = model.model.get_submodule(f"{layer}.base_layer")
        transposed = Conv1D in (type(base), getattr(base, "source_cls", None))  # as quantised, W is (out, in) for both kinds
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + (change.T if transposed else change) * adapter.scale
    return state


def adapter_state(masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights `masters` under the names of peft's files."""
    return {_peft_name(name): master.detach().contiguous() for name, master in masters.items()}


def adapter_masters(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of peft's file `state` by name in `model`: what `adapter_state` was given. Others are left out."""
    names = (name for name, parameter in model.model.named_parameters() if parameter.requires_grad)
    return {name: state[_peft_name(name)] for name in names if _peft_name(name) in state}


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{_NAME}.weight', '.weight')}"


def adapter_settings(model: LanguageModel) -> dict[str, Any]:
    """The contents of adapter_config.json, with the name of the base."""
    adapter_of(model)
    settings: dict[str, Any] = model.model.peft_config[_NAME].to_dict()
    plain = {key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in settings.items()}
    return {**plain, "inference_mode": True}


def lora_options(given: Any) -> dict[str, Any]:
    """The section model.lora of a peft.LoraConfig; ConfigError for what it asks that has no counterpart here.

    `targets` is None where `target_modules` is: see `default_targets`.
    """
    import peft

    if type(given) is not peft.LoraConfig:
        raise ConfigError(f"peft_config is a {type(given).__name__}", todo="Give a peft.LoraConfig.")
    # fan_in_fan_out follows from the layer here; the others are bookkeeping of files.
    free = {"r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out"}
    free |= {"peft_version", "auto_mapping", "base_model_name_or_path", "revision"}
    default = peft.LoraConfig(task_type="CAUSAL_LM" if given.task_type else None)
    for key, value in vars(given).items():
        if key not in free and value != getattr(default, key, None):
            raise ConfigError(
                f"peft_config.{key} is {value!r}, and there is no such option here",
                todo=f"Leave it at {getattr(default, key, None)!r}.",
            )
    targets = given.target_modules
    if isinstance(targets, str) and targets.lower() != "all-linear":
        raise ConfigError(
            f"peft_config.target_modules is the regular expression {targets!r}", todo='Give a list of names, or "all-linear".'
        )
    named = targets.lower() if isinstance(targets, str) else targets and sorted(targets)
    return {"r": given.r, "alpha": given.lora_alpha, "dropout": given.lora_dropout, "targets": named}


def default_targets(architecture: str) -> list[str]:
    """The layers that peft adapts in models of this `model_type` where none are named; ConfigError where it knows none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if architecture not in KNOWN:
        raise ConfigError(
            f'peft_config.target_modules is not set, and peft has no default for the architecture "{architecture}"',
            todo='Set it, for example to "all-linear".',
        )
    return list(KNOWN[architecture])
