"""How datasets are written: tar shards that plain webdataset reads, one small index per shard, one manifest, written last (``dataset`` reads them).

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

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from skinsynth.errors import UserError
from skinsynth.files import is_spare, owner, read_json, sync, write_json, write_text

KEY = re.compile(r"[A-Za-z0-9_-]{1,120}")  # no dots (webdataset's separator), no slashes, nothing that leaves a folder
SHARD = re.compile(r"[0-9]{5,9}\.tar")
INDEX_ALONE = ".index-alone"  # in a dataset whose tars lie elsewhere, and are brought when they are read
BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # a tar header (mode 644) with no name, of an empty file


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
    if not (folder / "request.json").exists():
        if (folder / "manifest.json").exists():
            raise UserError(f"{folder} holds a dataset of unknown origin (no request.json): choose another data.name or run")
        write_json(folder / "request.json", request)
    lines = changes(folder, request)
    if lines:
        raise UserError(f"{folder} was made from another request:\n  " + "\n  ".join(lines) + "\ntake another data.name or run, or delete the folder")


def changes(folder: Path, request: dict[str, Any]) -> list[str]:
    """Lines ``key: theirs -> mine`` for all that the folder's own request has otherwise."""
    found, request = read_json(folder / "request.json") or {}, json.loads(json.dumps(request))  # as it is read back: tuples become lists
    old, new = dict(_leaves(found)), dict(_leaves(request))
    return [f"{k}: {_short(old.get(k))} -> {_short(new.get(k))}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


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
