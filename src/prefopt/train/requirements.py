"""What options ask of the machine, checked before any row or weight is read."""

from __future__ import annotations

import torch

from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError
from prefopt.core.packages import check_installed
from prefopt.model.engine import LanguageModel
from prefopt.model.offload import check_offload
from prefopt.model.precision import compute_dtype, pick_device


def check_machine(config: RunConfig, model: LanguageModel | None = None) -> None:
    """ConfigError where an option needs a package, a device or a compute dtype that this run has not.

    `model`: one in memory that stands in for model.name; by default the device and dtype are those that one is loaded to.
    """
    device = pick_device() if model is None else model.device
    dtype = compute_dtype(config.train.precision, device)[0] if model is None else model.dtype
    if config.train.offload_activations:
        check_offload(device)
    if config.train.optimizer == "adamw_bf16" and dtype != torch.bfloat16:
        raise ConfigError(
            f"train.optimizer=adamw_bf16 needs bf16 compute, and this run computes in {str(dtype).removeprefix('torch.')} ({device.type})",
            todo="Set train.precision=bf16, or use train.optimizer=adamw_8bit, which keeps fp32 weights.",
        )
    if config.train.optimizer == "adamw_8bit":
        check_installed("bitsandbytes", extra="memory", option="train.optimizer=adamw_8bit")
    if config.model.quantize is not None:
        check_installed("bitsandbytes", extra="memory", option=f"model.quantize={config.model.quantize}")
    if model is not None and model.quantized != config.model.quantize:
        raise ConfigError(
            f"model.quantize={config.model.quantize} is set, and the model given is in memory, with weights of {model.quantized or 'full precision'}",
            todo="Give the folder or Hub id of the model: weights are quantised as they are read.",
        )
