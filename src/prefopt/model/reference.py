"""Log-probs of the frozen reference: computed once, kept on disk by content, shared between runs and sweeps.

An entry depends on the reference's weights, the numerics (dtype, device type, version) and the token ids with their
loss flags, and on nothing else: learning rate, beta, order, micro-batches and output folder do not touch it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefopt.core import progress
from prefopt.core.errors import TrainingError
from prefopt.core.files import cache_root, check_writable, digest, digest_of, storage_errors
from prefopt.core.progress import say
from prefopt.data.encode import TokenGroup
from prefopt.model.adapters import adapters_off
from prefopt.model.engine import LanguageModel
from prefopt.model.logp_store import LogpStore

Logps = tuple[NDArray[np.float32], ...]  # one array of token log-probs per response

GROUPS_PER_PART = 256  # a pass that is killed loses at most this many groups
_GROUPS_LOOKED_UP = 4096  # at once, to see which have an entry


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


def groups_digest(groups: Sequence[TokenGroup]) -> str:
    """Digest of the token ids and loss flags of all groups, in order."""
    return digest_of(key for group in groups for key in response_keys(group))


class ReferenceCache:
    """The entries of one reference under one numerics, in `folder`: parts that are appended whole and never changed.

    Log-probs stay on disk until a step asks for its own; 40 bytes for each response say where they are.
    """

    def __init__(self, identity: str, numerics: str, *, root: Path | None = None) -> None:
        self.identity = f"{identity}-{numerics}"
        self.folder = (root or cache_root() / "reference") / self.identity
        self.store = LogpStore(self.folder)
        self.model: LanguageModel | None = None

    def missing_places(self, groups: Sequence[TokenGroup]) -> list[int]:
        """Places of the groups of which some response has no entry, each group once. One group is looked at after another."""
        places: list[int] = []
        names: list[bytes] = []
        for start in range(0, len(groups), _GROUPS_LOOKED_UP):
            numbers = range(start, min(start + _GROUPS_LOOKED_UP, len(groups)))
            keys = [response_keys(groups[number]) for number in numbers]
            has = iter(self.store.has([key for of_group in keys for key in of_group]).tolist())
            for number, of_group in zip(numbers, keys, strict=True):
                if not all(list(islice(has, len(of_group)))):
                    places.append(number)
                    names.append(hashlib.blake2b(b"".join(of_group), digest_size=16).digest())
        _, first = np.unique(np.array(names, dtype="S16"), return_index=True)
        return [places[number] for number in np.sort(first).tolist()]

    def missing(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """Groups of which some response has no entry, each once."""
        return [groups[place] for place in self.missing_places(groups)]

    def add(self, groups: Sequence[TokenGroup], logps: Sequence[Logps]) -> None:
        """Keep the log-probs of `groups` as one new part on disk."""
        new: dict[bytes, NDArray[np.float32]] = {}
        for group, values in zip(groups, logps, strict=True):
            for key, value in zip(response_keys(group), values, strict=True):
                if not np.isfinite(value).all():
                    raise TrainingError(
                        f"{group.source}: the reference gives this row a non-finite log-prob",
                        todo="Use a reference whose weights are sound, or remove the row.",
                    )
                new[key] = value
        self.store.add(new)

    def of(self, groups: Sequence[TokenGroup]) -> list[Logps]:
        """Entries of `groups`, read from disk; TrainingError names the rows that have none."""
        keys = [response_keys(group) for group in groups]
        if not self.store.has([key for of_group in keys for key in of_group]).all():
            holes = self.missing(groups)
            rows = ", ".join(group.source for group in holes[:5])
            raise TrainingError(
                f"The reference cache has no entry for {len(holes)} rows, among them {rows}",
                todo=f"Delete {self.folder} and run again.",
            )
        entries = self.store.read(key for of_group in keys for key in of_group)
        return [tuple(entries[key] for key in of_group) for of_group in keys]

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
    missing = cache.missing_places(groups)
    if not missing:
        say(f"reference: all {len(groups)} groups are in the cache")
        return 0
    with storage_errors(cache.folder):
        check_writable(cache.folder)
    model = load()
    for start in range(0, len(missing), GROUPS_PER_PART):
        part = [groups[place] for place in missing[start : start + GROUPS_PER_PART]]
        title = f"reference log-probs, groups {start + 1} to {start + len(part)} of {len(missing)}"
        cache.add(part, model.score(part, micro_batch_tokens=micro_batch_tokens, title=title))
    return len(missing)
