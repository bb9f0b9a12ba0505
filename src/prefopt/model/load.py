"""Models from a folder, the Hub, a GGUF file, or the demo model's name. Safetensors only; no remote code unless asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from prefopt.core.errors import ModelError, PrefoptError
from prefopt.core.progress import say
from prefopt.model.allocator import keep_freed_memory
from prefopt.model.demo_model import DEMO_MODELS, demo_model
from prefopt.model.engine import LanguageModel, cast_parameters, weights_identity
from prefopt.model.gguf import converted_gguf
from prefopt.model.precision import compute_dtype, pick_device


def load_model(
    name: str,
    *,
    precision: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    for_training: bool = False,
) -> LanguageModel:
    """The LanguageModel called `name`: a folder, a Hub id, a .gguf file, or a demo model.

    Weights are read as fp32; for inference they are then cast to the compute dtype, with `for_training` they stay.
    Raises ModelError where it cannot be loaded, has non-finite weights, or is no causal language model.
    """
    source = model_folder(name)
    device = pick_device()
    dtype, why = compute_dtype(precision, device)
    _quiet_transformers()
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except PrefoptError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: this is no model
        raise _unloadable(name, error) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would train what it filled with random numbers
        raise ModelError(
            f'model.name: "{name}" has no weights for {", ".join(missing[:3])} ({len(missing)} in all)',
            todo="Give a complete checkpoint of a causal language model.",
        )
    say(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {device.type}; {why}")
    return as_language_model(model, tokenizer, name=name, dtype=dtype, device=device, for_training=for_training)


def as_language_model(
    model: Any, tokenizer: Any, *, name: str, dtype: torch.dtype, device: torch.device, for_training: bool
) -> LanguageModel:
    """A LanguageModel around a transformers model that is already in memory."""
    if device.type == "cpu":
        keep_freed_memory()
    identity = weights_identity(model)
    model = model.to(device=device)
    if not for_training:
        cast_parameters(model, dtype)
    model.eval()
    return LanguageModel(model, tokenizer, name=name, dtype=dtype, device=device, identity=identity)


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`; ModelError where there is none."""
    source = model_folder(name)
    _quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(
            f'model.name: the tokenizer of "{name}" cannot be loaded ({_first_line(error)})',
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


def model_facts(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Facts of the model `name` from its configuration alone; no weights are read."""
    source = model_folder(name)
    _quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in load_model
        raise _unloadable(name, error) from error
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**20
    return ModelFacts(
        model.num_parameters(), int(context), int(text.hidden_size), int(text.num_hidden_layers), int(text.vocab_size)
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


def _unloadable(name: str, error: Exception) -> ModelError:
    line = _first_line(error)
    if "safetensors" in line and "no file named" in line:
        return ModelError(
            f'model.name: "{name}" has no safetensors weights ({line})',
            todo="Save the model with safetensors; pickled weights are not read.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f'model.name: "{name}" brings its own code', todo="Read that code, then set model.trust_remote_code=true."
        )
    return ModelError(
        f'model.name: "{name}" cannot be loaded ({line})',
        todo="Give a folder with config.json and *.safetensors of a causal language model, a Hub id that can be reached, or a .gguf file.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
