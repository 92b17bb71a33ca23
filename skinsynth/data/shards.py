"""Datasets on disk: tar shards that plain webdataset reads, one small index per shard, one manifest, written last.

::

    shards/isic-train/
      request.json      what was asked for; another request for the same folder is refused
      00000.tar         samples <key>.<ext>, one after the other
      parts/00000.json  count, sha256, keys, offsets, columns: written after its tar, so a part means a whole shard
      manifest.json     counts, classes, shards with checksums, set-aside samples, lineage: written after all parts

A tar's bytes depend on its samples alone (no times, no owners), so a shard made twice is the same twice.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skinsynth.errors import UserError
from skinsynth.run import read_json, sha256_file, sync, write_json, write_text

KEY = re.compile(r"[A-Za-z0-9_-]{1,120}")  # no dots (webdataset's separator), no slashes, nothing that leaves a folder


class ShardWriter:
    """Writes one shard: ``with ShardWriter(folder, 3) as shard: shard.add("ISIC_1", {"jpg": ..., "json": ...}, target=0)``.

    Nothing is visible before the block ends well; then the tar is, and after it the part.
    """

    def __init__(self, folder: Path, index: int):
        self.folder, self.name = folder, f"{index:05d}"
        self.keys: list[str] = []
        self.members: list[dict[str, list[int]]] = []  # per sample: extension -> [offset, bytes]
        self.columns: dict[str, list[Any]] = {}
        self.set_aside: list[dict[str, str]] = []
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> ShardWriter:
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f".{self.name}.tar.*.tmp"):  # left by a task that died
            stale.unlink(missing_ok=True)
        self.temp = self.folder / f".{self.name}.tar.{os.getpid()}.tmp"
        self.file = open(self.temp, "wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, files: dict[str, bytes], **columns: Any) -> None:
        """``columns`` (small values: target, group, seed ...) go to the part, where they are found without reading the tar."""
        if not KEY.fullmatch(key):
            raise UserError(f"sample key '{key}' cannot be used: letters, digits, '_' and '-' only")
        places = {}
        for extension, data in files.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            places[extension] = [self.tar.offset + tarfile.BLOCKSIZE, len(data)]
            self.tar.addfile(info, io.BytesIO(data))
        self.keys.append(key)
        self.members.append(places)
        for name, value in columns.items():
            self.columns.setdefault(name, []).append(value)

    def skip(self, key: str, reason: str) -> None:
        """Notes a sample that is left out."""
        self.set_aside.append({"key": key, "reason": reason})

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.tar.close()
                self.file.flush()
                os.fsync(self.file.fileno())
                self._commit()
        finally:
            self.temp.unlink(missing_ok=True)  # gone already where all went well; closing a file on a full disk may fail again
            self.file.close()

    def _commit(self) -> None:
        part = {"shard": f"{self.name}.tar", "count": len(self.keys), "bytes": self.temp.stat().st_size,
                "sha256": sha256_file(self.temp), "keys": self.keys, "members": self.members, "columns": self.columns,
                "set_aside": self.set_aside, **self.extra}
        os.replace(self.temp, self.folder / f"{self.name}.tar")
        sync(self.folder)
        write_text(part_path(self.folder, int(self.name)), json.dumps(part))


def part_path(folder: Path, index: int) -> Path:
    return folder / "parts" / f"{index:05d}.json"


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
        lines = [f"{k}: {found.get(k)} -> {request.get(k)}" for k in sorted(found.keys() | request.keys()) if found.get(k) != request.get(k)]
        raise UserError(f"{folder} was made from another request:\n  " + "\n  ".join(lines) + "\ntake another data.name or run, or delete the folder")


def write_manifest(folder: Path, shards: int, **facts: Any) -> dict[str, Any]:
    """Merges the parts; call it when all are present. Writing it twice is harmless."""
    parts = [json.loads(part_path(folder, i).read_text()) for i in range(shards)]
    targets = Counter(str(t) for part in parts for t in part["columns"].get("target", []))
    manifest = {
        "count": sum(part["count"] for part in parts),
        "classes": dict(sorted(targets.items())),
        "shards": [{k: part[k] for k in ("shard", "count", "bytes", "sha256")} for part in parts],
        "set_aside": [item for part in parts for item in part["set_aside"]],
        **facts,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


@dataclass
class Dataset:
    """A finished dataset: its manifest, and where each sample lies. Samples are numbered 0 .. len-1 in shard order."""

    folder: Path
    manifest: dict[str, Any]
    keys: list[str]
    columns: dict[str, list[Any]]
    places: list[tuple[int, dict[str, list[int]]]]  # shard number, extension -> [offset, bytes]
    _files: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Raises ``UserError`` where the dataset is missing, unfinished or has lost a shard."""
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            raise UserError(f"dataset {folder} is not there or not finished (no manifest.json): run the stage that makes it")
        keys: list[str] = []
        columns: dict[str, list[Any]] = {}
        places: list[tuple[int, dict[str, list[int]]]] = []
        for number, shard in enumerate(manifest["shards"]):
            path = folder / shard["shard"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"{path} is missing or has not the {shard['bytes']} bytes of the manifest: delete {folder} and make it again")
            part = json.loads(part_path(folder, number).read_text())
            keys += part["keys"]
            places += [(number, members) for members in part["members"]]
            for name, values in part["columns"].items():
                columns.setdefault(name, []).extend(values)
        return cls(folder, manifest, keys, columns, places)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int, extension: str) -> bytes:
        """The content of one file of one sample, by its offset: no scan of the tar."""
        number, members = self.places[index]
        if number not in self._files:
            self._files[number] = os.open(self.folder / self.manifest["shards"][number]["shard"], os.O_RDONLY)
        offset, size = members[extension]
        return os.pread(self._files[number], size, offset)

    def json(self, index: int) -> dict[str, Any]:
        return json.loads(self.read(index, "json"))

    def image(self, index: int) -> np.ndarray:
        """uint8 (height, width, 3), RGB."""
        return decode(self.read(index, "jpg"))

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
        start = sum(shard["count"] for shard in self.manifest["shards"][:number])
        yield from range(start, start + self.manifest["shards"][number]["count"])

    def verify(self) -> list[str]:
        """The shards whose content is not that of the manifest."""
        return [s["shard"] for s in self.manifest["shards"] if sha256_file(self.folder / s["shard"]) != s["sha256"]]

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def decode(data: bytes) -> np.ndarray:
    """JPEG bytes -> uint8 (height, width, 3), RGB. For our own shards; foreign files go through ``isic.read_image``."""
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("not an image that can be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def to_npy(values: np.ndarray) -> bytes:
    """The content of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """Raises ``ValueError`` where the array holds Python objects: nothing is unpickled."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 (height, width, 3), RGB -> JPEG bytes; the same bytes for the same pixels."""
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()
