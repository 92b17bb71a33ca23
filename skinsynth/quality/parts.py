"""What is measured of the images, shard by shard: the units of ``screen``, each with one part.

A part is ``<n>.npz``, arrays with a row for each image, and, written last, ``<n>.json``:

    features   float32 (n, d)
    measures   float32 (n, 5 + RINGS)      ``defects.MEASURES``, then the radial power spectrum
    prints     int8 (n, 16, 16)            ``near.fingerprint``
    matches    float64 (n, 3)              nearest training image, similarity, nearness (``copies.Matches``); not of training images
    held_out   float64 (n, 3)              the same of the nearest validation or test image; of synthetic images
    spectra    float64 (2, side, side // 2 + 1)    sums of ``spectrum.transforms``

Real shards also give ``<kind>-<sha256>.npy``, their thumbnails, under the name of their content. A task that searches takes those that are there and
makes the others itself, which is cheap (they are decoded, no network runs): so tasks may run in any order, alone, and at once, and none waits.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skinsynth import cpu
from skinsynth.data.codec import to_npy
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.quality import copies, defects, near, spectrum
from skinsynth.quality.copies import PLANTED, PLANTS
from skinsynth.quality.features import Extractor
from skinsynth.run import Progress

REAL = ("train", "val", "test")
KINDS = (*REAL, "planted", "synthetic")  # so numbered that a synthetic set made anew leaves the parts of the real ones valid
SEARCHED = {"matches": ("train",), "held_out": ("val", "test")}  # array of a part -> the kinds among which its images were searched for


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
    """The units of a run and their folder. Raises ``UserError`` where one of the ``sets`` is empty. ``network``: the hash of what the
    features are taken with. ``first``: the training shard from which on missing thumbnails are made: tasks that come at once share the work."""

    cfg: Config
    folder: Path
    sets: dict[str, Dataset]
    network: str
    first: int = 0
    units: list[Unit] = field(init=False)
    against: dict[str, str] = field(init=False)  # array of ``SEARCHED`` -> a hash of what is searched for it
    galleries: dict[str, copies.Gallery] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        empty = [str(dataset.folder) for dataset in self.sets.values() if not len(dataset)]
        if empty:
            raise UserError(f"{', '.join(empty)} holds no images: screening compares synthetic images with real ones of all three splits: give each "
                            "a share (prepare.split) and images enough")
        self.against = {name: " ".join(_hash(self.sets[kind], grouped=True) for kind in kinds) for name, kinds in SEARCHED.items()}
        found: list[tuple[str, int, str, int]] = []
        for kind in KINDS:
            if kind == "planted":
                found += [(kind, n, self.against["matches"], min(PLANTED, len(self.sets["train"]))) for n in range(len(PLANTS))]
            else:
                found += [(kind, n, sha256, count) for n, (sha256, count) in enumerate(_shards(self.sets[kind])) if count]
        self.units = [Unit(number, *rest) for number, rest in enumerate(found)]

    def of(self, kind: str) -> list[Unit]:
        return [unit for unit in self.units if unit.kind == kind]

    def path(self, unit: Unit, end: str) -> Path:
        return self.folder / f"{unit.number:05d}{end}"

    def searches(self, kind: str) -> list[str]:
        """The arrays of ``SEARCHED`` that a part of this kind has."""
        if kind == "train":
            return []
        return list(SEARCHED) if kind == "synthetic" and self.cfg.screen.held_out is not None else ["matches"]

    def made(self, unit: Unit) -> dict[str, Any]:
        """What a part was made from: another one is not taken for it."""
        return {"kind": unit.kind, "sha256": unit.sha256, "against": {name: self.against[name] for name in self.searches(unit.kind)},
                "batch": self.cfg.screen.batch, "network": self.network}

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

    def _search(self, name: str, thumbs: np.ndarray) -> np.ndarray:
        """The array ``name`` of ``SEARCHED``, of these thumbnails."""
        if name not in self.galleries:
            self.galleries[name] = self._gallery(SEARCHED[name])
        found = self.galleries[name].search(thumbs, cpu.threads())
        return np.stack([found.index.astype(np.float64), found.similarity, found.nearness], 1)

    def _gallery(self, kinds: tuple[str, ...]) -> copies.Gallery:
        """All thumbnails of these kinds. Those that are missing are made."""
        units = [unit for kind in kinds for unit in self.of(kind)]
        start = self.first % len(units)
        for unit in units[start:] + units[:start]:
            if not self._thumbs(unit).exists():
                self._write_thumbs(unit, np.stack([copies.thumbnail(image) for _, image in self._images(unit)]))
        thumbs = np.concatenate([np.load(self._thumbs(unit), allow_pickle=False) for unit in units])
        return copies.Gallery(thumbs, [group for kind in kinds for group in self.sets[kind].columns["group"]])

    def _thumbs(self, unit: Unit) -> Path:
        return self.folder / f"{unit.kind}-{unit.sha256[:16]}.npy"

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

    def inspect(self, unit: Unit, extractor: Extractor, progress: Progress) -> None:
        """Writes the part of one shard."""
        found, batch = Found(self.cfg.prepare.size), self.cfg.screen.batch
        for wrong, image in self._images(unit):
            found.add(wrong, image)
            if len(found.images) == batch:
                found.close(extractor)
                progress.advance(batch)
        progress.advance(len(found.images))
        arrays = found.arrays(extractor)
        thumbs = np.stack(found.thumbs)
        if unit.kind in REAL and not self._thumbs(unit).exists():
            self._write_thumbs(unit, thumbs)
        self._write(unit, arrays | {name: self._search(name, thumbs) for name in self.searches(unit.kind)}, found.broken)

    def plant(self, unit: Unit, progress: Progress) -> None:
        """Writes the part of one disguise: the matches of disguised copies of training images."""
        train = self.sets["train"]
        chosen = np.random.default_rng(self.cfg.seed).permutation(len(train))[:unit.count]
        thumbs = np.stack([copies.thumbnail(copies.plant(train.image(int(i)), int(i), PLANTS[unit.shard])) for i in chosen])
        self._write(unit, {"matches": self._search("matches", thumbs)}, {})
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
        return {"set": _hash(self.sets["synthetic"]), "limit": limit, "turns": 8}

    def _near(self, earlier: Unit, later: Unit, limit: float) -> np.ndarray:
        # a shard of which nothing may be read is no unit
        first = {unit.number: sum(u.count for u in self.of("synthetic") if u.shard < unit.shard) for unit in (earlier, later)}
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

    def held_out(self, limit: float, copy_limit: float) -> dict[int, str]:
        """Number of a synthetic image -> key of the validation or test image that it is, or nearly: nobody may train on that. By the print
        (correlation ``limit``), which noise and JPEG do not change, and by the search for copies, which crops and tints do not lead astray."""
        kinds = SEARCHED["held_out"]
        prints = np.concatenate([self.read(unit, "prints") for kind in kinds for unit in self.of(kind)])
        keys = [key for kind in kinds for key in self.sets[kind].keys]
        found: dict[int, str] = {}
        start = 0
        for unit in self.of("synthetic"):
            for image, real in near.near_pairs(prints, self.read(unit, "prints"), limit).tolist():
                found.setdefault(start + image, keys[real])
            start += unit.count
        searched = matches(self.column("synthetic", "held_out"))
        return {image: keys[searched.index[image]] for image in np.flatnonzero(searched.copies(copy_limit)).tolist()} | found


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


def screened(sets: dict[str, Dataset]) -> dict[str, str]:
    """Of each set a hash of its images, and of what its manifest says of them."""
    return {kind: f"{_hash(dataset)[:16]}-{sha256_file(dataset.folder / 'manifest.json')[:16]}" for kind, dataset in sorted(sets.items())}


def _shards(dataset: Dataset) -> Iterator[tuple[str, int]]:
    """(hash, count) of each shard, as far as it may be read: where samples of it are withdrawn, its part must be made anew without them."""
    for number, shard in enumerate(dataset.manifest["shards"]):
        keys = [dataset.keys[i] for i in dataset.shard_samples(number)]
        whole = len(keys) == shard["count"]
        yield shard["sha256"] if whole else hashlib.sha256(" ".join([shard["sha256"], *keys]).encode()).hexdigest(), len(keys)


def _hash(dataset: Dataset, grouped: bool = False) -> str:
    """One hash of all shards, and of the groups of their samples, which a shard's bytes do not say."""
    groups = [str(group) for group in dataset.columns["group"]] if grouped else []
    return hashlib.sha256(" ".join([*(sha256 for sha256, _ in _shards(dataset)), *groups]).encode()).hexdigest()


def _first(pairs: np.ndarray) -> np.ndarray:
    """Of sorted rows (later, earlier), the first ``near.KEPT`` of each later one."""
    starts = np.searchsorted(pairs[:, 0], pairs[:, 0])
    return pairs[np.arange(len(pairs)) - starts < near.KEPT]


def matches(columns: np.ndarray) -> copies.Matches:
    """Of an array of ``SEARCHED``."""
    return copies.Matches(columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])


def _read(dataset: Dataset, index: int, size: int) -> tuple[str | None, np.ndarray]:
    try:
        image = dataset.image(index)
    except (BadSample, KeyError) as error:
        return "has no jpg" if isinstance(error, KeyError) else "cannot be decoded", np.zeros((size, size, 3), np.uint8)
    if image.shape != (size, size, 3):
        return f"is {image.shape[1]} x {image.shape[0]} pixels, not {size} x {size}", np.zeros((size, size, 3), np.uint8)
    return None, np.ascontiguousarray(image)
