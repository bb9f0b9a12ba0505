"""Files that are either whole or absent, folders that are known to be writable, and names made from content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefopt.core.errors import StorageError


def cache_root() -> Path:
    """Folder of everything that can be recomputed: `$PREFOPT_CACHE`, else `~/.cache/prefopt`."""
    configured = os.environ.get("PREFOPT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "prefopt"


def digest(*parts: bytes | str) -> str:
    """32 hexadecimal digits naming `parts` and their boundaries: ("ab", "c") and ("a", "bc") differ."""
    return digest_of(parts)


def digest_of(parts: Iterable[bytes | str | memoryview]) -> str:
    """`digest` of parts that need not be in memory together."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update((data.nbytes if isinstance(data, memoryview) else len(data)).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_gib = _free_bytes(path) / 2**30
            raise StorageError(
                f"{path}: the disk is full ({free_gib:.1f} GiB free)",
                todo="Free some space or choose another folder; what was saved before is untouched.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                f"{path}: cannot be written ({error.strerror})",
                todo="Choose a folder that you may write to, for example with train.output_dir=runs/mine.",
            ) from error
        raise


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_writable(folder: Path, *, needed_bytes: int = 0) -> None:
    """Make `folder` and prove that a file can be written there, before anything expensive starts.

    Raises StorageError where it cannot, or where fewer than `needed_bytes` are free.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
            pass
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: {needed_bytes / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free",
            todo="Free some space, choose another folder, or keep fewer checkpoints (train.keep_last).",
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` only when the block ended without an error."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`; StorageError names the file where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path}: there is no such file", todo="Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: is not JSON ({error})", todo="Restore the file or remove it.") from error
