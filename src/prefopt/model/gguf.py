"""GGUF files, converted once to a normal checkpoint folder and kept by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from prefopt.core.errors import ModelError
from prefopt.core.files import cache_root, check_writable, storage_errors
from prefopt.core.progress import say


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted_gguf(path: Path, *, overrides: dict[str, Any] | None = None) -> Path:
    """Folder with the weights of the GGUF file `path` as safetensors, converted now or found in the cache.

    Quantised weights are expanded to fp32. `overrides` replaces values of the configuration that the file rounds.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such GGUF file", todo="Check the path.")
    folder = cache_root() / "models" / f"gguf-{file_digest(path)[:32]}"
    if (folder / "config.json").exists():
        return folder
    check_writable(folder.parent, needed_bytes=8 * path.stat().st_size)
    say(f"{path.name}: converting to a checkpoint folder, once (about 20 seconds for 135 M parameters)")
    with storage_errors(folder):
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gguf-"))
        try:
            _convert(path, building, overrides or {})
            os.replace(building, folder)
        except OSError:
            if not (folder / "config.json").exists():  # another process may have been first
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path, overrides: dict[str, Any]) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("Reading GGUF files needs the package gguf", todo="pip install gguf") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader raises many kinds for a broken or unknown file
        raise ModelError(
            f"{path}: cannot be read as GGUF ({error})",
            todo="Check that the file is complete and its architecture known to transformers.",
        ) from error
    model.hf_quantizer = None  # the weights are plain now; with a quantiser attached they could not be saved
    configs: tuple[Any, ...] = (model.config, getattr(model, "generation_config", None))
    for config in configs:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for key, value in overrides.items():
        setattr(model.config, key, value)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
