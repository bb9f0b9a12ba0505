"""Checkpoints: a folder in Hugging Face's layout, plus what is needed to go on exactly where the run stopped.

step-000123/
  model.safetensors, config.json, tokenizer files    loads with transformers as it is (weights are the fp32 masters)
  optimizer.safetensors                              AdamW's state by weight name
  training.json                                      step, tokens seen, reference and data identity
  manifest.json                                      every file with its size; written last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.core.errors import StorageError, TrainingError
from prefopt.core.files import check_writable, digest, read_json, storage_errors, write_json
from prefopt.core.run_folder import MANIFEST, checkpoint_is_complete
from prefopt.data.encode import TokenGroup
from prefopt.model.reference import response_keys
from prefopt.train.loop import Training

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training.json"


def checkpoint_bytes(training: Training) -> int:
    """Size of one checkpoint: fp32 weights and two moments."""
    return 12 * sum(master.numel() for master in training.optimizer.masters.values())


def save_checkpoint(training: Training, folder: Path) -> Path:
    """Write a checkpoint of the current step to `folder`: complete under that name, or not there at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    with storage_errors(folder):
        if folder.exists() and checkpoint_is_complete(folder):
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        check_writable(partial, needed_bytes=checkpoint_bytes(training))
        try:
            _write_files(training, partial)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir()) if file.is_file()}
            write_json(partial / MANIFEST, {"step": training.step, "files": sizes})
            _sync(partial)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def _write_files(training: Training, folder: Path) -> None:
    state = {name: value.contiguous() for name, value in training.optimizer.state().items()}
    try:
        training.policy.model.save_pretrained(folder, state_dict=_master_state(training))
        if training.optimizer.separate:
            config = read_json(folder / "config.json")  # transformers writes the compute dtype; what is saved are the masters
            write_json(folder / "config.json", {**config, "dtype": "float32"})
        training.policy.tokenizer.save_pretrained(folder)
        save_file(state, folder / OPTIMIZER_FILE)
    except Exception as error:  # safetensors and tokenizers have error types of their own for a full disk
        if "No space left" in str(error):
            raise StorageError(
                f"{folder}: the disk is full", todo="Free some space; earlier checkpoints are untouched."
            ) from error
        raise
    write_json(folder / STATE_FILE, {"step": training.step, "num_tokens": training.num_tokens, **identities(training)})


def _master_state(training: Training) -> dict[str, Tensor] | None:
    """The model's state with every weight as its master; names that share a weight share its master, or None in fp32."""
    optimizer = training.optimizer
    if not optimizer.separate:
        return None
    masters = {id(parameter): optimizer.masters[name] for name, parameter in optimizer.model_parameters.items()}
    state = training.policy.model.state_dict(keep_vars=True)
    return {name: masters.get(id(value), value).detach() for name, value in state.items()}


def identities(training: Training) -> dict[str, Any]:
    """What must be the same for a resumed run to equal the unbroken one."""
    return {
        "reference": training.reference.identity,
        "data": groups_digest(training.groups),
        "data_seed": training.data_seed,
        "groups_per_step": training.config.groups_per_step,
        "loss": {"name": training.objective.facts.name, "reduce": training.objective.reduce, **training.objective.knobs},
    }


def groups_digest(groups: Sequence[TokenGroup]) -> str:
    """Digest of the token ids and loss flags of all groups, in order."""
    return digest(*(key for group in groups for key in response_keys(group)))


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Put weights, optimizer and position of the checkpoint `folder` into `training`.

    Raises StorageError where the checkpoint is incomplete, TrainingError where it belongs to other rows, another
    reference or another loss.
    """
    if not checkpoint_is_complete(folder):
        raise StorageError(f"{folder}: this checkpoint is incomplete", todo="Resume from an older one, or start again.")
    state = read_json(folder / STATE_FILE)
    for name, now in identities(training).items():
        if state[name] != now:
            raise TrainingError(
                f"{folder}: cannot be resumed, its {name} was {state[name]!r} and is now {now!r}",
                todo="Resume with the configuration it was started with (config.json), or start a new run.",
            )
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(file))
    missing = training.optimizer.masters.keys() - weights.keys()
    if missing:
        raise StorageError(f"{folder}: has no weight {sorted(missing)[0]}", todo="Resume from another checkpoint.")
    training.optimizer.load(weights, load_file(folder / OPTIMIZER_FILE))
    training.step = state["step"]
    training.num_tokens = state["num_tokens"]


def prune_checkpoints(folder: Path, *, keep_last: int, keep: set[str]) -> None:
    """Remove all but the newest `keep_last` checkpoints and those named in `keep`."""
    complete = sorted(path for path in folder.glob("step-*") if checkpoint_is_complete(path))
    for path in complete[:-keep_last]:
        if path.name not in keep:
            shutil.rmtree(path)
