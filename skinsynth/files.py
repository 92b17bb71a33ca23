"""Files that survive a power cut and are read whole or not at all; their hashes; and which process wrote one. No torch here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from skinsynth.errors import DamagedFile


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes so that a reader sees the old file or the whole new one: temp file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        with open(temp, "wb") as f:
            f.write(data)
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    write_bytes(path, text.encode(), durable)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content, or None where there is no such file. Raises ``DamagedFile`` where it is no JSON, as a file that is cut short."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged or cut short ({error}): put it back from a copy, or delete it and run again what made it") from None


def read_hint(path: Path) -> Any:
    """The same of a file that one can do without, None also where it is torn: progress is not fsynced, and a power cut may leave it empty."""
    try:
        return read_json(path)
    except ValueError:
        return None


def mode_by_umask(*files: Path) -> None:
    """Gives files the mode that any new file gets beside the first of them. safetensors lets their owner alone read what it writes, which would keep
    the rest of a group from its weights."""
    probe = files[0].with_name(f".{files[0].name}.{owner()}.tmp")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in files:
        if stat.S_IMODE(file.stat().st_mode) != mode:  # a file system that gives all files one mode may refuse to be asked
            file.chmod(mode)


def put_in_place(temp: Path, final: Path) -> None:
    """A whole folder that was written under another name. It is on the disk before it gets its own: who finds it there after a power cut finds
    it whole."""
    for path in (*temp.rglob("*"), temp):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temp, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a rename in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_or_none(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_folder(path: Path, pattern: str = "**/*") -> str:
    """One hash over the relative names and contents of the files of a folder."""
    return sha256_files(path, sorted(p for p in path.glob(pattern) if p.is_file()))


def sha256_files(path: Path, files: Iterable[Path]) -> str:
    """The same of some of them, in their order."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return total.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One holder at a time, among processes and threads of this machine (and of others, where the file system's locks reach); free again when its
    holder dies. On a file system without locks nobody waits: what is done under it must come out the same when two do it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(path, "a")  # noqa: SIM115
    except PermissionError:  # another user's, in a group's folder: to lock it, it need not be written
        if not path.exists():  # a folder that is not to be written to
            raise
        lock = open(path)  # noqa: SIM115
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def owner() -> str:
    """This process, in the name of a file that it alone writes: on a shared file system pids are not enough."""
    return f"{platform.node()}-{os.getpid()}-{birth(os.getpid()) or 0:.0f}"


def is_spare(temp: Path) -> bool:
    """Whether a file named by ``owner`` (``.name.<owner>.tmp``) was surely left by a process that died: of another host nobody can tell."""
    found = re.search(rf"\.{re.escape(platform.node())}-(\d+)-(\d+)\.tmp$", temp.name)
    return found is not None and f"{birth(int(found[1])) or 0:.0f}" != found[2]


def birth(pid: int) -> float | None:
    """When a process was started (seconds since 1970), None if it is dead: tells a process from a later one with its pid."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.NoSuchProcess, ValueError):
        return None
