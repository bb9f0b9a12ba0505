"""Numbers from the host to the device, without the host waiting for what the device is doing."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._guards import detect_fake_mode


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, of the same shape and dtype.

    To CUDA they go through pinned memory: a copy from ordinary memory would first wait for all work in the stream, so that
    the next kernels could not be queued while the last ones run.
    """
    if device.type != "cuda" or detect_fake_mode() is not None:  # a plan's tensors have no data to pin
        return torch.as_tensor(values, device=device)
    return torch.from_numpy(values).pin_memory().to(device, non_blocking=True)
