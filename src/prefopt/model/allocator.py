"""Keep freed memory in the process on Linux CPUs, where a training step would otherwise fault it in again and again.

And let it be used again: a tensor is aligned, so glibc asks for a few bytes more than it keeps and leaves them beside it.
64 bytes are soon taken by something small, and then the place never again fits a tensor of the same size. Blocks in whole
pages, which torch makes on request (THP_MEM_ALLOC_ENABLE), leave room that is found again.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_RETURNED = 64 << 20  # larger blocks, of which a pass makes few, go back: freed, they would fit nothing but each other
_kept = False


def align_to_pages() -> None:
    """Ask torch for blocks of 2 MiB and more in whole pages, huge ones where the system has them; Linux only.

    torch reads its variable at its first allocation, and a value that is set already stands. SmolLM2-135M with
    micro-batches of 2,048 tokens peaks at 4.4 instead of 5.0 GiB, in the same time (benchmarks/RESULTS.md).
    """
    if _HUGE_PAGES.exists():  # without them torch would warn
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks of up to 64 MiB instead of returning them to the system; elsewhere nothing happens.

    Activations are allocated and freed in every layer. By default glibc maps each large block anew and the kernel zeroes
    it page by page: a step of SmolLM2-135M on two cores takes 1.27 times as long (benchmarks/RESULTS.md). The peak is
    the same, but what was used once stays with the process.
    """
    global _kept
    if _kept or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _RETURNED)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    _kept = True


def release_freed_memory() -> None:
    """Give freed memory back after a phase of other sizes than the next one: what its gaps do not fit would be added to it."""
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)
