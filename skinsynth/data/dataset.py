"""A finished dataset, read: samples by number, without a scan of any tar. ``shards`` writes them."""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from skinsynth.data import descent, withdrawn
from skinsynth.data.codec import decode, from_npy
from skinsynth.data.places import Places
from skinsynth.data.shards import INDEX_ALONE, KEY, SHARD, part_path
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, sha256_of

HANDLES = 64  # shards of a dataset that are open at once; canonical streams times the shards in a window should fit
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
            UserError: the dataset is missing, unfinished or withdrawn, has lost a shard or has it elsewhere, or its index is damaged or
                holds names that could leave the folder.
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
                check_here(path)
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

    @property
    def content_sha256(self) -> str:
        """Of the bytes of all tars, by their hashes in the manifest: names may stay where images change."""
        return sha256_of([shard["sha256"] for shard in self.manifest["shards"]])

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


def check_here(tar: Path) -> None:
    """Raises ``UserError`` where a tar is not here, and should not be."""
    if not tar.exists() and (tar.parent / INDEX_ALONE).exists():
        raise UserError(f"{tar} is not here: data.remote brought the index alone, and the tars lie there; give the dataset that lies there instead")


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
