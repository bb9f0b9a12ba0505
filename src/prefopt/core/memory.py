"""How much memory this process uses, and how much it may still take before the system or a limit stops it. In bytes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes about 2^63 where there is no limit


def process_bytes() -> int:
    """Resident memory of this process now; its largest so far where the system tells only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Make many objects that stay: the collector of cycles would go through all of them again and again meanwhile."""
    was_running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_running:
            gc.enable()


def available_bytes() -> int:
    """What this process can still allocate: the least of free memory, its cgroups' rest and its own limits."""
    found = [*_free_memory(), *_cgroup_rest(), *_limit_rest()]
    return max(0, min(found)) if found else _UNLIMITED


def _free_memory() -> list[int]:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return [int(line.split()[1]) * 1024]
    except (OSError, ValueError):
        pass
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - process_bytes()]
    except (ValueError, OSError, AttributeError):
        return []


def _cgroup_rest() -> list[int]:
    """Limit less use of every cgroup that this process is in, file cache not counted as use: it gives way."""
    rest = []
    for folder, limit_file, used_file in _cgroup_folders():
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None and limit < _UNLIMITED:
            rest.append(limit - used + _inactive_file(folder))
    return rest


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = root / path.lstrip("/")
        folders += [(folder, *names) for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return folders


def _inactive_file(folder: Path) -> int:
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _limit_rest() -> list[int]:
    """What setrlimit leaves of the address space and of the data segment."""
    try:
        import resource

        pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
    except (ImportError, OSError, ValueError):
        return []
    page = os.sysconf("SC_PAGE_SIZE")
    limits = ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5]))
    return [soft - used * page for which, used in limits if (soft := resource.getrlimit(which)[0]) != resource.RLIM_INFINITY]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or the word "max"
        return None
