"""Models from a folder, the Hub, a GGUF file, or the demo model's name. Safetensors only; no remote code unless asked for.

A folder with a LoRA adapter loads as its base with the adapter merged into it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from prefopt.core.errors import ModelError, PrefoptError
from prefopt.core.progress import say
from prefopt.model.adapter_files import base_of, check_base, is_adapter, merge_adapter, quantization_of
from prefopt.model.allocator import keep_freed_memory
from prefopt.model.demo_model import DEMO_MODELS, demo_model
from prefopt.model.engine import LanguageModel, cast_parameters, weights_identity
from prefopt.model.gguf import converted_gguf
from prefopt.model.padding import set_padding
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.model.quantized import compute_by_dequantizing, dequantized_model, loading_options, quantized_layers
from prefopt.model.reward_model import HEAD_NAMES, RewardModel
from prefopt.model.unloadable import first_line, refuse_missing, unloadable

M = TypeVar("M", bound=LanguageModel)


def load_model(
    name: str,
    *,
    precision: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    for_training: bool = False,
    quantize: str | None = None,
) -> LanguageModel:
    """The LanguageModel called `name`: a folder (also of an adapter or a run), a Hub id, a .gguf file, or a demo model.

    Weights are read as fp32; for inference they are then cast to the compute dtype, with `for_training` they stay. With
    `quantize` (nf4 or int8) its linear layers are quantised as they are read (see `prefopt.model.quantized`).
    Raises ModelError where it cannot be loaded, has non-finite weights, or is no causal language model.
    """
    source = model_folder(name)
    device = pick_device()
    dtype, why = compute_dtype(precision, device)
    _quiet_transformers()
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if quantize is not None:
        return _quantized(name, source, tokenizer, quantize, dtype, device, for_training, origin)
    model = _transformers_model(name, source, **origin)
    say(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {device.type}; {why}")
    return as_language_model(model, tokenizer, name=name, dtype=dtype, device=device, for_training=for_training)


def _quantized(
    name: str,
    source: str,
    tokenizer: Any,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    for_training: bool,
    origin: Mapping[str, Any],
) -> LanguageModel:
    if is_adapter(source):
        raise ModelError(
            f'model.quantize={kind}: "{name}" is an adapter, which would have to be merged into weights before they are quantised',
            todo="Save it with model.lora.save=merged first, or train it without model.quantize.",
        )
    model = _transformers_model(name, source, **origin, **loading_options(kind, dtype, device))
    compute_by_dequantizing(model, kind)
    layers = quantized_layers(model)
    if not layers:
        raise ModelError(f'model.quantize={kind}: "{name}" has no linear layers to quantise', todo="Remove model.quantize.")
    held = model.get_memory_footprint() / 2**30
    say(
        f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {held:.2f} GiB with {len(layers)} layers in {kind}, {device.type}"
    )
    return _in_memory(LanguageModel, model, tokenizer, name, dtype, device, for_training, quantized=kind)


def load_reward_model(
    name: str,
    *,
    precision: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    for_training: bool = False,
    require_trained: bool = False,
) -> RewardModel:
    """The RewardModel called `name`, from what `load_model` takes or from a saved reward model or the run of one.

    From a causal language model: its decoder, with a new head of zeros. Every score is then 0, so the Bradley-Terry loss
    starts at ln 2 exactly, and no result depends on a random head; the head has a gradient at the first step, the decoder
    from the second on. From a saved reward model: everything. Tokenizer and configuration get a padding token that ends
    no response (see `set_padding`). Raises ModelError as `load_model` does, and where `require_trained` meets a model
    without a head.
    """
    source = model_folder(name)
    device = pick_device()
    dtype, why = compute_dtype(precision, device)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, **origin)
    if is_adapter(source):
        model, missing = _classifier_on(_transformers_model(name, source, **origin), name, tokenizer)
    else:
        model, missing = _classifier(name, source, tokenizer, **origin)
    trained = is_reward_model(model.config)
    new = {key for key in missing if key.split(".")[0] in HEAD_NAMES and not trained}
    refuse_missing(name, missing - new, "a reward model" if trained else "a causal language model")
    if new and require_trained:
        raise ModelError(
            f'"{name}" is a language model, not a reward model: it has no weights for {min(new)}',
            todo="Train a reward model with loss.name=reward, and give its run folder or checkpoint.",
        )
    with torch.no_grad():
        for key in new:
            model.get_parameter(key).zero_()
    head = "new head" if new else "reward model"
    say(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {head}, {device.type}; {why}")
    return _in_memory(RewardModel, model, tokenizer, name, dtype, device, for_training)


def is_reward_model(config: Any) -> bool:
    """Whether a transformers configuration is that of a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _transformers_model(name: str, source: str, *, revision: str | None, trust_remote_code: bool, **options: Any) -> Any:
    """The transformers model at `source` in fp32, an adapter merged into its base; `name` is what errors call it.

    `options` go to transformers' from_pretrained.
    """
    if is_adapter(source):
        base, base_revision = base_of(Path(source))
        origin: dict[str, Any] = {"revision": base_revision, "trust_remote_code": trust_remote_code}
        try:
            model = _base_model(base, Path(source), origin)
        except ModelError as error:
            raise ModelError(f'{source}: the base of its adapter, "{base}": {error.what}', todo=error.todo) from error
        model = merge_adapter(model, Path(source))
        model.name_or_path = source  # what is trained on top of it has the merged weights as its base
        say(f"{name}: LoRA adapter merged into {base}")
        return model
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        if is_reward_model(config):  # with tied embeddings no weight would be missing: transformers makes up a vocabulary head
            raise ModelError(
                f'model.name: "{name}" is a reward model ({config.architectures[0]}) and writes no text',
                todo="Give it as --reward-model, or as --reward model:PATH; here a causal language model is needed.",
            )
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except PrefoptError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: this is no model
        raise unloadable(name, error) from error
    model, found = loaded
    refuse_missing(name, found["missing_keys"], "a causal language model")
    return model


def _base_model(base: str, adapter: Path, origin: Mapping[str, Any]) -> Any:
    """The plain fp32 model `base` of the adapter in the folder `adapter`: with quantised weights where it was trained on such.

    An adapter makes up for what quantisation took from its base, so it belongs to the weights as they were computed with.
    """
    kind, device_type = quantization_of(adapter)
    if kind is None:
        return _transformers_model(base, model_folder(base), **origin)
    device = pick_device()
    options = loading_options(kind, torch.float32, device)
    model = _transformers_model(base, model_folder(base), **origin, **options)
    compute_by_dequantizing(model, kind)
    if device_type == device.type:
        check_base(model, adapter)
    else:
        say(f"{adapter}: its base was quantised on {device_type}, and is here on {device.type}, where scales round differently")
    say(f"{base}: brought back from {kind}, the weights that its adapter was trained on")
    return dequantized_model(model)


def _classifier(name: str, source: str, tokenizer: Any, *, revision: str | None, trust_remote_code: bool) -> Any:
    """(sequence classifier at `source` in fp32, the weights that it lacks), sharing one padding token with `tokenizer`."""
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        _prepare_classifier(name, config, tokenizer)
        loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except PrefoptError:
        raise
    except Exception as error:  # as in _transformers_model
        raise unloadable(name, error) from error
    model, found = loaded
    return model, set(found["missing_keys"])


def _classifier_on(causal: Any, name: str, tokenizer: Any) -> Any:
    """(sequence classifier with the decoder of a causal model in memory, the weights that it lacks), as above."""
    config = copy.deepcopy(causal.config)
    _prepare_classifier(name, config, tokenizer)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    model.name_or_path = causal.name_or_path
    return model, {key for key in model.state_dict() if key.split(".")[0] in HEAD_NAMES}


def _prepare_classifier(name: str, config: Any, tokenizer: Any) -> None:
    """Make `config` that of a head with one output and a padding token; ModelError where no reward model can be made of it."""
    known = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if not known and "AutoModelForSequenceClassification" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(
            f'model.name: "{name}": transformers has no sequence classifier for models of type {config.model_type}',
            todo="Start the reward model from another one, for example a Llama, Qwen, Gemma or GPT-2.",
        )
    trained = is_reward_model(config)
    if trained and config.num_labels != 1:
        raise ModelError(
            f'model.name: "{name}" is a classifier of {config.num_labels} labels, not a reward model',
            todo="Give one with a single output (num_labels=1), or a causal language model to start from.",
        )
    config.num_labels = 1
    set_padding(tokenizer, config, trained=trained)


def as_language_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    for_training: bool,
    quantized: str | None = None,
) -> LanguageModel:
    """A LanguageModel around a transformers model that is already in memory; `quantized`: how `load_model` quantised it."""
    return _in_memory(LanguageModel, model, tokenizer, name, dtype, device, for_training, quantized=quantized)


def _in_memory(
    kind: type[M],
    model: Any,
    tokenizer: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    for_training: bool,
    *,
    quantized: str | None = None,
) -> M:
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{name}: carries an adapter, and what is loaded here are whole weights",
            todo="Merge it (merge_and_unload), or give a local folder with the adapter; a new one is trained with model.lora.",
        )
    if device.type == "cpu":
        keep_freed_memory()
    if quantized is None and getattr(model, "is_quantized", False):
        raise ModelError(
            f"{name}: its weights are quantised already",
            todo="Give unquantised weights; model.quantize, with model.lora, quantises them as they are read.",
        )
    identity = weights_identity(model) + (f"-{quantized}" if quantized else "")
    if quantized is None:
        model = model.to(device=device)
    if not for_training:
        cast_parameters(model, dtype)
    model.eval()
    return kind(model, tokenizer, name=name, dtype=dtype, device=device, identity=identity, quantized=quantized)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`, of its base where an adapter comes without one; ModelError where there is none."""
    source = model_folder(name)
    if is_adapter(source) and not any(Path(source).glob("tokenizer*")):
        base, revision = base_of(Path(source))
        return load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
    _quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(
            f'model.name: the tokenizer of "{name}" cannot be loaded ({first_line(error)})',
            todo="The folder needs tokenizer.json or the files of its tokenizer class.",
        ) from error


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a configuration tells without the weights."""

    parameters: int
    context_tokens: int
    hidden: int
    layers: int
    vocabulary: int
    architecture: str


def model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of `name`, of its base where it is an adapter; no weights are read."""
    source = model_folder(name)
    if is_adapter(source):
        base, revision = base_of(Path(source))
        return model_config(base, revision=revision, trust_remote_code=trust_remote_code)
    _quiet_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in load_model
        raise unloadable(name, error) from error


def model_facts(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Facts of the model `name` from its configuration alone; no weights are read."""
    config = model_config(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in load_model
        raise unloadable(name, error) from error
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**20
    return ModelFacts(
        parameters=model.num_parameters(),
        context_tokens=int(context),
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        vocabulary=int(text.vocab_size),
        architecture=str(config.model_type),
    )


def model_folder(name: str) -> str:
    """Where transformers finds `name`: a folder (converted or fetched first where needed) or a Hub id."""
    if name in DEMO_MODELS:
        return str(demo_model(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(converted_gguf(path))
    if path.is_dir():
        run = path / "config.json"
        if run.exists() and "model_type" not in _json_or_empty(run):
            return str(_newest_checkpoint(path))
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        found = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f'model.name: "{name}" {found}', todo="Give a folder with config.json and *.safetensors, a Hub id, or a .gguf file."
        )
    return name


def _newest_checkpoint(run: Path) -> Path:
    """A run folder stands for its newest whole checkpoint."""
    from prefopt.core.run_folder import RunFolder

    found = RunFolder(run).complete_checkpoints()
    if not found:
        raise ModelError(f"{run}: has no complete checkpoint", todo="Train it, or give a folder with model weights.")
    return found[-1]


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {"model_type": None}
    return value if isinstance(value, dict) else {}


def _quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
