"""Arrays on disk by key: what was put in comes out, over any number of parts; memory holds where they are, not what they say."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.errors import StorageError
from prefopt.model import logp_store
from prefopt.model.logp_store import LogpStore

KEYS = st.binary(min_size=2, max_size=2).map(lambda text: text + b"\0" * 14)  # zeros at the end are part of a key


def values(seed: int, longest: int = 9) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal(random.integers(0, longest)).astype(np.float32)


def check(store: LogpStore, wanted: dict[bytes, np.ndarray], absent: list[bytes]) -> None:
    keys = [*wanted, *absent]
    assert store.has(keys).tolist() == [key in wanted for key in keys]
    found = store.read(wanted)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], value) and found[key].dtype == np.float32 for key, value in wanted.items())
    for key in absent:
        with pytest.raises(KeyError):
            store.read([key])


@given(st.lists(st.sets(KEYS, min_size=1, max_size=6), max_size=6), st.sets(KEYS, max_size=5), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_what_is_added_is_found_now_and_later(
    tmp_path_factory: pytest.TempPathFactory, parts: list[set[bytes]], others: set[bytes], merged_at: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    wanted: dict[bytes, np.ndarray] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logp_store, "_MERGED_AT", merged_at)
        store = LogpStore(folder)
        for part in parts:
            new = {key: values(len(wanted) + number) for number, key in enumerate(sorted(part - wanted.keys()))}
            if new:
                store.add(new)
                wanted |= new
            check(store, wanted, sorted(others - wanted.keys()))
    assert len(store) == len(wanted)
    check(LogpStore(folder), wanted, sorted(others - wanted.keys()))


def test_arrays_stay_on_disk(tmp_path: Path) -> None:
    """400 arrays of 40 kB: opening them and reading two takes memory for one part, 50 of them, and not for all."""
    arrays = {number.to_bytes(16): np.full(10_000, number, dtype=np.float32) for number in range(1, 401)}
    first = LogpStore(tmp_path)
    names = list(arrays)
    for start in range(0, 400, 50):
        first.add({name: arrays[name] for name in names[start : start + 50]})
    tracemalloc.start()
    store = LogpStore(tmp_path)
    found = store.read(names[::399])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [value[0] for value in found.values()] == [1, 400]
    assert peak < 3 * 50 * 40_000 and held < 200_000


def test_a_part_that_goes_away_is_named(tmp_path: Path) -> None:
    store = LogpStore(tmp_path)
    store.add({b"k" * 16: np.ones(1000, dtype=np.float32)})
    (part,) = store.parts
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(StorageError, match=part.name):
        store.read([b"k" * 16])
    part.unlink()
    with pytest.raises(StorageError, match=part.name):
        store.read([b"k" * 16])


def test_a_compressed_part_is_refused(tmp_path: Path) -> None:
    """Its numbers cannot be read in their place."""
    arrays = {"keys": np.zeros((1, 16), np.uint8), "lengths": np.ones(1, np.int64), "values": np.zeros(1, np.float32)}
    np.savez_compressed(tmp_path / "part-a.npz", **arrays)
    with pytest.raises(StorageError, match="compressed"):
        LogpStore(tmp_path)
    np.savez(tmp_path / "part-a.npz", **arrays)
    assert LogpStore(tmp_path).read([b"\0" * 16])[b"\0" * 16].tolist() == [0.0]
