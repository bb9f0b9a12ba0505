"""Checkpoints: a folder in Hugging Face's layout, plus what is needed to go on exactly where the run stopped.

step-000123/
  model.safetensors, config.json, tokenizer files    loads with transformers as it is (weights are the fp32 masters, or with
                                                     train.optimizer=adamw_bf16 the bf16 weights)
  optimizer.safetensors                              AdamW's state by weight name, with the state of its random bits
  reference.safetensors                              a reference that follows the policy (tr-dpo, ema), fp32
  value_head.safetensors                             the value head of PPO, fp32
  training.json                                      step, tokens seen, running statistics, reference and data identity
  manifest.json                                      every file with its size; written last

With LoRA and model.lora.save=adapter, adapter_model.safetensors and adapter_config.json stand in place of the model;
with save=merged the model is the merged one, and the folder adapter/ holds these two for resuming.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.core.errors import StorageError, TrainingError
from prefopt.core.files import check_writable, read_json, storage_errors, write_json
from prefopt.core.run_folder import MANIFEST, checkpoint_is_complete
from prefopt.model.adapter_files import read_adapter, write_adapter
from prefopt.model.adapters import lora_identity, merged_state
from prefopt.model.quantized import plain_config
from prefopt.train.loop import Training
from prefopt.train.moving_reference import MovingReference

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training.json"
ADAPTER_FOLDER = "adapter"
REFERENCE_FILE = "reference.safetensors"
VALUE_HEAD_FILE = "value_head.safetensors"


def checkpoint_bytes(training: Training) -> int:
    """Size of one checkpoint: trained weights and two moments; with a merged adapter the frozen weights, and with a moving
    reference its weights besides."""
    trained = sum(master.nbytes for master in training.optimizer.masters.values()) + training.optimizer.moment_bytes
    adapter = training.policy.adapter
    merged = adapter is not None and adapter.config.save == "merged"
    moving = training.reference.weights.values() if isinstance(training.reference, MovingReference) else ()
    reference = 4 * sum(weight.numel() for weight in moving)
    return trained + reference + (4 * training.policy.model.num_parameters() if merged else 0)


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
            sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in _files(partial)}
            write_json(partial / MANIFEST, {"step": training.step, "files": sizes})
            _sync(partial)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_files(training: Training, folder: Path) -> None:
    state = {name: value.contiguous() for name, value in training.optimizer.state().items()}
    adapter = training.policy.adapter
    try:
        if adapter is None or adapter.config.save == "merged":
            _save_model(training, folder)
        if adapter is not None:
            home = folder / ADAPTER_FOLDER if adapter.config.save == "merged" else folder
            write_adapter(training.policy, _of_model(training), home)
        whole = training.optimizer.separate or adapter is not None
        if whole and (folder / "config.json").exists():
            config = read_json(folder / "config.json")  # transformers writes the compute dtype; what is saved are the masters
            write_json(folder / "config.json", {**config, "dtype": "float32"})
        training.policy.tokenizer.save_pretrained(folder)
        save_file(state, folder / OPTIMIZER_FILE)
        if training.policy.value_head is not None:
            masters = training.optimizer.masters
            own = {name: masters[name].detach() for name in masters.keys() - training.optimizer.model_parameters.keys()}
            save_file(own, folder / VALUE_HEAD_FILE)
    except Exception as error:  # safetensors and tokenizers have error types of their own for a full disk
        if "No space left" in str(error):
            raise StorageError(
                f"{folder}: the disk is full", todo="Free some space; earlier checkpoints are untouched."
            ) from error
        raise
    if isinstance(training.reference, MovingReference):
        save_file({name: weight.contiguous() for name, weight in training.reference.weights.items()}, folder / REFERENCE_FILE)
    position = {"step": training.step, "num_tokens": training.num_tokens, "running": training.objective.state()}
    write_json(folder / STATE_FILE, {**position, **identities(training)})


def _of_model(training: Training) -> dict[str, Tensor]:
    """The masters of the model's own weights, without those of a value head."""
    return {name: training.optimizer.masters[name] for name in training.optimizer.model_parameters}


def _save_model(training: Training, folder: Path) -> None:
    """The model with its masters or its merged adapter; a quantised one as the plain model that it computes as."""
    model = training.policy.model
    if training.policy.quantized is not None:
        with torch.device("meta"):
            model = type(model)(plain_config(model.config))
    model.save_pretrained(folder, state_dict=_master_state(training))


def _master_state(training: Training) -> dict[str, Tensor] | None:
    """The model's state with every weight as its master; names that share a weight share its master, or None in fp32.

    With LoRA: the state of the plain model with the adapter merged into it.
    """
    optimizer = training.optimizer
    if training.policy.adapter is not None:
        return merged_state(training.policy, optimizer.masters)
    if not optimizer.separate:
        return None
    masters = {id(parameter): optimizer.masters[name] for name, parameter in optimizer.model_parameters.items()}
    state = training.policy.model.state_dict(keep_vars=True)
    return {name: masters.get(id(value), value).detach() for name, value in state.items()}


def identities(training: Training) -> dict[str, Any]:
    """What must be the same for a resumed run to equal the unbroken one; with LoRA also what adapter it is, on what."""
    lora = {"lora": lora_identity(training.policy)} if training.policy.adapter is not None else {}
    other = training.config.optimizer != "adamw"
    return {
        "reference": training.reference.identity,
        "data": training.data_identity,
        "data_seed": training.data_seed,
        "groups_per_step": training.config.groups_per_step,
        "loss": training.objective.described(),
        **({"optimizer": training.config.optimizer} if other else {}),
        **({"by_prompt": True} if training.by_prompt else {}),
        **lora,
    }


def _changed(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first identity that differs, with its two values; of an adapter, the option that does."""
    optional = {"lora": None, "optimizer": "adamw", "by_prompt": False}  # what stands for it where it is not written down
    for name in dict.fromkeys([*now, *(name for name in optional if name in was)]):
        old, new = (given.get(name, optional.get(name)) for given in (was, now))
        if old == new:
            continue
        if name != "lora" or old is None or new is None:
            return name, old, new
        option = next(key for key in {**new, **old} if old.get(key) != new.get(key))
        if option == "targets":
            return "lora.targets", sorted(set(old[option]) - set(new[option])), sorted(set(new[option]) - set(old[option]))
        return f"lora.{option}", old.get(option), new.get(option)
    return None


def _sync(folder: Path) -> None:
    for file in _files(folder):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Put weights, optimizer and position of the checkpoint `folder` into `training`.

    Raises StorageError where the checkpoint is incomplete, TrainingError where it belongs to other rows, another
    reference, another loss or another adapter.
    """
    if not checkpoint_is_complete(folder):
        raise StorageError(f"{folder}: this checkpoint is incomplete", todo="Resume from an older one, or start again.")
    state = read_json(folder / STATE_FILE)
    changed = _changed(state, identities(training))
    if changed is not None:
        name, was, now = changed
        raise TrainingError(
            f"{folder}: cannot be resumed, its {name} was {was!r} and is now {now!r}",
            todo="Resume with the configuration it was started with (config.json), or start a new run.",
        )
    weights: dict[str, Tensor] = {}
    if training.policy.adapter is not None:
        home = folder / ADAPTER_FOLDER
        weights = read_adapter(training.policy, home if home.is_dir() else folder)
    else:
        for file in sorted(folder.glob("model*.safetensors")):
            weights.update(load_file(file))
    if training.policy.value_head is not None and (folder / VALUE_HEAD_FILE).exists():
        weights.update(load_file(folder / VALUE_HEAD_FILE))
    missing = training.optimizer.masters.keys() - weights.keys()
    if missing:
        raise StorageError(f"{folder}: has no weight {sorted(missing)[0]}", todo="Resume from another checkpoint.")
    training.optimizer.load(weights, load_file(folder / OPTIMIZER_FILE))
    if isinstance(training.reference, MovingReference):
        training.reference.load(load_file(folder / REFERENCE_FILE))
        training.reference_is_initial = training.reference_is_initial and state["step"] < training.reference.every
    training.objective.load_state(state["running"])
    training.step = state["step"]
    training.num_tokens = state["num_tokens"]


def prune_checkpoints(folder: Path, *, keep_last: int, keep: set[str]) -> None:
    """Remove all but the newest `keep_last` checkpoints and those named in `keep`, and what a killed run left of others.

    A checkpoint loses its name before its files, so that one removed in part never stands among the others.
    """
    complete = sorted(path for path in folder.glob("step-*") if checkpoint_is_complete(path))
    for path in complete[:-keep_last]:
        if path.name not in keep:
            nameless = path.with_name(f".{path.name}.removed")
            shutil.rmtree(nameless, ignore_errors=True)
            os.replace(path, nameless)
    for leftover in [*folder.glob(".step-*.removed"), *folder.glob(".step-*.partial")]:
        shutil.rmtree(leftover)
