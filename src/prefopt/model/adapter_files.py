"""Adapters on disk, in peft's layout: adapter_model.safetensors, and adapter_config.json with the name of the base.

A folder that holds these two and no weights of its own stands for its base with the adapter merged into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.core.errors import ModelError, StorageError
from prefopt.core.files import read_json, write_json
from prefopt.model.adapters import adapter_masters, adapter_settings, adapter_state
from prefopt.model.engine import LanguageModel, weights_identity

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter(model: LanguageModel, masters: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter whose weights are `masters` to `folder`: peft and transformers load it with its base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(masters), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / SETTINGS_FILE, adapter_settings(model))


def read_adapter(model: LanguageModel, folder: Path) -> dict[str, Tensor]:
    """The adapter's weights in `folder` by name in `model`."""
    return adapter_masters(model, load_file(folder / WEIGHTS_FILE))


def is_adapter(source: str) -> bool:
    """Whether `source` is a folder with an adapter and without weights of its own."""
    folder = Path(source)
    return (folder / SETTINGS_FILE).is_file() and not any(folder.glob("model*.safetensors"))


def base_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base of the adapter in `folder`; ModelError where it is not named or not there."""
    try:
        settings = read_json(folder / SETTINGS_FILE)
    except StorageError as error:
        raise ModelError(error.what, todo=error.todo) from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{folder}: its adapter does not name the model that it belongs to",
            todo=f"Set base_model_name_or_path in {SETTINGS_FILE} to the folder or Hub id of its base.",
        )
    places = [Path(base).expanduser(), folder / base]
    for place in places:
        if place.is_dir():
            return str(place), None
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        looked = " and ".join(dict.fromkeys(str(place) for place in places))
        raise ModelError(
            f'{folder}: the base of its adapter, "{base}", is not there; looked at {looked}',
            todo=f"Put the base back, or set base_model_name_or_path in {SETTINGS_FILE} to where it is now.",
        )
    revision = settings.get("revision")
    return base, revision if isinstance(revision, str) else None


def merge_adapter(model: Any, folder: Path) -> Any:
    """The transformers model with the adapter in `folder` merged into its fp32 weights, under its plain names.

    ModelError where the adapter is not one of this model, or was trained on other weights than these.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"{folder}: its adapter has no {WEIGHTS_FILE}", todo="Save it with safetensors; pickled weights are not read."
        )
    if quantization_of(folder)[0] is None:
        check_base(model, folder)
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft only warns of missing weights, which are an error below
            loaded = peft.PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True)
        keys = set(load_file(folder / WEIGHTS_FILE))
        wanted = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
        if keys != wanted:
            raise ValueError(f"{len(keys ^ wanted)} weights do not match, among them {sorted(keys ^ wanted)[0]}")
        return loaded.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, safetensors and torch raise many kinds for one cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"{folder}: its adapter cannot be merged into {model.name_or_path or 'its base'} ({reason})",
            todo="Give the base that it was trained on, and an adapter that peft can merge.",
        ) from error


def _trained(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours says about its adapter (`lora_identity`); None for an adapter from elsewhere."""
    places = (folder / "training.json", folder.parent / "training.json")
    return next((read_json(place).get("lora") for place in places if place.is_file()), None)


def quantization_of(folder: Path) -> tuple[str | None, str | None]:
    """How the base was quantised that the adapter in `folder` was trained on, and on what kind of device; None where it was not."""
    kind, _, device = str((_trained(folder) or {}).get("quantize") or "").partition("-")
    return kind or None, device or None


def check_base(model: Any, folder: Path) -> None:
    """ModelError where the adapter in `folder` was trained on other weights than the transformers model `model` holds.

    A checkpoint of ours knows the content of its base: another one would give other numbers without an error.
    """
    trained = _trained(folder)
    if trained is not None and trained["base"].partition("-")[0] != weights_identity(model):
        raise ModelError(
            f"{folder}: its adapter was trained on other weights than {model.name_or_path} holds now",
            todo="Restore these weights, or set base_model_name_or_path in adapter_config.json to where they are.",
        )
