"""Datasets on disk: tar shards that plain webdataset reads, one small index per shard, one manifest, written last.

::

    shards/isic-train/
      request.json      what was asked for; another request for the same folder is refused
      00000.tar         samples <key>.<ext>, one after the other
      parts/00000.json  count, sha256, keys, offsets, checksums, columns: written after its tar, so a part means a whole shard
      manifest.json     counts, classes, shards with checksums, set-aside samples, lineage: written after all parts
      withdrawn.json    samples that nobody reads any more (``withdrawn``); dropped when the dataset is opened

A tar's bytes depend on its samples alone (no times, no owners), so a shard made twice is the same twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import numpy as np

from skinsynth.data import descent, withdrawn
from skinsynth.data.codec import decode, from_npy
from skinsynth.data.places import Places
from skinsynth.errors import UserError
from skinsynth.files import is_spare, owner, read_json, sha256_file, sync, write_json, write_text

KEY = re.compile(r"[A-Za-z0-9_-]{1,120}")  # no dots (webdataset's separator), no slashes, nothing that leaves a folder
SHARD = re.compile(r"[0-9]{5,9}\.tar")
HANDLES = 64  # shards of a dataset that are open at once; canonical streams times the shards in a window should fit
BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # a tar header (mode 644) with no name, of an empty file
PART = {"shard", "sha256", "keys", "members", "columns"}  # what a part has at least
T = TypeVar("T")


class BadSample(UserError):
    """A sample that cannot be read as it was written; ``args`` are the dataset's folder, the shard, the key, and the reason."""

    def __init__(self, folder: str, shard: str, key: str, reason: str):
        super().__init__(folder, shard, key, reason)
        self.folder, self.shard, self.key, self.reason = folder, shard, key, reason

    def __str__(self) -> str:
        return (f"sample {self.key} in {self.folder}/{self.shard} {self.reason}: put the shard back from a copy, or delete {self.folder} and make it "
                "again, or train without such samples (data.on_error=skip)")


class ShardWriter:
    """Writes one shard: ``with ShardWriter(folder, 3) as shard: shard.add("ISIC_1", {"jpg": ..., "json": ...}, target=0)``.

    Nothing is visible before the block ends well; then the tar is, and after it the part.
    """

    def __init__(self, folder: Path, index: int):
        self.folder, self.name = folder, f"{index:05d}"
        self.keys: list[str] = []
        self.members: list[dict[str, list[int]]] = []  # per sample: extension -> [offset, bytes, CRC-32]
        self.columns: dict[str, list[Any]] = {}
        self.set_aside: list[dict[str, str]] = []
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        self.temp = self.folder / f".{self.name}.tar.{owner()}.tmp"
        self.file = open(self.temp, "wb", buffering=1 << 20)
        self.offset, self.sha256 = 0, hashlib.sha256()
        self._begin()
        for left in spares(self.folder, self.name):
            if is_spare(left):
                left.unlink(missing_ok=True)
        return self

    def _begin(self) -> None:
        """Before what dead tasks left of this shard is thrown away."""

    def add(self, key: str, files: dict[str, bytes], **columns: Any) -> None:
        """``columns`` (small values: target, group, seed ...) go to the part, where they are found without reading the tar."""
        if not KEY.fullmatch(key):
            raise UserError(f"sample key '{key}' cannot be used: letters, digits, '_' and '-' only")
        places = {}
        for extension, data in files.items():
            places[extension] = [self.offset + tarfile.BLOCKSIZE, len(data), zlib.crc32(data)]
            self._write(_header(f"{key}.{extension}", len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE))
        self.keys.append(key)
        self.members.append(places)
        for name, value in columns.items():
            self.columns.setdefault(name, []).append(value)

    def _write(self, *pieces: bytes) -> None:
        """Written and hashed in one go: the file need not be read again."""
        for piece in pieces:
            self.file.write(piece)
            self.sha256.update(piece)
            self.offset += len(piece)

    def skip(self, key: str, reason: str) -> None:
        """Notes a sample that is left out."""
        self.set_aside.append({"key": key, "reason": reason})

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar, then padded to a whole record
                self._write(bytes(-self.offset % tarfile.RECORDSIZE))
                self.file.flush()
                os.fsync(self.file.fileno())
                self._commit()
        finally:
            self._leave()
            self.file.close()

    def _leave(self) -> None:
        self.temp.unlink(missing_ok=True)  # gone already where all went well; closing a file on a full disk may fail again

    def _commit(self) -> None:
        """Two tasks that make the same shard give the same bytes; the second finds it there."""
        try:
            if not self.is_made():
                self._rename()
        except FileNotFoundError:  # a task that was quicker has cleaned up
            if not self.is_made():
                raise
        for left in spares(self.folder, self.name):
            left.unlink(missing_ok=True)

    def is_made(self) -> bool:
        return part_path(self.folder, int(self.name)).exists()

    def _rename(self) -> None:
        part = {"shard": f"{self.name}.tar", "count": len(self.keys), "bytes": self.offset,
                "sha256": self.sha256.hexdigest(), "keys": self.keys, "members": self.members, "columns": self.columns,
                "set_aside": self.set_aside, **self.extra}
        os.replace(self.temp, self.folder / f"{self.name}.tar")
        sync(self.folder)
        write_text(part_path(self.folder, int(self.name)), json.dumps(part))


def _header(name: str, size: int) -> bytes:
    """The 512 bytes before a file: plain ustar, no time, no owner; what ``tarfile`` writes, at a tenth of its cost.

    Raises:
        UserError: a name that does not fit.
    """
    if len(name) > tarfile.LENGTH_NAME or size >= 8**11:
        raise UserError(f"'{name}' of {size} bytes does not fit into a tar: names have up to {tarfile.LENGTH_NAME} letters, files up to 8 GiB")
    head = name.encode().ljust(tarfile.LENGTH_NAME, b"\0") + BLANK[100:124] + b"%011o\0" % size + BLANK[136:148]
    checksum = sum(head) + 8 * ord(" ") + sum(BLANK[156:])  # the checksum's own 8 bytes count as spaces
    return head + b"%06o\0 " % checksum + BLANK[156:]


INDEX_ALONE = ".index-alone"  # in a dataset whose tars lie elsewhere, and are brought when they are read


def part_path(folder: Path, index: int) -> Path:
    return folder / "parts" / f"{index:05d}.json"


def spares(folder: Path, shard: str) -> list[Path]:
    """What tasks write before it has its name; a second dot marks that of a file which has such a name itself."""
    return [*folder.glob(f".{shard}.*.tmp"), *folder.glob(f"..{shard}.*.tmp")]


def missing_parts(folder: Path, shards: int) -> list[int]:
    """The shards that are still to be made."""
    have = {p.name for p in (folder / "parts").glob("*.json")} if (folder / "parts").is_dir() else set()
    return [i for i in range(shards) if f"{i:05d}.json" not in have]


def claim(folder: Path, request: dict[str, Any]) -> None:
    """Says what the folder is to hold. The same request again is fine.

    Raises:
        UserError: the folder holds, or is being made into, something else; the differing keys are listed.
    """
    found = read_json(folder / "request.json")
    request = json.loads(json.dumps(request))  # as it will be read back: tuples become lists
    if found is None:
        if (folder / "manifest.json").exists():
            raise UserError(f"{folder} holds a dataset of unknown origin (no request.json): choose another data.name or run")
        write_json(folder / "request.json", request)
    elif found != request:
        old, new = dict(_leaves(found)), dict(_leaves(request))
        lines = [f"{k}: {_short(old.get(k))} -> {_short(new.get(k))}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        raise UserError(f"{folder} was made from another request:\n  " + "\n  ".join(lines) + "\ntake another data.name or run, or delete the folder")


def _leaves(request: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value), sections opened: of ``prepare`` only what differs is to be read."""
    for name, value in request.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 400 else f"{text[:200]} ... ({len(text)} letters)"


def write_manifest(folder: Path, shards: int, **facts: Any) -> dict[str, Any]:
    """Merges the parts, one after the other; call it when all are present. Writing it twice is harmless."""
    targets: Counter[str] = Counter()
    rows, aside = [], []
    for number in range(shards):
        part = read_json(part_path(folder, number))
        targets.update(map(str, part["columns"].get("target", [])))
        rows.append({k: part[k] for k in ("shard", "count", "bytes", "sha256")})
        aside += part["set_aside"]
    manifest = {"count": sum(row["count"] for row in rows), "classes": dict(sorted(targets.items())), "shards": rows, "set_aside": aside, **facts}
    write_json(folder / "manifest.json", manifest)
    for left in [*spares(folder, "[0-9]*"), *spares(folder / "parts", "[0-9]*")]:  # of tasks that died on other hosts
        left.unlink(missing_ok=True)
    return manifest


class Handle:
    """An open file. It is closed when nobody holds it any more, so never under a thread that reads from it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass
class Dataset:
    """A finished dataset: its manifest, and where each sample lies. Samples are numbered 0 .. len-1 in shard order.

    Reading is safe under threads. ``fetch`` opens a shard (an entry of the manifest) that may have to be brought first; called with True besides, one
    in which something is not as it was written.
    """

    folder: Path
    manifest: dict[str, Any]
    keys: list[str]
    columns: dict[str, list[Any]]
    places: Places
    fetch: Callable[..., Handle] | None = None
    _doubted: set[int] = field(default_factory=set, repr=False)  # shards in which something was not as it was written
    _files: dict[int, Handle] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, tolerate: bool = False, fetch: Callable[..., Handle] | None = None) -> Dataset:
        """With ``tolerate`` a shard that is missing or of another size is found out when its samples are read (``BadSample``).

        Raises:
            UserError: the dataset is missing, unfinished or withdrawn, has lost a shard, or its index is damaged or holds names that could leave
                the folder.
        """
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            raise UserError(f"dataset {folder} is not there or not finished (no manifest.json): run the stage that makes it")
        keys: list[str] = []
        columns: dict[str, list[Any]] = {}
        places, same, gone = Places(), dict[str, str](), gone_from(folder, manifest)
        for number, shard in enumerate(manifest["shards"]):
            part = read_json(part_path(folder, number))
            check_part(part_path(folder, number), shard, part)
            path = folder / shard["shard"]
            if not (tolerate or fetch) and (not path.is_file() or path.stat().st_size != shard["bytes"]):
                raise UserError(f"{path} is missing or has not the {shard['bytes']} bytes of the manifest: delete {folder} and make it again")
            kept = [place for place, key in enumerate(part["keys"]) if key not in gone]
            keys += [part["keys"][i] for i in kept]
            for i in kept:
                places.append(number, part["members"][i])
            for name, values in part["columns"].items():  # each text is kept once: a prompt stands at many images
                columns.setdefault(name, []).extend(same.setdefault(v, v) if isinstance(v := values[i], str) else v for i in kept)
        return cls(folder, manifest, keys, columns, places, fetch)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int, extension: str) -> bytes:
        """The content of one file of one sample, by its offset: no scan of the tar.

        Raises:
            BadSample: it is not there as it was written: a missing or truncated shard, another checksum.
        """
        try:
            return self._read(index, extension)
        except BadSample:
            if not self.fetch:
                raise
            number = self.places[index][0]
            with self._lock:  # the copy here may be damaged, and not the remote's
                if number not in self._doubted:
                    self._doubted.add(number)
                    self._files.pop(number, None)
            return self._read(index, extension)

    def _read(self, index: int, extension: str) -> bytes:
        number, members = self.places[index]
        offset, size, *checksum = members[extension]
        try:
            handle = self._handle(number)  # held until it is read, or another thread's opening might close it
            try:
                data = os.pread(handle.number, size, offset)
            except OSError as error:
                if error.errno != errno.ESTALE:  # another host replaced or deleted the file, on a network's file system
                    raise
                self._files.pop(number, None)
                handle = self._handle(number)
                data = os.pread(handle.number, size, offset)
        except OSError as error:
            if error.errno not in (0, errno.ENOENT, errno.EIO):  # a full disk, no right to read: not the sample's fault
                raise
            raise self.bad(index, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise self.bad(index, f"is cut off: its {extension} has {len(data)} bytes of {size}")
        if checksum and zlib.crc32(data) != checksum[0]:
            raise self.bad(index, f"is damaged: its {extension} has another checksum than when it was written")
        return data

    def _handle(self, number: int) -> Handle:
        found = self._files.get(number)
        if found is None:
            shard = self.manifest["shards"][number]
            found = self.fetch(shard, number in self._doubted) if self.fetch else Handle(self.folder / shard["shard"])
            with self._lock:
                self._files[number] = found
                if len(self._files) > HANDLES:
                    del self._files[next(iter(self._files))]
        return found

    def bad(self, index: int, reason: str) -> BadSample:
        return BadSample(str(self.folder), self.manifest["shards"][self.places.shards[index]]["shard"], self.keys[index], reason)

    def _decoded(self, index: int, extension: str, how: Callable[[bytes], T]) -> T:
        data = self.read(index, extension)
        try:
            return how(data)
        except Exception as error:  # whatever the bytes do to the decoder, it is the sample that is bad
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.bad(index, f"cannot be decoded: its {extension}: {reason}") from None

    def json(self, index: int) -> dict[str, Any]:
        return self._decoded(index, "json", json.loads)

    def image(self, index: int, out: np.ndarray | None = None, reduce: int = 1) -> np.ndarray:
        """uint8 (height, width, 3), RGB; into ``out`` where that is given (a place in a batch), which an image of another size does not fit.
        ``reduce``: both sides over 1, 2, 4 or 8 (see ``codec.decode``)."""
        return self._decoded(index, "jpg", lambda data: decode(data, out, reduce))

    def array(self, index: int, extension: str) -> np.ndarray:
        """A ``.npy`` file; one of Python objects is a ``BadSample``."""
        return self._decoded(index, extension, from_npy)

    def select(self, where: dict[str, Any]) -> list[int]:
        """Numbers of the samples whose columns equal the given values (or are among them, for a list).

        Raises:
            UserError: a column that the dataset does not have.
        """
        for name in where:
            if name not in self.columns:
                raise UserError(f"{self.folder} has no column '{name}' to filter on; it has {', '.join(sorted(self.columns))}")
        wanted = {name: {str(v) for v in (value if isinstance(value, list) else [value])} for name, value in where.items()}
        return [i for i in range(len(self)) if all(str(self.columns[name][i]) in values for name, values in wanted.items())]

    def shard_samples(self, number: int) -> Iterator[int]:
        """The numbers of the samples of one shard."""
        yield from self.places.of_shard(number)

    def shard_counts(self, samples: Sequence[int]) -> tuple[int, ...]:
        """How many of the samples (ascending numbers) lie in each shard, those without any left out: what ``Mixture`` wants to know."""
        return tuple(len(list(inside)) for _, inside in groupby(samples, lambda i: self.places.shards[i]))

    def verify(self) -> list[str]:
        """The shards in the folder whose content is not that of the manifest; one that a remote still has is left out."""
        here = [s for s in self.manifest["shards"] if not self.fetch or (self.folder / s["shard"]).exists()]
        return [s["shard"] for s in here if sha256_file(self.folder / s["shard"]) != s["sha256"]]

    def check_withdrawn(self) -> None:
        """Raises ``UserError`` where samples were withdrawn since the dataset was opened: what was made of them must not be kept."""
        gone = gone_from(self.folder, self.manifest) & set(self.keys)
        if gone:
            raise UserError(f"{len(gone)} samples of {self.folder} were withdrawn while they were used (first: {min(gone)}): delete what was made of "
                            "them, checkpoints included (the stage's folder in the run), and launch again, which does without them")

    def close(self) -> None:
        with self._lock:
            self._files.clear()


def parts_of(folder: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Raises ``UserError`` as ``check_part``."""
    for number, shard in enumerate(manifest["shards"]):
        part = read_json(part_path(folder, number))
        check_part(part_path(folder, number), shard, part)
        yield part


def table_of(folder: Path, manifest: dict[str, Any]) -> dict[str, list[str | None]]:
    """``descent.table`` of all samples, those that are withdrawn included."""
    tables = [descent.table(folder, part["keys"], part["columns"]) for part in parts_of(folder, manifest)]
    return {kind: [name for table in tables for name in table[kind]] for kind in descent.KINDS}


def gone_from(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """The samples that are withdrawn: by a mark, or since they are of a patient, lesion or group that the home of the datasets names, in which this
    one may not have been, or not been finished, when they withdrew.

    Raises:
        UserError: all of it is.
    """
    gone, home = withdrawn.withdrawn_keys(folder), withdrawn.of_dataset(folder)
    if home and manifest.get("kind") == "real":
        table = table_of(folder, manifest)
        lesions = home.lesions(table["patients"])
        rows = zip(table["images"], table["groups"], table["patients"], table["lesions"], strict=True)
        gone |= {str(key) for key, group, patient, lesion in rows if {group, patient} & home.people or lesion in lesions}
    if home and manifest.get("kind") == "synthetic":
        descent.check_withdrawn(manifest.get("lineage") or {}, folder.parent, str(folder))
        for part in parts_of(folder, manifest):
            groups, images = (part["columns"].get(name, [None] * len(part["keys"])) for name in ("source_group", "source"))
            gone |= {key for key, group, image in zip(part["keys"], groups, images, strict=True) if group in home.people or image in home.keys}
    return gone


def read_member(tar: IO[bytes], place: list[int]) -> bytes:
    """A file of a tar that is open, by its entry in the part's ``members``."""
    tar.seek(place[0])
    return tar.read(place[1])


def check_part(path: Path, shard: dict[str, Any], part: Any) -> None:
    """Raises ``UserError`` where a part is missing, does not belong to the manifest's shard, or holds names that could leave a folder."""
    whole = isinstance(part, dict) and part.keys() >= PART
    if not whole or (part["shard"], part["sha256"], len(part["keys"])) != (shard["shard"], shard["sha256"], shard["count"]):
        raise UserError(f"{path} is missing or does not belong to the manifest beside it: delete the dataset and make it again")
    bad = [key for key in part["keys"] if not KEY.fullmatch(key)]
    if not SHARD.fullmatch(part["shard"]) or bad:
        raise UserError(f"{path}: '{bad[0] if bad else part['shard']}' cannot be used as a name: the dataset was not made by skinsynth")
