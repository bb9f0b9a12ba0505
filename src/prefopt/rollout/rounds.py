"""Rounds on disk: a run that is killed between two checkpoints of a round goes on with the samples that it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.core.errors import StorageError
from prefopt.core.files import whole_file
from prefopt.data.groups import Feedback
from prefopt.data.tokens import Experience, TokenGroup
from prefopt.rollout.experience import Round

_PER_TOKEN = ("old_logps", "reference_logps", "advantages", "old_values", "returns")


def round_path(folder: Path, number: int) -> Path:
    """The file of round `number`, from 0."""
    return folder / f"round-{number:06d}.npz"


def write_round(path: Path, made: Round) -> None:
    """Write a round whole or not at all: token ids and numbers as arrays, the rest as JSON beside them."""
    groups = made.groups
    responses = [ids for group in groups for ids in group.response_ids]
    arrays: dict[str, NDArray[Any]] = {
        "prompts": _joined([group.prompt_ids for group in groups], np.int32),
        "prompt_tokens": np.array([len(group.prompt_ids) for group in groups]),
        "responses": _joined(responses, np.int32),
        "response_tokens": np.array([len(ids) for ids in responses]),
        "responses_per_group": np.array([len(group.response_ids) for group in groups]),
    }
    for name in _PER_TOKEN:
        arrays[name] = _joined([part for group in groups for part in getattr(group.experience, name)], np.float32)
    said = {
        "metrics": made.metrics,
        "next_kl_coefficient": made.next_kl_coefficient,
        "shown": made.shown,
        "feedback": [(group.feedback.kind, group.feedback.margin, group.feedback.scores) for group in groups],
        "finished": [group.finished for group in groups],
        "sources": [group.source for group in groups],
    }
    arrays["said"] = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_round(path: Path) -> Round:
    """The round that `write_round` wrote; StorageError where the file is not whole."""
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        said = json.loads(arrays["said"].tobytes())
        return Round(tuple(_groups(arrays, said)), said["metrics"], said["next_kl_coefficient"], tuple(said["shown"]))
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{path}: the samples of this round cannot be read ({error})",
            todo="Remove the file and the checkpoints behind its first step, and resume; or start the run again.",
        ) from error


def _groups(arrays: dict[str, NDArray[Any]], said: dict[str, Any]) -> list[TokenGroup]:
    prompts = _split(arrays["prompts"], arrays["prompt_tokens"])
    responses = _split(arrays["responses"], arrays["response_tokens"])
    numbers = {name: _split(arrays[name], arrays["response_tokens"]) if len(arrays[name]) else [] for name in _PER_TOKEN}
    groups, start = [], 0
    for place, count in enumerate(arrays["responses_per_group"].tolist()):
        end = start + count
        kind, margin, scores = said["feedback"][place]
        of_group = {name: tuple(parts[start:end]) for name, parts in numbers.items()}
        groups.append(
            TokenGroup(
                prompt_ids=prompts[place],
                response_ids=tuple(responses[start:end]),
                scored=tuple(np.ones(len(ids), dtype=np.bool_) for ids in responses[start:end]),
                feedback=Feedback(kind, margin=margin, scores=tuple(scores)),
                source=said["sources"][place],
                finished=tuple(said["finished"][place]),
                experience=Experience(**of_group),
            )
        )
        start = end
    return groups


def _joined(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)


def _split(values: NDArray[Any], counts: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(counts)[:-1]) if len(counts) else []
