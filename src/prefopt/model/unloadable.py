"""Why a model cannot be loaded, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable

from prefopt.core.errors import ModelError


def unloadable(name: str, error: Exception) -> ModelError:
    """What transformers' `error` while it loaded `name` means, with a way out."""
    line = first_line(error)
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


def refuse_missing(name: str, missing: Iterable[str], wanted: str) -> None:
    """ModelError where weights are missing: transformers would train what it filled with random numbers."""
    names = sorted(missing)
    if names:
        raise ModelError(
            f'model.name: "{name}" has no weights for {", ".join(names[:3])} ({len(names)} in all)',
            todo=f"Give a complete checkpoint of {wanted}.",
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
