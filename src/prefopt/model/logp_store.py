"""Arrays of log-probs on disk, found by key: parts that are appended whole, an index in memory, values read when asked for.

A part is an uncompressed .npz of `keys` (n, 16) uint8, `lengths` (n,) int64 and `values`, the arrays end to end, float32.
The index holds 40 bytes for each key, whatever the length of its array.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt.core.errors import StorageError
from prefopt.core.files import digest, whole_file

Keys = NDArray[np.bytes_]
Values = NDArray[np.float32]

_MERGED_AT = 2**16  # keys that were added and are not yet sorted in among the others


class Place(NamedTuple):
    """Where an array is: the number of its part, its first byte there, and its length in numbers."""

    part: int
    start: int
    length: int


class LogpStore:
    """The parts in `folder`. StorageError names one that is damaged: every part is read once, from end to end, when opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Path] = []
        self._new: dict[bytes, Place] = {}
        self._keys: Keys = np.zeros(0, dtype="S16")
        self._places = np.zeros((0, 3), dtype=np.int64)
        found = [self._read(part) for part in sorted(folder.glob("part-*.npz"))] if folder.is_dir() else []
        self._merge(found)

    def _read(self, part: Path) -> tuple[Keys, NDArray[np.int64]]:
        """Keys and places of a new part."""
        try:
            with open(part, "rb") as file, np.load(file) as stored:
                keys, lengths, values = stored["keys"], stored["lengths"], stored["values"]
                start = _first_byte(part, stored.zip.getinfo("values.npy"))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
            raise StorageError(
                f"{part}: this part of the reference cache is damaged ({error})", todo="Delete the file; it is computed again."
            ) from error
        if len(values) != lengths.sum() or values.dtype != np.float32 or not np.isfinite(values).all():
            raise StorageError(
                f"{part}: this part of the reference cache is inconsistent", todo="Delete the file; it is computed again."
            )
        self.parts.append(part)
        starts = start + values.itemsize * (np.cumsum(lengths) - lengths)
        number = np.full(len(lengths), len(self.parts) - 1)
        return np.frombuffer(keys.tobytes(), dtype="S16"), np.stack((number, starts, lengths), axis=1)

    def _merge(self, more: Sequence[tuple[Keys, NDArray[np.int64]]]) -> None:
        keys = np.concatenate((self._keys, *(keys for keys, _ in more)))
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._places = np.concatenate((self._places, *(places for _, places in more)))[order]

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether there is an array for each of `keys`."""
        wanted = np.array(keys, dtype="S16")
        at = np.searchsorted(self._keys, wanted)
        found: NDArray[np.bool_] = np.zeros(len(wanted), dtype=np.bool_)
        inside = at < len(self._keys)
        found[inside] = self._keys[at[inside]] == wanted[inside]
        return found | np.array([key in self._new for key in keys], dtype=np.bool_)

    def _place(self, key: bytes) -> Place:
        if key in self._new:
            return self._new[key]
        at = int(np.searchsorted(self._keys, np.array(key, dtype="S16"), side="right")) - 1
        if at < 0 or self._keys[at] != np.array(key, dtype="S16"):
            raise KeyError(key)
        return Place(*self._places[at].tolist())

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Values]:
        """The arrays of `keys`, of which each is there; KeyError where one is not."""
        places = sorted((self._place(key), key) for key in set(keys))
        made: dict[bytes, Values] = {}
        opened, file = -1, None
        try:
            for place, key in places:
                if place.part != opened:
                    if file is not None:
                        file.close()
                    opened, file = place.part, open(self.parts[place.part], "rb")  # noqa: SIM115
                assert file is not None
                file.seek(place.start)
                made[key] = np.fromfile(file, dtype=np.float32, count=place.length)
                if len(made[key]) != place.length:
                    raise OSError("it has become shorter")
        except OSError as error:
            raise StorageError(
                f"{self.parts[opened]}: this part of the reference cache is gone or damaged ({error})",
                todo="Run again; what is missing is computed again.",
            ) from error
        finally:
            if file is not None:
                file.close()
        return made

    def add(self, arrays: Mapping[bytes, Values]) -> None:
        """Write `arrays` as one new part."""
        keys = np.frombuffer(b"".join(arrays), dtype=np.uint8).reshape(-1, 16)
        lengths = np.array([len(value) for value in arrays.values()], dtype=np.int64)
        values = np.concatenate(list(arrays.values())).astype(np.float32)
        part = self.folder / f"part-{digest(keys.tobytes())}.npz"
        with whole_file(part) as partial, open(partial, "wb") as file:
            np.savez(file, keys=keys, lengths=lengths, values=values)
        _, places = self._read(part)
        self._new.update(zip(arrays, (Place(*place) for place in places.tolist()), strict=True))
        if len(self._new) > max(_MERGED_AT, len(self._keys) // 4):
            new = np.array(list(self._new.values()), dtype=np.int64)
            self._merge([(np.array(list(self._new), dtype="S16"), new)])
            self._new = {}


def _first_byte(part: Path, member: zipfile.ZipInfo) -> int:
    """Where the numbers of an uncompressed array of a .npz begin, in bytes."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    with open(part, "rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(member.header_offset + 30 + name + extra)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()
