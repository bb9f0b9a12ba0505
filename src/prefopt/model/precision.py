"""Which dtype matrices are multiplied in, decided by what the hardware does natively."""

from __future__ import annotations

import time
from functools import cache

import torch


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware. Where it does not, bf16 is slower than fp32, not faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "mps":
        return True
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None:  # torch < 2.12
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "arm_bf16", "bf16"))


def compute_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, one line that says why) for train.precision `auto`, `bf16` or `fp32`."""
    native = native_bf16(device)
    if precision == "fp32" or (precision == "auto" and not native):
        why = "as asked" if precision == "fp32" else f"this {device.type} multiplies no bf16 in hardware"
        return torch.float32, f"precision: fp32 ({why})"
    why = "fp32 masters" if native else f"fp32 masters; slow here: this {device.type} multiplies no bf16 in hardware"
    return torch.bfloat16, f"precision: bf16 compute ({why})"


def even_tokens(dtype: torch.dtype, device: torch.device) -> int:
    """Matrix products with this many rows, or a multiple, are fastest: other numbers cost up to a tenth in bf16 on a CPU and
    nothing in fp32 (benchmarks/RESULTS.md)."""
    return 8 if dtype == torch.bfloat16 and device.type == "cpu" else 1


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a square matrix product, the best of those that fit into `seconds`; measured
    once. `size`: rows and columns, by default enough to keep the device busy."""
    size = size or (1024 if device.type == "cpu" else 8192)
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    first @ second
    best, until = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < until:
        started = time.perf_counter()
        product = first @ second
        if device.type != "cpu":
            float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
