"""Log-probs of the frozen reference: computed once, kept on disk by content, shared between runs and sweeps.

An entry depends on the reference's weights, the numerics (dtype, device type, version) and the token ids with their
loss flags, and on nothing else: learning rate, beta, order, micro-batches and output folder do not touch it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefopt.core import progress
from prefopt.core.errors import StorageError, TrainingError
from prefopt.core.files import cache_root, check_writable, digest, storage_errors, whole_file
from prefopt.core.progress import say
from prefopt.data.encode import TokenGroup
from prefopt.model.adapters import adapters_off
from prefopt.model.engine import LanguageModel

Logps = tuple[NDArray[np.float32], ...]  # one array of token log-probs per response

_GROUPS_PER_PART = 256  # a pass that is killed loses at most this many groups


class Reference(Protocol):
    """Source of reference log-probs. `model`: the model behind it where it is in memory, to be used inside `scope()`."""

    identity: str
    model: LanguageModel | None

    def of(self, groups: Sequence[TokenGroup]) -> list[Logps]:
        """Per group, per response: log-probs in nats of the scored tokens."""
        ...

    def scope(self) -> AbstractContextManager[None]:
        """Within it `model` computes as the reference."""
        ...


class NoReference:
    """For losses that are defined without one."""

    identity = "none"
    model: LanguageModel | None = None

    def of(self, groups: Sequence[TokenGroup]) -> list[Logps]:
        raise TrainingError("A loss without a reference asked for reference log-probs", todo="Report this.")

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()


def response_keys(group: TokenGroup) -> list[bytes]:
    """16 bytes for each response, made from prompt ids, response ids and loss flags."""
    prompt = np.ascontiguousarray(group.prompt_ids, dtype=np.int32).tobytes()
    return [
        bytes.fromhex(
            digest(prompt, np.ascontiguousarray(ids, dtype=np.int32).tobytes(), np.packbits(flags).tobytes(), str(len(flags)))
        )
        for ids, flags in zip(group.response_ids, group.scored, strict=True)
    ]


class ReferenceCache:
    """The entries of one reference under one numerics, in `folder`: parts that are appended whole and never changed."""

    def __init__(self, identity: str, numerics: str, *, root: Path | None = None) -> None:
        self.identity = f"{identity}-{numerics}"
        self.folder = (root or cache_root() / "reference") / self.identity
        self.entries: dict[bytes, NDArray[np.float32]] = {}
        self.model: LanguageModel | None = None
        if self.folder.is_dir():
            for part in sorted(self.folder.glob("part-*.npz")):
                self._read(part)

    def _read(self, part: Path) -> None:
        try:
            with open(part, "rb") as file, np.load(file) as stored:
                keys, lengths, values = stored["keys"], stored["lengths"], stored["values"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StorageError(
                f"{part}: this part of the reference cache is damaged ({error})", todo="Delete the file; it is computed again."
            ) from error
        if len(values) != lengths.sum() or not np.isfinite(values).all():
            raise StorageError(
                f"{part}: this part of the reference cache is inconsistent", todo="Delete the file; it is computed again."
            )
        pieces = np.split(values, np.cumsum(lengths)[:-1])
        self.entries.update({key.tobytes(): piece for key, piece in zip(keys, pieces, strict=True)})

    def missing(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """Groups of which some response has no entry, each once."""
        absent: dict[tuple[bytes, ...], TokenGroup] = {}
        for group in groups:
            keys = response_keys(group)
            if any(key not in self.entries for key in keys):
                absent.setdefault(tuple(keys), group)
        return list(absent.values())

    def add(self, groups: Sequence[TokenGroup], logps: Sequence[Logps]) -> None:
        """Keep the log-probs of `groups` in memory and as one new part on disk."""
        new: dict[bytes, NDArray[np.float32]] = {}
        for group, values in zip(groups, logps, strict=True):
            for key, value in zip(response_keys(group), values, strict=True):
                if not np.isfinite(value).all():
                    raise TrainingError(
                        f"{group.source}: the reference gives this row a non-finite log-prob",
                        todo="Use a reference whose weights are sound, or remove the row.",
                    )
                new[key] = value
        keys = np.frombuffer(b"".join(new), dtype=np.uint8).reshape(-1, 16)
        values_flat = np.concatenate(list(new.values()))
        lengths = np.array([len(value) for value in new.values()], dtype=np.int64)
        name = f"part-{digest(keys.tobytes())}.npz"
        with whole_file(self.folder / name) as partial, open(partial, "wb") as file:
            np.savez(file, keys=keys, lengths=lengths, values=values_flat)
        self.entries.update(new)

    def of(self, groups: Sequence[TokenGroup]) -> list[Logps]:
        """Entries of `groups`; TrainingError names the rows that have none."""
        holes = self.missing(groups)
        if holes:
            rows = ", ".join(group.source for group in holes[:5])
            raise TrainingError(
                f"The reference cache has no entry for {len(holes)} rows, among them {rows}",
                todo=f"Delete {self.folder} and run again.",
            )
        return [tuple(self.entries[key] for key in response_keys(group)) for group in groups]

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()


class LiveReference:
    """A second model in memory that is asked at every step."""

    def __init__(self, model: LanguageModel, *, micro_batch_tokens: int) -> None:
        self.model: LanguageModel | None = model
        self.identity = f"{model.identity}-{model.numerics}"
        self.micro_batch_tokens = micro_batch_tokens

    def of(self, groups: Sequence[TokenGroup]) -> list[Logps]:
        assert self.model is not None
        with progress.silence(), self.scope():
            return self.model.score(groups, micro_batch_tokens=self.micro_batch_tokens)

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()


class AdapterOffReference(LiveReference):
    """The policy itself without its LoRA adapter: a live reference that needs no second model."""

    def __init__(self, policy: LanguageModel, *, micro_batch_tokens: int) -> None:
        super().__init__(policy, micro_batch_tokens=micro_batch_tokens)
        self.identity = f"{self.identity}-adapter-off"

    def scope(self) -> AbstractContextManager[None]:
        assert self.model is not None
        return adapters_off(self.model)


def fill_cache(
    cache: ReferenceCache, groups: Sequence[TokenGroup], load: Callable[[], LanguageModel], *, micro_batch_tokens: int
) -> int:
    """Compute the entries that `groups` still need and return how many groups were computed: 0 on a second run.

    `load` gives the reference model and is called only when something is missing. Every part is on disk before the
    next one starts, so that a killed pass goes on where it stopped.
    """
    missing = cache.missing(groups)
    if not missing:
        say(f"reference: all {len(groups)} groups are in the cache")
        return 0
    with storage_errors(cache.folder):
        check_writable(cache.folder)
    model = load()
    for start in range(0, len(missing), _GROUPS_PER_PART):
        part = missing[start : start + _GROUPS_PER_PART]
        title = f"reference log-probs, groups {start + 1} to {start + len(part)} of {len(missing)}"
        cache.add(part, model.score(part, micro_batch_tokens=micro_batch_tokens, title=title))
    return len(missing)
