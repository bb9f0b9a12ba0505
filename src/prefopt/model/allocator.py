"""Keep freed memory in the process on Linux CPUs, where a training step would otherwise fault it in again and again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_kept = False


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks instead of returning them to the system; elsewhere nothing happens.

    Activations are allocated and freed in every layer. By default glibc maps each large block anew and the kernel zeroes
    it page by page: a step of SmolLM2-135M on two cores takes 1.27 times as long (benchmarks/RESULTS.md). The peak is
    the same, but what was used once stays with the process.
    """
    global _kept
    if _kept or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    _kept = True


def release_freed_memory() -> None:
    """Give freed memory back after a phase of other sizes than the next one: what its gaps do not fit would be added to it."""
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)
