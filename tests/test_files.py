"""Whole writes, and who wrote what."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from skinsynth import files
from skinsynth.files import locked


def test_a_write_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_gets_its_name_once_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights do, which are written by other libraries: a score that was chosen by them is durable, so they must be."""
    temp, final, synced, fsync, replace = tmp_path / ".weights.tmp", tmp_path / "weights", set(), os.fsync, os.replace
    for folder in (temp / "unet", final):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(folder.name)

    def note(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(old: Path, new: Path) -> None:
        assert synced == {path.stat().st_ino for path in (temp, *temp.rglob("*"))}
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    files.put_in_place(temp, final)
    assert [path.name for path in final.iterdir()] == ["unet"]
    assert tmp_path.stat().st_ino in synced, "the rename too"


def test_a_file_of_another_library_gets_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file, before = tmp_path / "model.safetensors", os.umask(0o027)
    try:
        save_file({}, file)
        files.mode_by_umask(file)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_only_a_file_of_this_very_host_can_be_told_to_be_a_dead_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "node1")
    alive = f"{os.getpid()}-{files.birth(os.getpid()):.0f}"
    assert files.is_spare(Path(f".00000.tar.node1-{os.getpid()}-12.tmp"))
    assert not files.is_spare(Path(f".00000.tar.node1-{alive}.tmp"))
    for other in ("gpunode1", "gpu-node1", "node12", "node1-gpu"):
        assert not files.is_spare(Path(f".00000.tar.{other}-{os.getpid()}-12.tmp")), other


def test_processes_of_the_same_number_on_two_nodes_do_not_share_a_temp_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second node writes the same file while the first is about to rename its own, as tasks of one array may."""
    replace, wrote = os.replace, []

    def rename(temp: Path, final: Path) -> None:
        if not wrote:
            wrote.append(temp)
            monkeypatch.setattr("platform.node", lambda: "node2")
            files.write_bytes(final, b"same")
        replace(temp, final)

    monkeypatch.setattr("platform.node", lambda: "node1")
    monkeypatch.setattr(os, "replace", rename)
    files.write_bytes(tmp_path / "x.npy", b"same")
    assert (tmp_path / "x.npy").read_bytes() == b"same"
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_lock_is_taken_all_the_same() -> None:
    """In a group's folder, where who comes second may not write it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = Path(name) / ".set.lock"
        with locked(path):
            pass
        path.chmod(0o644)
        os.seteuid(65534)
        try:
            with locked(path):
                pass
        finally:
            os.seteuid(0)


def test_a_lock_in_a_folder_that_is_not_to_be_written_to_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the lock is not there. (A superuser may write everywhere.)"""
    real = open

    def refused(path: Any, mode: str = "r", *more: Any, **keys: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, *more, **keys)

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError), files.locked(tmp_path / ".lock"):
        pass
    (tmp_path / ".lock").touch()
    with files.locked(tmp_path / ".lock"):
        pass
