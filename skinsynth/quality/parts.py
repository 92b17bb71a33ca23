"""What is measured of the images, shard by shard: the units of ``screen``, each with one part.

A part is ``<n>.npz``, arrays with a row for each image, and, written last, ``<n>.json``:

    features   float32 (n, d)
    measures   float32 (n, 5 + RINGS)      ``defects.MEASURES``, then the radial power spectrum
    prints     int8 (n, 16, 16)            ``near.fingerprint``
    matches    float64 (n, 3)              nearest training image, similarity, nearness (``copies.Matches``); not of training images
    spectra    float64 (2, side, side // 2 + 1)    sums of ``spectrum.transforms``

Training shards also give ``train-<sha256>.npy``, their thumbnails, under the name of their content. A task that searches takes those that are there
and makes the others itself, which is cheap (they are decoded, no network runs): so tasks may run in any order, alone, and at once, and none waits.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skinsynth.data.codec import to_npy
from skinsynth.data.shards import BadSample, Dataset
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.quality import copies, defects, near, spectrum
from skinsynth.quality.features import Extractor
from skinsynth.run import Progress

REAL = ("train", "val", "test")
KINDS = (*REAL, "planted", "synthetic")  # so numbered that a synthetic set made anew leaves the parts of the real ones valid
PLANTS = (*copies.DISGUISES, "all")  # a unit each: disguised copies of training images, to measure how many are found
PLANTED = 200  # of each


@dataclass(frozen=True, order=True)
class Unit:
    """One shard of one of the datasets, or (``planted``) one disguise, whose number is ``shard``."""

    number: int
    kind: str
    shard: int
    sha256: str
    count: int


@dataclass
class Parts:
    """The units of a run and their folder. Raises ``UserError`` where one of the ``sets`` is empty."""

    cfg: Config
    folder: Path
    sets: dict[str, Dataset]
    units: list[Unit] = field(init=False)
    against: str = field(init=False)  # a hash of all training shards: what was searched

    def __post_init__(self) -> None:
        empty = [str(dataset.folder) for dataset in self.sets.values() if not len(dataset)]
        if empty:
            raise UserError(f"{', '.join(empty)} holds no images: screening compares synthetic images with real ones of all three splits: give each "
                            "a share (prepare.split) and images enough")
        self.against = _hash(self.sets["train"])
        found: list[tuple[str, int, str, int]] = []
        for kind in KINDS:
            if kind == "planted":
                found += [(kind, n, self.against, min(PLANTED, len(self.sets["train"]))) for n in range(len(PLANTS))]
            else:
                found += [(kind, n, sha256, count) for n, (sha256, count) in enumerate(_shards(self.sets[kind])) if count]
        self.units = [Unit(number, *rest) for number, rest in enumerate(found)]

    def screened(self) -> dict[str, str]:
        """Of each set a hash of its images, and of what its manifest says of them."""
        return {kind: f"{_hash(dataset)[:16]}-{sha256_file(dataset.folder / 'manifest.json')[:16]}" for kind, dataset in sorted(self.sets.items())}

    def of(self, kind: str) -> list[Unit]:
        return [unit for unit in self.units if unit.kind == kind]

    def path(self, unit: Unit, end: str) -> Path:
        return self.folder / f"{unit.number:05d}{end}"

    def made(self, unit: Unit) -> dict[str, Any]:
        """What a part was made from: another one is not taken for it."""
        return {"kind": unit.kind, "sha256": unit.sha256, "against": self.against, "batch": self.cfg.screen.batch,
                "features": self.cfg.screen.features}

    def have(self, unit: Unit) -> bool:
        part = read_json(self.path(unit, ".json"))
        return part is not None and part.get("made") == self.made(unit)

    def read(self, unit: Unit, name: str) -> np.ndarray:
        """One array of a part; the others stay on the disk."""
        with np.load(self.path(unit, ".npz"), allow_pickle=False) as arrays:
            return arrays[name]

    def column(self, kind: str, name: str) -> np.ndarray:
        """The small arrays (not features, nor prints) of all units of a kind, one after the other."""
        return np.concatenate([self.read(unit, name) for unit in self.of(kind)])

    def broken(self, kind: str) -> dict[int, str]:
        """Number of an image in its dataset -> what is wrong with it."""
        found: dict[int, str] = {}
        start = 0
        for unit in self.of(kind):
            part = read_json(self.path(unit, ".json"))
            found |= {start + int(place): what for place, what in part["broken"].items()}
            start += unit.count
        return found

    def rows(self, kind: str, name: str, wanted: np.ndarray) -> np.ndarray:
        """The rows of the images ``wanted`` (int, ascending), read one part at a time."""
        found, start = [], 0
        for unit in self.of(kind):
            here = wanted[(wanted >= start) & (wanted < start + unit.count)] - start
            if len(here):
                found.append(self.read(unit, name)[here])
            start += unit.count
        return np.concatenate(found) if found else self.read(self.of(kind)[0], name)[:0]

    def spectra(self, kinds: tuple[str, ...]) -> np.ndarray:
        """The mean of the kinds' images, float64 (2, side, side // 2 + 1); zeros where there are none."""
        units = [unit for kind in kinds for unit in self.of(kind)]
        total: Any = sum(self.read(unit, "spectra") for unit in units)
        return total / max(1, sum(unit.count for unit in units) - sum(len(self.broken(kind)) for kind in kinds))

    # ---- making ----

    def gallery(self, first: int) -> copies.Gallery:
        """All training thumbnails. Those that are missing are made, from shard ``first`` on: tasks that come at once share the work."""
        units = self.of("train")
        for unit in units[first % len(units):] + units[:first % len(units)]:
            if not self._thumbs(unit).exists():
                self._write_thumbs(unit, np.stack([copies.thumbnail(image) for _, image in self._images(unit)]))
        return copies.Gallery(np.concatenate([np.load(self._thumbs(unit), allow_pickle=False) for unit in units]))

    def _thumbs(self, unit: Unit) -> Path:
        return self.folder / f"train-{unit.sha256[:16]}.npy"

    def _write_thumbs(self, unit: Unit, thumbs: np.ndarray) -> None:
        write_bytes(self._thumbs(unit), to_npy(thumbs))

    def _images(self, unit: Unit) -> Iterator[tuple[str | None, np.ndarray]]:
        """(what is wrong or None, uint8 (size, size, 3)) of each image of a shard; zeros where something is wrong.

        Raises:
            UserError: it is a real image that is wrong.
        """
        size, dataset = self.cfg.prepare.size, self.sets[unit.kind]
        for index in dataset.shard_samples(unit.shard):
            wrong, image = _read(dataset, index, size)
            if wrong and unit.kind != "synthetic":
                raise UserError(f"{dataset.folder}: {dataset.keys[index]} {wrong}; the shard is damaged: delete {dataset.folder} and run prepare "
                                "again")
            yield wrong, image

    def inspect(self, unit: Unit, extractor: Extractor, gallery: copies.Gallery | None, progress: Progress) -> None:
        """Writes the part of one shard. ``gallery`` None: nothing is searched (training images)."""
        found, batch = Found(self.cfg.prepare.size), self.cfg.screen.batch
        for wrong, image in self._images(unit):
            found.add(wrong, image)
            if len(found.images) == batch:
                found.close(extractor)
                progress.advance(batch)
        progress.advance(len(found.images))
        arrays = found.arrays(extractor)
        thumbs = np.stack(found.thumbs)
        if gallery:
            arrays["matches"] = _columns(gallery.search(thumbs, _threads()))
        elif not self._thumbs(unit).exists():
            self._write_thumbs(unit, thumbs)
        self._write(unit, arrays, found.broken)

    def plant(self, unit: Unit, gallery: copies.Gallery, progress: Progress) -> None:
        """Writes the part of one disguise: the matches of disguised copies of training images."""
        train = self.sets["train"]
        chosen = np.random.default_rng(self.cfg.seed).permutation(len(train))[:unit.count]
        thumbs = np.stack([copies.thumbnail(copies.plant(train.image(int(i)), int(i), PLANTS[unit.shard])) for i in chosen])
        self._write(unit, {"matches": _columns(gallery.search(thumbs, _threads()))}, {})
        progress.advance(unit.count)

    def _write(self, unit: Unit, arrays: dict[str, np.ndarray], broken: dict[int, str]) -> None:
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        write_bytes(self.path(unit, ".npz"), file.getvalue())
        write_json(self.path(unit, ".json"), {"made": self.made(unit), "broken": broken})

    # ---- near-duplicates ----

    def compare(self, unit: Unit, limit: float) -> None:
        """Looks for near-duplicates of a synthetic shard in itself and in all shards whose parts are there, and notes what it compared.

        A task writes its part first and looks for the others' then, so that of any two shards at least one sees the other; what a slow file
        system hid from both, ``pairs`` makes good. Two shards compared twice do no harm.
        """
        others = [other for other in self.of("synthetic") if self.have(other)]
        pairs = [self._near(min(unit, other), max(unit, other), limit) for other in others]
        write_bytes(self.path(unit, ".near.npy"), to_npy(np.concatenate(pairs)))
        write_json(self.path(unit, ".near.json"), {"made": self._compared(limit), "others": [other.number for other in others]})

    def _compared(self, limit: float) -> dict[str, Any]:
        return {"set": _hash(self.sets["synthetic"]), "limit": limit}

    def _near(self, earlier: Unit, later: Unit, limit: float) -> np.ndarray:
        first = {unit.number: sum(u.count for u in self.of("synthetic")[:unit.shard]) for unit in (earlier, later)}
        prints = self.read(earlier, "prints"), self.read(later, "prints")
        return near.near_pairs(*prints, limit, same=earlier == later) + np.array([first[later.number], first[earlier.number]])

    def pairs(self, limit: float) -> np.ndarray:
        """int64 (pairs, 2): numbers of (later, earlier) synthetic images that are near-duplicates, sorted, each pair once; of each later one the
        first ``near.KEPT``."""
        units, found, seen = self.of("synthetic"), [np.empty((0, 2), np.int64)], set()
        made = self._compared(limit)
        for unit in units:
            noted = read_json(self.path(unit, ".near.json"))
            if noted and noted["made"] == made:
                seen |= {(min(unit.number, n), max(unit.number, n)) for n in noted["others"]}
                found.append(np.load(self.path(unit, ".near.npy"), allow_pickle=False))
        found += [self._near(a, b, limit) for a in units for b in units if a.number <= b.number and (a.number, b.number) not in seen]
        return _first(np.unique(np.concatenate(found), axis=0))


    def held_out(self, limit: float) -> dict[int, str]:
        """Number of a synthetic image -> key of the validation or test image that it is (nearly, or mirrored): nobody may train on that."""
        units = [unit for kind in ("val", "test") for unit in self.of(kind)]
        prints = np.concatenate([self.read(unit, "prints") for unit in units])
        keys = [key for kind in ("val", "test") for key in self.sets[kind].keys]
        found: dict[int, str] = {}
        start = 0
        for unit in self.of("synthetic"):
            for image, real in near.near_pairs(prints, self.read(unit, "prints"), limit).tolist():
                found.setdefault(start + image, keys[real])
            start += unit.count
        return found


@dataclass
class Found:
    """What is gathered of one shard's images; pictures are held for one batch only."""

    size: int
    images: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    measures: list[np.ndarray] = field(default_factory=list)
    thumbs: list[np.ndarray] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    spectra: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.spectra = np.zeros((2, self.size, self.size // 2 + 1))

    def add(self, wrong: str | None, image: np.ndarray) -> None:
        if wrong:
            self.broken[len(self.thumbs)] = wrong
        powers = spectrum.transforms(image)
        self.spectra += 0 if wrong else powers
        self.measures.append(np.concatenate([defects.measure(image), spectrum.radial(powers[0])]))
        self.thumbs.append(copies.thumbnail(image))
        self.images.append(image)

    def close(self, extractor: Extractor) -> None:
        """A batch is full, or is the last."""
        self.features.append(extractor(np.stack(self.images)))
        self.images.clear()

    def arrays(self, extractor: Extractor) -> dict[str, np.ndarray]:
        if self.images:
            self.close(extractor)
        return {"features": np.concatenate(self.features), "measures": np.stack(self.measures), "spectra": self.spectra,
                "prints": np.stack([near.fingerprint(thumb) for thumb in self.thumbs])}


def _shards(dataset: Dataset) -> Iterator[tuple[str, int]]:
    """(hash, count) of each shard, as far as it may be read: where samples of it are withdrawn, its part must be made anew without them."""
    for number, shard in enumerate(dataset.manifest["shards"]):
        keys = [dataset.keys[i] for i in dataset.shard_samples(number)]
        whole = len(keys) == shard["count"]
        yield shard["sha256"] if whole else hashlib.sha256(" ".join([shard["sha256"], *keys]).encode()).hexdigest(), len(keys)


def _hash(dataset: Dataset) -> str:
    """One hash of all shards."""
    return hashlib.sha256(" ".join(sha256 for sha256, _ in _shards(dataset)).encode()).hexdigest()


def _first(pairs: np.ndarray) -> np.ndarray:
    """Of sorted rows (later, earlier), the first ``near.KEPT`` of each later one."""
    starts = np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs[np.arange(len(pairs)) - starts < near.KEPT]


def _columns(matches: copies.Matches) -> np.ndarray:
    return np.stack([matches.index.astype(np.float64), matches.similarity, matches.nearness], 1)


def matches(columns: np.ndarray) -> copies.Matches:
    """The other way round, of float64 (n, 3)."""
    return copies.Matches(columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])


def _threads() -> int:
    """Those that the job was given, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _read(dataset: Dataset, index: int, size: int) -> tuple[str | None, np.ndarray]:
    try:
        image = dataset.image(index)
    except (BadSample, KeyError) as error:
        return "has no jpg" if isinstance(error, KeyError) else "cannot be decoded", np.zeros((size, size, 3), np.uint8)
    if image.shape != (size, size, 3):
        return f"is {image.shape[1]} x {image.shape[0]} pixels, not {size} x {size}", np.zeros((size, size, 3), np.uint8)
    return None, np.ascontiguousarray(image)
