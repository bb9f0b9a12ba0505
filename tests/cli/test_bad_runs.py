"""Bad models, folders, rewards and samples on the command line: the documented exit code, one short paragraph that says what and what to do, nothing written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.command_line import Done, prefopt
from cli.refusals import DATA, MODEL, STORAGE, TRAINING, USAGE, assert_refused, files_below, train
from train.tiny_runs import write_model, write_rows


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bad-input") / "model")


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def nan_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (shutil.rmtree, ["other", "does not exist", "Hub id"]),
    "no weights": (no_weights, ["no safetensors weights"]),
    "pickled weights": (pickled, ["no safetensors weights", "pickled"]),
    "NaN weights": (nan_weights, ["model.layers.1.mlp.up_proj.weight", "NaN"]),
    "cut weights": (cut_weights, ["other"]),
    "no tokenizer": (no_tokenizer, ["tokenizer"]),
    "broken config": (broken_config, ["other"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_named(folder: Path, model: Path, name: str) -> None:
    spoil, parts = MODELS[name]
    shutil.copytree(model, folder / "other")
    spoil(folder / "other")
    before = files_below(folder)
    assert_refused(train(model, "model.name=./other"), MODEL, *parts)
    assert files_below(folder) == before


def test_chat_rows_need_a_chat_template(folder: Path) -> None:
    plain = write_model(folder / "plain", chat_template=False)
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
    ]
    write_rows(folder / "rows.jsonl", rows * 4)
    assert_refused(train(plain), MODEL, "template")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["model.name", "data.train"])
def test_a_hub_id_without_a_network_is_refused_in_one_paragraph(folder: Path, model: Path, option: str) -> None:
    words = [f"model.name={model}", "data.train=rows.jsonl", f"{option}=some-owner/no-such-thing", "train.output_dir=run"]
    done = command(["train", *words], HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf"))
    assert_refused(done, MODEL if option == "model.name" else DATA, "some-owner/no-such-thing")


def command(words: list[str], **environment: str) -> Done:
    """The installed command in a process of its own."""
    made = subprocess.run(
        [sys.executable, "-c", "from prefopt.cli import main; main()", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return Done(made.returncode, made.stdout, made.stderr)


def test_an_output_folder_that_cannot_be_written_is_named(folder: Path, model: Path) -> None:
    (folder / "run").write_text("in the way")
    assert_refused(train(model), STORAGE, "run", "cannot be written", "train.output_dir")
    assert_refused(train(model, "train.output_dir=run/inside"), STORAGE, "cannot be written")
    assert (folder / "run").read_text() == "in the way"


def test_a_run_folder_is_used_once(folder: Path, model: Path) -> None:
    assert train(model).code == 0
    before = {name: (folder / name).read_bytes() for name in files_below(folder)}
    assert_refused(train(model), STORAGE, "run: already holds a run", "--resume")
    assert {name: (folder / name).read_bytes() for name in files_below(folder)} == before


def test_nothing_is_resumed_where_there_is_no_checkpoint(folder: Path, model: Path) -> None:
    assert_refused(train(model, "--resume"), STORAGE, "no complete checkpoint", "without --resume")
    assert files_below(folder) == {"rows.jsonl"}


def test_another_loss_is_not_resumed(folder: Path, model: Path) -> None:
    assert train(model).code == 0
    assert_refused(train(model, "--resume", "loss.beta=0.5"), TRAINING, "its loss was", "config.json")


@pytest.mark.parametrize("where", ["model", "optimizer", "manifest"])
def test_a_full_disk_stops_with_what_was_saved_before(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from transformers import LlamaForCausalLM

    from prefopt.train import checkpoint

    def full_safetensors(*args: Any, **options: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "model":
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_safetensors)
    elif where == "optimizer":
        monkeypatch.setattr(checkpoint, "save_file", full_safetensors)
    else:
        monkeypatch.setattr(checkpoint, "_sync", full)
    assert_refused(train(model), STORAGE, "the disk is full", "Free some space")
    assert list((folder / "run" / "checkpoints").iterdir()) == []
    assert not [name for name in files_below(folder) if "partial" in name]


def test_a_disk_without_room_for_a_checkpoint_is_refused(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.core import files

    monkeypatch.setattr(files, "_free_bytes", lambda path: 1000)
    assert_refused(train(model), STORAGE, "are needed", "train.keep_last")


def test_a_real_full_disk(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system of 256 KiB, where this user may mount one, and with a forecast that is too low."""
    from prefopt.train import checkpoint

    monkeypatch.setattr(checkpoint, "checkpoint_bytes", lambda training: 0)
    (folder / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder / "small"], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        done = train(model, "train.output_dir=small/run", f"reference.cache_dir={folder / 'cache'}")
        assert_refused(done, STORAGE, "the disk is full")
        assert not [name for name in files_below(folder / "small") if "partial" in name]
    finally:
        subprocess.run(["umount", folder / "small"], check=True)


@pytest.mark.parametrize("words", [["report", "."], ["report", "nowhere"]])
def test_a_folder_that_is_no_run_has_no_report(folder: Path, words: list[str]) -> None:
    assert_refused(prefopt(*words), STORAGE, "is not a run folder", "prefopt runs")
    assert files_below(folder) == {"rows.jsonl"}


def test_a_model_that_is_no_run_needs_its_reference_to_be_evaluated(folder: Path, model: Path) -> None:
    assert_refused(prefopt("evaluate", model), USAGE, "is not a run folder", "--reference")
    assert_refused(prefopt("score", model, "rows.jsonl", "-o", "out.jsonl"), USAGE, "--reference")


SAMPLES = '{"prompt": "What?", "responses": ["a", "b b"]}\n'

REWARDS: dict[str, tuple[str, int, list[str]]] = {
    "missing module": ("no_such_module:score", USAGE, ['there is no module "no_such_module"']),
    "missing function": ("rewards_here:none", USAGE, ['no function "none"']),
    "broken module": ("broken_here:score", USAGE, ["importing it failed", "name 'undefined'"]),
    "unknown": ("lenght", USAGE, ['did you mean "length"?']),
    "wrong count": ("rewards_here:too_few", DATA, ["gave 1 scores for 2 responses"]),
    "not numbers": ("rewards_here:words", DATA, ["not a finite number"]),
    "NaN": ("rewards_here:nan", DATA, ["nan", "not a finite number"]),
    "no list": ("rewards_here:nothing", DATA, ["NoneType"]),
    "no argument": ("min_words", USAGE, ["needs a whole number", "min_words:3"]),
    "raises": ("rewards_here:fails", DATA, ["rewards_here:fails", "the judge is asleep"]),
}


@pytest.mark.parametrize("name", list(REWARDS))
def test_a_reward_that_cannot_be_used_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (folder / "samples.jsonl").write_text(SAMPLES)
    (folder / "rewards_here.py").write_text(
        "def too_few(prompts, responses): return [1.0]\n"
        "def words(prompts, responses): return ['good' for _ in responses]\n"
        "def nan(prompts, responses): return [float('nan') for _ in responses]\n"
        "def nothing(prompts, responses): return None\n"
        "def fails(prompts, responses): raise RuntimeError('the judge is asleep')\n"
    )
    (folder / "broken_here.py").write_text("undefined\n")
    for module in ("rewards_here", "broken_here"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    reward, code, parts = REWARDS[name]
    assert_refused(prefopt("label", "samples.jsonl", "-r", reward, "-o", "pairs.jsonl"), code, *parts)
    assert not (folder / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SAMPLES + '{"prompt": "What?"\n', ["samples.jsonl:2", "is not a line of samples"]),
        ('{"prompt": "What?", "responses": "a"}\n', ["samples.jsonl:1", "is not a line of samples"]),
        ('{"prompt": "What?", "responses": ["a", "c"]}\n', ["no pair could be made"]),
        (None, ["samples.jsonl", "cannot be read"]),
    ],
)
def test_samples_that_cannot_be_labelled_are_refused(folder: Path, text: str | None, parts: list[str]) -> None:
    if text is not None:
        (folder / "samples.jsonl").write_text(text)
    assert_refused(prefopt("label", "samples.jsonl", "-r", "length", "-o", "pairs.jsonl"), DATA, *parts)
    assert not (folder / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["nowhere.txt"], DATA, ["nowhere.txt"]),
        (["empty.txt"], DATA, ["empty.txt", "holds no prompts"]),
        (["odd.jsonl"], DATA, ["odd.jsonl"]),
        (["one.txt", "-n", "0"], USAGE, ["n: found 0"]),
        (["one.txt", "--temperature", "-1"], USAGE, ["temperature"]),
        (["one.txt", "--top-p", "0"], USAGE, ["top_p"]),
        (["one.txt", "--max-new-tokens", "500"], MODEL, ["context of 128"]),
    ],
)
def test_sampling_that_cannot_be_done_is_refused(
    folder: Path, model: Path, words: list[str], code: int, parts: list[str]
) -> None:
    (folder / "empty.txt").write_text("\n\n")
    (folder / "one.txt").write_text("What of my boat?\n")
    (folder / "odd.jsonl").write_text('{"text": "a"}\n')
    assert_refused(prefopt("sample", *words, "-m", model, "-o", "out.jsonl"), code, *parts)
    assert not (folder / "out.jsonl").exists()


def test_a_wrong_reference_cache_is_found_before_the_first_update(folder: Path, model: Path) -> None:
    import numpy as np

    words = ["reference.cache_dir=cache"]
    assert train(model, *words).code == 0
    part = next((folder / "cache").rglob("part-*.npz"))
    with np.load(part) as stored:
        kept = {name: stored[name] for name in stored.files}
    np.savez(part, **{**kept, "values": kept["values"] - 1})
    assert_refused(train(model, *words, "train.output_dir=again"), TRAINING, "rows.jsonl:", "differs from its reference")
    part.write_bytes(part.read_bytes()[:100])
    assert_refused(train(model, *words, "train.output_dir=third"), STORAGE, "damaged", "Delete the file")


def test_a_fault_of_ours_is_called_one_and_debug_shows_it(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt import pipeline

    def faulty(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(pipeline, "train_run", faulty)
    done = train(model)
    assert done.code == 1
    assert done.err.strip().startswith("error: ZeroDivisionError: division by zero\n  This is a fault of prefopt")
    with pytest.raises(ZeroDivisionError):
        prefopt("--debug", "train", f"model.name={model}", "data.train=rows.jsonl")
