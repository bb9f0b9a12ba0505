"""How far a run folder came, and whether it was trained as a configuration says: what decides if a run is skipped or resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prefopt.core.config import RunConfig
from prefopt.core.errors import PrefoptError, StorageError
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder

RunState = Literal["new", "unsaved", "interrupted", "failed", "complete", "lost"]

# How a run is kept, watched and cut into passes: its weights are the same, up to rounding.
KEEPING = (
    "train.output_dir",
    "train.micro_batch_tokens",
    "train.save_every_steps",
    "train.keep_last",
    "train.sinks",
    "reference.cache_dir",
)


def run_state(run: RunFolder) -> RunState:
    """new: no step was made. unsaved: it stopped before its first checkpoint. interrupted: it stopped behind one.

    failed: it ended with an error of its own, such as a loss that is not finite. complete: it came to its end, and a
    checkpoint of it is there. lost: it came to its end, and none is there.
    """
    kinds = [event["kind"] for event in run.events()]
    saved = bool(run.complete_checkpoints())
    if "end" in kinds:
        return "complete" if saved else "lost"
    if "error" in kinds and "step" not in kinds[kinds.index("error") :]:
        return "failed"
    if saved:
        return "interrupted"
    return "unsaved" if "step" in kinds else "new"


def started(run: RunFolder) -> float:
    """When the run began, in seconds since 1970; 0 where it did not."""
    return next((float(event["time"]) for event in run.events() if event["kind"] == "start"), 0.0)


def ended(run: RunFolder) -> float:
    """When the run came to its end, in seconds since 1970; 0 where it did not."""
    return next((float(event["time"]) for event in reversed(run.events()) if event["kind"] == "end"), 0.0)


def check_same_config(run: RunFolder, config: RunConfig, *, title: str) -> None:
    """StorageError where `run` was trained with options other than those of `config`, apart from how it is kept.

    Options that a later version added count with their defaults.
    """
    saved: dict[str, Any] = run.read("config.json") or {}
    try:
        before = resolve_config(saved).resolved()
    except PrefoptError:
        before = saved
    changed = changed_option(before, config.resolved())
    if changed is not None:
        key, old, new = changed
        raise StorageError(
            f"{title}: {run.path} holds a run with {key}={old!r}, and now it is {new!r}",
            todo=f"Set it back, remove {run.path} to train it again, or choose another train.output_dir.",
        )


def changed_option(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, old, new) of the first option whose value differs and that can change the weights; None where all agree."""
    old, new = flattened(before), flattened(now)
    for key in dict.fromkeys([*new, *old]):
        if not _within(key, KEEPING) and old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _within(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)
