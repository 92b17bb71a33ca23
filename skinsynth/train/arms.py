"""What an arm of classify is trained on: its sources, mixed by configuration, in phases one after the other; and the held-out splits."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from skinsynth import cpu
from skinsynth.data import leakage
from skinsynth.data.augment import augment, blend, partner
from skinsynth.data.cache import open_dataset
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.decoded import Decoded
from skinsynth.data.order import Mixture, sample_rng
from skinsynth.data.stream import Source
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, sha256_of
from skinsynth.knobs import Config, phase_starts
from skinsynth.knobs import Phase as PhaseKnobs
from skinsynth.run import RunDir
from skinsynth.train.engine import Batch

CLASSES = 2
Labelled = tuple[np.ndarray, int]  # uint8 (height, width, 3), target


@dataclass(frozen=True)
class Phase:
    """A stretch of the training from position ``begin`` on; ``weights`` float32 (classes,): what a sample of each class counts in the loss."""

    begin: int
    feeds: list[Source]
    mixture: Mixture
    weights: np.ndarray


class Data:
    """The arm's sources and the held-out splits. ``lineage``: what is known of the synthetic images' descent (see ``leakage.check``).

    The seed changes the order and the augmentation, never which images there are.

    Raises:
        UserError: an empty source, an image that is neither benign nor malignant, synthetic images that were not screened, leakage.
    """

    def __init__(self, cfg: Config, run: RunDir, arm: str, seed: int, side: int | None = None):
        """``side``: pixels that the model sees; None: those of the shards."""
        self.decoded = Decoded(cfg.prepare.size, side or cfg.prepare.size, cfg.data.memory_gb * 1e9)
        self.cfg, self.seed, self.workers, self.batch_size = cfg, seed, cpu.loaders(cfg.data.workers), cfg.classify.global_batch
        smooth = cfg.classify.label_smoothing
        self.labels = ((1 - smooth) * np.eye(CLASSES) + smooth / CLASSES).astype(np.float32)  # of each class
        tolerate = cfg.data.on_error == "skip"  # of what is trained on; what is judged on must be whole
        self.splits = {name: open_dataset(cfg, run, name, tolerate and name == "train") for name in ("train", "val", "test")}
        self.sources = {name: self._source(run, name) for name in cfg.classify.arms[arm].used}
        for name, source in self.sources.items():
            if not len(source):
                raise UserError(f"classify.arms.{arm}: the source '{name}' has no image")
        for dataset in (*self.splits.values(), *(source.dataset for source in self.sources.values())):
            _check_targets(dataset)
        self.lineage = leakage.check(self.splits, self.sources.get("synthetic"))
        self._feeds: dict[tuple[str, int | None], Source] = {}
        self.phases = self._phases(cfg.classify.arms[arm].parts)

    def _source(self, run: RunDir, name: str) -> Source:
        if name == "real":
            return Source(self.splits["train"], range(len(self.splits["train"])), self.cfg.data.on_error)
        accepted = read_json(run.node("screen") / "accepted.json")
        if accepted is None:
            raise UserError(f"{run.node('screen')} has no accepted.json: the synthetic images were not screened")
        synthetic, keys = open_dataset(self.cfg, run, "synthetic", self.cfg.data.on_error == "skip"), set(accepted["keys"])
        if accepted["manifest_sha256"] != sha256_file(synthetic.folder / "manifest.json"):
            raise UserError(f"{synthetic.folder} was made anew after it was screened, and {run.node('screen') / 'accepted.json'} says nothing of "
                            f"these images: delete {run.node('screen') / 'done.json'} and launch again, which screens them")
        return Source(synthetic, [i for i, key in enumerate(synthetic.keys) if key in keys], self.cfg.data.on_error)

    # ---- which sample comes when ----

    def _phases(self, parts: list[PhaseKnobs]) -> list[Phase]:
        c, starts, found = self.cfg.classify, phase_starts(parts, self.cfg.classify.steps), []
        for number, part in enumerate(parts):
            shares = self._shares({name: weight for name, weight in part.sources.items() if weight > 0})
            feeds = [self._feed(*which) for which in shares]
            mixture = Mixture(tuple(map(len, feeds)), tuple(shares.values()), self.seed + 104729 * number, tuple(s.shards for s in feeds),
                              self.cfg.data.streams, self.cfg.data.shuffle_window)
            found.append(Phase(starts[number] * c.global_batch, feeds, mixture, self._weights(feeds, tuple(shares.values()))))
        return found

    def _shares(self, sources: dict[str, float]) -> dict[tuple[str, int | None], float]:
        """(source, class) -> weight. With balanced sampling each class is drawn as often as another, from its sources by their weights."""
        if self.cfg.classify.balance != "sampling":
            return {(name, None): weight for name, weight in sources.items()}
        targets = sorted({target for name in sources for target in _targets(self.sources[name])})
        found: dict[tuple[str, int | None], float] = {}
        for target in targets:
            having = {name: weight for name, weight in sources.items() if target in _targets(self.sources[name])}
            found |= {(name, target): weight / sum(having.values()) for name, weight in having.items()}
        return found

    def _feed(self, name: str, target: int | None) -> Source:
        """The source, or its images of one class; the same object for all phases."""
        if target is None:
            return self.sources[name]
        if (name, target) not in self._feeds:
            source = self.sources[name]
            mine = [i for i in source.samples if int(source.dataset.columns["target"][i]) == target]
            self._feeds[name, target] = Source(source.dataset, mine, self.cfg.data.on_error)
        return self._feeds[name, target]

    def _weights(self, feeds: list[Source], shares: tuple[float, ...]) -> np.ndarray:
        """Such that each class counts the same, and a sample one on average; ones where that is not asked for."""
        often = np.zeros(CLASSES)
        for feed, share in zip(feeds, shares, strict=True):
            often += share / sum(shares) * np.bincount([int(feed.dataset.columns["target"][i]) for i in feed.samples], minlength=CLASSES) / len(feed)
        if self.cfg.classify.balance != "weights":
            return np.ones(CLASSES, np.float32)
        return np.divide(1 / np.count_nonzero(often), often, out=np.zeros(CLASSES), where=often > 0).astype(np.float32)

    def at(self, position: int) -> tuple[Phase, Source, int]:
        """Phase, source and number in the source of the sample at a position of the run."""
        phase = self.phases[bisect_right(self.phases, position, key=lambda p: p.begin) - 1]
        number, index = phase.mixture.at(position - phase.begin)
        return phase, phase.feeds[number], index

    # ---- batches ----

    def sha256(self) -> str:
        """Of the names of all samples that may be drawn."""
        lines = (f"{name} {source.dataset.keys[i]}\n" for name, source in self.sources.items() for i in source.samples)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def images_sha256(self) -> str:
        """Of the images themselves that are trained and judged on."""
        used = {source.dataset.folder.name: source.dataset for source in self.sources.values()} | {d.folder.name: d for d in self.splits.values()}
        return sha256_of({name: dataset.content_sha256 for name, dataset in used.items()})

    def batch(self, positions: range) -> Batch:
        """images uint8 (n, 3, side, side), channels last in memory, augmented; target float32 (n, classes): what each class counts, its weight
        in the loss included."""
        seen: dict[int, Labelled] = {}

        def image(position: int) -> Labelled:
            if position not in seen:  # with mixup or cutmix an image is also another one's partner
                seen[position] = self._augmented(position)
            return seen[position]

        images, targets = zip(*(self._one(position, image) for position in positions), strict=True)
        return {"images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), "target": torch.from_numpy(np.stack(targets))}

    def _augmented(self, position: int) -> Labelled:
        _, source, index = self.at(position)
        image, target = source.read(index, lambda dataset, n: (self.decoded.read(dataset, n), int(dataset.columns["target"][n])))
        return augment(image, sample_rng(self.seed, position)), target

    def _one(self, position: int, image: Callable[[int], Labelled]) -> tuple[np.ndarray, np.ndarray]:
        c, (pixels, target) = self.cfg.classify, image(position)
        labels = self._labels(self.at(position)[0].weights)
        label = labels[target]
        if c.mixup or c.cutmix:
            other, its = image(partner(position, self.batch_size, self.seed))
            pixels, share = blend(pixels, other, sample_rng(self.seed + 32452843, position), c.mixup, c.cutmix)
            label = np.float32(share) * label + np.float32(1 - share) * labels[its]
        return pixels, label

    def _labels(self, weights: np.ndarray) -> np.ndarray:
        """float32 (classes, classes): what the loss takes for a sample of each class. Its own class's weight counts, not that of the class which
        smoothing has it share with: torch's ``cross_entropy`` takes the latter, and of 2 % malignant images all others would look malignant."""
        return self.labels * weights[:, None]

    def keys(self, positions: range) -> list[str]:
        """The names of the samples at those positions."""
        found = (self.at(position) for position in positions)
        return [source.dataset.keys[source.samples[index]] for _, source, index in found]

    @property
    def bad(self) -> list[BadSample]:
        return [error for source in (*self.sources.values(), *self._feeds.values()) for error in source.bad]


def _targets(source: Source) -> Counter[int]:
    return Counter(int(source.dataset.columns["target"][i]) for i in source.samples)


def _check_targets(dataset: Dataset) -> None:
    other = next((i for i, target in enumerate(dataset.columns["target"]) if int(target) not in range(CLASSES)), None)
    if other is not None:
        raise UserError(f"{dataset.folder}: sample {dataset.keys[other]} is of target {dataset.columns['target'][other]}; classify knows 0 (benign) "
                        "and 1 (malignant)")
