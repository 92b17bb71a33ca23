"""What the features of a screened set show: how far it lies from real images, whether it shows its classes, whether it can be told from real ones.

Features are kept of at most ``screen.max_features`` images over all and as many of each class, those whose keys have the lowest hashes: the same ones
whatever the number of tasks, and no more memory for a million images than for ten thousand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skinsynth.quality import defects
from skinsynth.quality.distances import Scaler, compare
from skinsynth.quality.features import evens_out
from skinsynth.quality.parts import Parts
from skinsynth.quality.probe import Probe, auroc, detector, possible


@dataclass
class Sample:
    """Some images of one kind: ``numbers`` int (n,) ascending, their ``features`` float32 (n, d) and ``targets`` int (n,)."""

    numbers: np.ndarray
    targets: np.ndarray
    features: np.ndarray
    over_all: np.ndarray  # bool (n,): chosen among all, not only for its class

    def whole(self) -> np.ndarray:
        return self.features[self.over_all]

    def of(self, target: int) -> np.ndarray:
        return self.features[self.targets == target]


def choose(keys: list[str], targets: np.ndarray, among: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images' features are kept, by the hashes of their keys.

    Args:
        targets: int (n,) of all keys. among: int, ascending, those that may be chosen. most: of all, and of each class.

    Returns:
        Their numbers int (k,), ascending, and bool (k,) whether they are chosen over all (else for their class only).
    """
    rank = np.array([int.from_bytes(hashlib.sha256(keys[i].encode()).digest()[:8]) for i in among], np.uint64)
    order = np.argsort(rank, kind="stable")
    first = set(order[:most].tolist())
    own = {int(i) for target in np.unique(targets[among]) for i in order[targets[among][order] == target][:most]}
    places = np.array(sorted(first | own), np.int64)
    return among[places], np.array([place in first for place in places.tolist()], bool)


@dataclass
class Evidence:
    """Real images' features, read once; then the synthetic ones'."""

    parts: Parts
    real: dict[str, Sample] = field(init=False)
    scale: Any = field(init=False)
    judge: Probe | None = field(init=False)

    def __post_init__(self) -> None:
        kept = {kind: self._sample(kind, np.arange(len(self.parts.sets[kind]))) for kind in ("train", "val", "test")}
        self.scale = Scaler.of(kept["train"].features) if evens_out(self.parts.cfg) else lambda features: features
        self.real, train = kept, kept["train"]
        self.judge = Probe(train.features, train.targets) if possible(train.targets) else None

    def _sample(self, kind: str, among: np.ndarray) -> Sample:
        dataset = self.parts.sets[kind]
        targets = np.array(dataset.columns["target"], int)
        numbers, over_all = choose(dataset.keys, targets, among, self.parts.cfg.screen.max_features)
        return Sample(numbers, targets[numbers], self.parts.rows(kind, "features", numbers), over_all)

    def agreement(self) -> np.ndarray:
        """float32 (n,): of every synthetic image the probability of its class, by the classifier of real images; NaN where there is none. One part
        of features is in memory at a time."""
        targets = np.array(self.parts.sets["synthetic"].columns["target"], int)
        return np.concatenate(list(self._judged(targets)))

    def _judged(self, targets: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for unit in self.parts.of("synthetic"):
            own = targets[start:start + unit.count]
            start += unit.count
            yield self.judge.of(self.parts.read(unit, "features"), own) if self.judge else np.full(unit.count, np.nan, np.float32)

    def agreement_metrics(self, probability: np.ndarray, keep: np.ndarray) -> dict[str, Any]:
        """The classifier's AUROC on the validation split, and per class the share of accepted images that it gives their class, beside the share
        of real validation images."""
        if self.judge is None:
            return {"auroc_val": None, "per_class": {}}
        columns, val = self.parts.sets["synthetic"].columns, self.real["val"]
        real, names = self.judge.of(val.features, val.targets), np.array(columns["class"])
        per_class = {}
        for name, target in self._classes():
            chosen = keep[names[keep] == name]
            per_class[name] = {"synthetic": _share(probability[chosen]), "real_val": _share(real[val.targets == target])}
        binary = self.judge.classes == [0, 1]
        return {"auroc_val": auroc(val.targets, self.judge(val.features)[:, 1]) if binary else None, "per_class": per_class}

    def _classes(self) -> list[tuple[str, int]]:
        columns = self.parts.sets["synthetic"].columns
        return sorted(set(zip(columns["class"], columns["target"], strict=True)))

    def against(self, keep: np.ndarray) -> dict[str, Any]:
        """Distances of the accepted images (numbers, ascending) to the training images, of real held-out ones for scale, and both per class; and
        the detector's score."""
        made, train = self._sample("synthetic", keep), self.real["train"]
        held_out = np.concatenate([self.real[kind].whole() for kind in ("val", "test")])
        distances = {"all": self._compare(made.whole(), train.whole()), "real": self._compare(held_out, train.whole())}
        names = np.array(self.parts.sets["synthetic"].columns["class"])[made.numbers]
        per_class = {name: self._compare(made.features[names == name], train.of(target)) for name, target in self._classes()}
        real_per_class = {name: self._compare(self._held_out(target), train.of(target)) for name, target in self._classes()}
        return {"distances": {**distances, "per_class": per_class, "real_per_class": real_per_class}, "detector": self._detector(made)}

    def _held_out(self, target: int) -> np.ndarray:
        return np.concatenate([self.real[kind].of(target) for kind in ("val", "test")])

    def _compare(self, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        cfg = self.parts.cfg
        return compare(self.scale(x), self.scale(y), cfg.screen, cfg.seed)

    def _detector(self, made: Sample) -> dict[str, Any]:
        """On features and radial spectra."""
        real, groups = [], []
        for kind, sample in self.real.items():
            real.append(self._traces(kind, sample))
            groups += [self.parts.sets[kind].columns["group"][i] for i in sample.numbers]
        keys = [self.parts.sets["synthetic"].keys[i] for i in made.numbers]
        return detector(np.concatenate(real), groups, self._traces("synthetic", made), keys)

    def _traces(self, kind: str, sample: Sample) -> np.ndarray:
        radial = self.parts.rows(kind, "measures", sample.numbers)[:, len(defects.MEASURES):]
        return np.concatenate([sample.features, radial], 1)


def _share(probability: np.ndarray) -> float | None:
    """Of the images those that are given their own class; one that the classifier does not know is not counted."""
    known = probability[~np.isnan(probability)]
    return round(float((known > 0.5).mean()), 4) if len(known) else None
