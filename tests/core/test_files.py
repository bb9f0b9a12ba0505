"""Files are whole or absent, and a disk that is full or locked is said in words."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import StorageError
from prefopt.core.files import (
    cache_root,
    check_writable,
    digest,
    read_json,
    storage_errors,
    whole_file,
    write_json,
    write_text,
)
from prefopt.core.run_folder import MANIFEST, RunFolder, checkpoint_is_complete, find_runs, open_run


class Broken(Exception):
    """An error within the block that writes."""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def write_half(path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("half")
        raise Broken


def test_an_error_within_the_block_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        write_half(tmp_path / "new")
    assert contents(tmp_path) == {}
    write_text(tmp_path / "old", "before")
    with pytest.raises(Broken):
        write_half(tmp_path / "old")
    assert contents(tmp_path) == {"old": "before"}


def test_the_file_appears_when_the_block_ends_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.parent == path.parent
    write_text(path, "newer")
    assert contents(path.parent) == {"file": "newer"}


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full") as raised, whole_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "Free some space" in raised.value.todo and raised.value.exit_code == 6
    assert contents(tmp_path) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_full_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"), storage_errors(tmp_path):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    for write in (lambda: write_text(tmp_path / "file", "x"), lambda: check_writable(tmp_path)):
        with pytest.raises(StorageError, match="cannot be written") as raised:
            write()
        assert str(tmp_path) in raised.value.what and "Choose a folder" in raised.value.todo


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be written"):
            check_writable(folder)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), storage_errors(tmp_path):
        raise InterruptedError(errno.EINTR, "interrupted")


def test_too_little_space_is_found_before_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="are needed"):
        check_writable(tmp_path, needed_bytes=2**80)
    check_writable(tmp_path / "new", needed_bytes=1)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_digest_knows_its_parts_and_their_boundaries() -> None:
    names = [digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("ab", "c", ""), digest()]
    assert len(set(names)) == len(names) and {len(name) for name in names} == {32}
    assert digest("ä") == digest("ä".encode())


def test_json_comes_back_and_what_is_not_json_is_named(tmp_path: Path) -> None:
    value = {"a": [1, None, "é\u2028"], "b": {"c": 1e-9}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    (tmp_path / "bad.json").write_bytes(b'{"a": \xff')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(StorageError, match=name):
            read_json(tmp_path / name)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("PREFOPT_CACHE")
    assert cache_root() == Path.home() / ".cache" / "prefopt"


def checkpoint(run: RunFolder, step: int, *, listed: int = 4) -> Path:
    folder = run.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    write_json(folder / MANIFEST, {"files": {"model.safetensors": listed}})
    return folder


def test_only_whole_checkpoints_count_oldest_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.complete_checkpoints() == []
    whole = [checkpoint(run, 2), checkpoint(run, 10)]
    short = checkpoint(run, 30, listed=5)
    unlisted = checkpoint(run, 40)
    (unlisted / MANIFEST).unlink()
    empty = checkpoint(run, 50)
    (empty / "model.safetensors").unlink()
    assert not any(checkpoint_is_complete(folder) for folder in (short, unlisted, empty))
    assert run.complete_checkpoints() == whole


def test_a_run_is_a_folder_with_its_configuration_and_events(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/er"):
        run = RunFolder(tmp_path / name)
        run.write("config.json", {})
        run.log().write("start", step=0)
    RunFolder(tmp_path / "model").write("config.json", {"model_type": "llama"})
    assert [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "b", "deep/er"]
    with pytest.raises(StorageError, match="not a run folder"):
        open_run(tmp_path / "nothing")


def test_samples_come_back_and_a_broken_file_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [{"prompt": "é\u2028\n", "policy": "x"}, {"prompt": "", "policy": "y"}]
    assert run.samples() == []
    run.write_samples(rows)
    assert run.samples() == rows
    (tmp_path / "samples.jsonl").write_text('{"prompt": ')
    with pytest.raises(StorageError, match=r"samples\.jsonl"):
        run.samples()
