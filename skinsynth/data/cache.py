"""Datasets that lie elsewhere (``data.remote``): on a web server, behind a command, in a folder of a slow file system.

``prepare`` brings their manifests and parts (``adopt``): small, and all that says which sample lies where. A tar is brought whole
when its first sample is read, checked against the manifest, kept in ``data.cache``, and then read like any other. However many
ranks and threads of a machine ask, one brings it and the others wait.

``webdataset.gopen`` is not used: it hides the status of an http answer behind curl, tries 30 times what the server refuses, and
opens no pipe under ``WDS_SECURE=1``. A command comes from the configuration alone; what was fetched can name none.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from skinsynth.data import withdrawn
from skinsynth.data.dataset import Dataset, Handle, check_part
from skinsynth.data.shards import INDEX_ALONE, SHARD, claim, part_path
from skinsynth.errors import UserError
from skinsynth.files import is_spare, locked, owner, sha256_file, sync, write_bytes
from skinsynth.knobs import Config, Data
from skinsynth.run import SPLITS, RunDir

TRIES, PAUSE, TIMEOUT = 3, 1.0, 60  # of an http request; seconds after the first failure, twice as long after the second; seconds of silence

SILENT = 600  # seconds without a byte, after which a command is stopped: a tape may be slow to begin
ABANDONED = 3600  # seconds since anything was written to a tar that is being brought, after which nobody brings it any more


def open_dataset(cfg: Config, run: RunDir, kind: str, tolerate: bool = False) -> Dataset:
    """``Dataset.open`` of one of the run's datasets; with ``data.remote``, the tars of prepared ones are brought when they are read."""
    folder = run.dataset(cfg, kind)
    if not cfg.data.remote or kind not in SPLITS:
        return Dataset.open(folder, tolerate)
    if _is_folder(cfg.data.remote):
        _bring_withdrawn(cfg.data.remote, [folder])
    return Dataset.open(folder, tolerate, Cache(cfg.data, folder.name).open)


def adopt(cfg: Config, run: RunDir) -> dict[str, dict[str, Any]]:
    """Brings the index (manifest and parts) of every split into ``data.shards``, and what is withdrawn there; returns the manifests.

    Raises:
        UserError: it cannot be fetched, is no index of prepared images of this size, or another dataset has the name here.
    """
    found = {split: _adopt_split(cfg, run.dataset(cfg, split)) for split in SPLITS}
    _bring_withdrawn(cfg.data.remote or "", [run.dataset(cfg, split) for split in SPLITS])
    return found


def _bring_withdrawn(remote: str, folders: list[Path]) -> None:
    """Who withdrew where the datasets lie is withdrawn here as well: by the datasets' marks there, and those of their home, which say nothing of
    other datasets here."""
    home = _withdrawn_there(remote, withdrawn.NAME)
    for folder in folders:
        withdrawn.merge(folder, _withdrawn_there(remote, f"{folder.name}/{withdrawn.NAME}"))
        withdrawn.merge(folder, home, withdrawn.THERE)


def _withdrawn_there(remote: str, name: str) -> withdrawn.Marks:
    try:
        content = fetch_bytes(remote, name, optional=True)
        if not content:  # a command may fail, and its pipeline not
            raise UserError(f"{remote} gave nothing for {name}")
    except NotThere:
        return {}
    except (UserError, OSError) as error:  # a command's failure may mean that there is no such file; so may a bucket's refusal (403)
        print(f"whether anybody withdrew there is not known where this has no {name}: {error}")
        return {}
    try:
        return {str(group): {"keys": found["keys"], "why": str(found["why"]), "kind": found.get("kind")}
                for group, found in json.loads(content)["groups"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"data.remote: what {remote} gives for {name} is no list of who withdrew") from None


def _adopt_split(cfg: Config, folder: Path) -> dict[str, Any]:
    remote = cfg.data.remote or ""
    content = fetch_bytes(remote, f"{folder.name}/manifest.json")
    manifest = _parse(remote, f"{folder.name}/manifest.json", content)
    _check_manifest(remote, folder.name, manifest, cfg.prepare.size)
    with locked(folder / ".index.lock"):
        claim(folder, manifest["request"])
        (folder / INDEX_ALONE).touch()
        if (folder / "manifest.json").exists():
            if (folder / "manifest.json").read_bytes() != content:
                raise UserError(f"{folder} is not the dataset that lies at {remote}: choose another data.name, or delete the folder")
            return manifest
        for number, shard in enumerate(manifest["shards"]):
            name = f"parts/{number:05d}.json"
            part = fetch_bytes(remote, f"{folder.name}/{name}")
            check_part(Path(f"{remote}/{folder.name}/{name}"), shard, _parse(remote, f"{folder.name}/{name}", part))
            tar = folder / shard["shard"]  # of a preparation that was broken off here, and may have been another
            if tar.exists() and sha256_file(tar) != shard["sha256"]:
                tar.unlink()
            write_bytes(part_path(folder, number), part)
        write_bytes(folder / "manifest.json", content)
    return manifest


def _check_manifest(remote: str, name: str, manifest: Any, size: int) -> None:
    where = f"data.remote: {name}/manifest.json at {remote}"
    try:
        names, facts = [shard["shard"] for shard in manifest["shards"]], (manifest["kind"], manifest["size"])
        complete = all(shard.keys() >= {"bytes", "count", "sha256"} for shard in manifest["shards"]) and isinstance(manifest["request"], dict)
    except (KeyError, TypeError, AttributeError):
        complete, names, facts = False, [], ("", 0)
    if not complete or facts[0] != "real":
        raise UserError(f"{where} is no manifest of prepared images: give the place under which {name} lies")
    if facts[1] != size:
        raise UserError(f"{where} is of images of {facts[1]} pixels, the configuration's are of {size}: set prepare.size={facts[1]}")
    bad = [found for found in names if not SHARD.fullmatch(str(found))]
    if bad:
        raise UserError(f"{where}: '{bad[0]}' cannot be used as a name: the dataset was not made by skinsynth")


def _parse(remote: str, name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise UserError(f"data.remote: what {remote} gives for {name} is not JSON") from None


class Cache:
    """The tars of one remote dataset on this machine, the least recently opened of which make room above ``data.cache_gb``.

    The limit is that of all splits of ``data.name`` together, and nothing else is ever deleted. A tar that is open stays readable, and takes its
    room on the disk until it is closed.
    """

    def __init__(self, data: Data, name: str):
        self.remote, self.name = data.remote or "", name
        self.root = Path(data.cache or data.shards)
        self.folders = [self.root / f"{data.name}-{split}" for split in SPLITS]
        self.limit = None if data.cache_gb is None else int(data.cache_gb * 1e9)
        self.wrong: dict[str, str] = {}  # tar -> why it is not asked for again

    def open(self, shard: dict[str, Any], doubt: bool = False) -> Handle:
        """An open tar (``shard``, ``bytes``, ``sha256`` as in the manifest), brought first where it is not there whole.

        ``doubt``: a sample in it was not what it should be, so it is brought again where its hash is another one.

        Raises:
            UserError: it cannot be fetched.
            OSError: what is fetched is, twice, not what the manifest says.
        """
        path = self.root / self.name / shard["shard"]
        with suppress(FileNotFoundError):  # another rank doubts it too
            if doubt and _whole(path, shard) and sha256_file(path) != shard["sha256"]:
                path.unlink()
        while True:
            if not _whole(path, shard):
                with locked(path.with_name(f".{path.name}.lock")):
                    if not _whole(path, shard):  # another rank or thread may have brought it meanwhile
                        self._bring(path, shard)
            with suppress(FileNotFoundError):  # another rank may just have made room
                handle = Handle(path)
                with suppress(OSError):  # another user brought it, or the cache can only be read: it is not marked as used
                    os.utime(path)
                return handle

    def _bring(self, path: Path, shard: dict[str, Any]) -> None:
        for temp in filter(_abandoned, path.parent.glob(f".{path.name}.*.tmp")):
            temp.unlink(missing_ok=True)
        temp = path.with_name(f".{path.name}.{threading.get_ident()}.{owner()}.tmp")
        self._make_room(shard["bytes"])
        try:
            for _ in range(0 if path.name in self.wrong else 2):
                with open(temp, "w+b") as file:
                    fetch(self.remote, f"{self.name}/{path.name}", file)
                    wrong = _wrong(file, shard)
                    os.fsync(file.fileno())
                if not wrong:
                    os.replace(temp, path)
                    sync(path.parent)
                    self._make_room(0, path)  # others may have brought theirs meanwhile
                    return
                self.wrong[path.name] = wrong
            raise OSError(0, self.wrong[path.name])
        finally:
            temp.unlink(missing_ok=True)

    def _make_room(self, needed: int, keep: Path | None = None) -> None:
        if self.limit is None:
            return
        found = []
        for path in (tar for folder in self.folders for tar in folder.glob("*.tar")):
            with suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = needed + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _abandoned(temp: Path) -> bool:
    """By a process that died. The lock says nothing of one on another host, where the file system's locks may not reach."""
    with suppress(FileNotFoundError):
        return is_spare(temp) or time.time() - temp.stat().st_mtime > ABANDONED
    return False


def _wrong(file: BufferedRandom, shard: dict[str, Any]) -> str:
    """In what a fetched tar differs from the manifest; empty when it does not."""
    size = file.seek(0, os.SEEK_END)
    if size != shard["bytes"]:
        return f"as fetched the tar has {size} bytes, not {shard['bytes']}"
    file.seek(0)
    return "" if hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"] else "as fetched the tar has another sha256"


def _whole(path: Path, shard: dict[str, Any]) -> bool:
    """What is there was checked when it was brought; a later change of its size is seen, one inside it by the samples' checksums."""
    try:
        return path.stat().st_size == shard["bytes"]
    except FileNotFoundError:
        return False


# ---- fetching ----

class NotThere(UserError):
    """The remote answers, and has no such file."""


def _is_folder(remote: str) -> bool:
    return not remote.startswith("pipe:") and "://" not in remote


def fetch_bytes(remote: str, name: str, optional: bool = False) -> bytes:
    """The content of a small file; of one that may be missing, a command is asked once only."""
    with tempfile.TemporaryFile() as file:
        fetch(remote, name, file, 1 if optional else TRIES)
        file.seek(0)
        return file.read()


def fetch(remote: str, name: str, to: IO[bytes], tries: int = TRIES) -> None:
    """Copies ``name`` (``isic-train/00000.tar``) from the remote into an empty file.

    Raises:
        UserError: it is not there or not to be had; the message names the URL, the command or the path.
    """
    if remote.startswith("pipe:"):
        return _from_command(remote.removeprefix("pipe:"), name, to, tries)
    if remote.startswith(("http://", "https://")):
        return _from_web(f"{remote.rstrip('/')}/{name}", to)
    if "://" in remote:
        raise UserError(f"data.remote={remote}: give an http(s) URL, a folder, or a command that writes the file to its standard output, for example "
                        "'pipe:aws s3 cp s3://bucket/shards/{name} -'")
    try:
        with open(Path(remote) / name, "rb") as source:
            shutil.copyfileobj(source, to, 1 << 20)
    except FileNotFoundError:
        raise NotThere(f"data.remote: {Path(remote) / name} does not exist: give the folder in which the prepared datasets lie") from None


def _from_command(template: str, name: str, to: IO[bytes], tries: int) -> None:
    """A command that fails is tried again: what it asks may be busy, or the connection broken."""
    if "{name}" not in template:
        raise UserError(f"data.remote=pipe:{template}: the command must hold {{name}}, which stands for the file, for example isic-train/00000.tar")
    command = template.replace("{name}", shlex.quote(name)).strip()
    for attempt in range(tries):
        _again(attempt, to)
        with tempfile.TemporaryFile() as words:
            process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=to, stderr=words, start_new_session=True)
            silent = _wait(process, to)
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()
        if not silent and not process.returncode:
            return
        if silent:
            break
    how = f"gave nothing for {SILENT} s and was stopped" if silent else f"ended with {process.returncode}{f', {tries} times' * (tries > 1)}"
    raise UserError(f"data.remote: the command '{command}' {how}{': ' + said[-1] if said else ''}")


def _again(attempt: int, to: IO[bytes]) -> None:
    """Waits before another try than the first, for which the file is emptied."""
    if attempt:
        time.sleep(PAUSE * 2 ** (attempt - 1))
    to.seek(0)
    to.truncate()


def _wait(process: subprocess.Popen[bytes], to: IO[bytes]) -> bool:
    """Until a command has ended; one whose output grows no more is stopped with all that it started: then True."""
    size, since, pause = 0, time.monotonic(), 0.005
    try:
        while process.poll() is None:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            now = os.fstat(to.fileno()).st_size
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > SILENT:
                return True
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _from_web(url: str, to: IO[bytes]) -> None:
    """A server's trouble (5xx, 429, silence, a broken connection) is tried again; a refusal is not."""
    why: object = ""
    for attempt in range(TRIES):
        _again(attempt, to)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                shutil.copyfileobj(answer, to, 1 << 20)
            to.flush()
            length = answer.headers.get("Content-Length")  # a body that is cut off is no error to urllib
            if not length or to.tell() == int(length):
                return
            why = f"cut off after {to.tell()} of {length} bytes"
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                kind = NotThere if error.code in (404, 410) else UserError
                raise kind(f"data.remote: {url} cannot be fetched ({why}): check the address and that the file is there") from None
        except urllib.error.URLError as error:
            why = error.reason
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
    raise UserError(f"data.remote: {url} could not be fetched in {TRIES} tries ({why}): is the server up? The same command goes on later")
