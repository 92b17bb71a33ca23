"""Which images are to be generated: a function of the configuration and, where that asks for it, of the training split.

The plan is never written out: an image is found by its number, whatever the plan's size. Image n is of the class whose turn it is
(classes are mixed evenly, so that every shard holds all of them), and everything drawn for it comes from its own seed.

Prompts may have fields, filled from a training image of the class (its patient's values together, so as they occur together):
``{diagnosis}`` (melanoma), ``{site}`` (on the back), ``{person}`` (of a woman in her 40s), ``{caption}`` (the whole sentence that
``prepare`` made). An image whose value is unknown is not drawn for a prompt that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from string import Formatter
from typing import Any

import numpy as np

from skinsynth.data.captions import phrases
from skinsynth.data.dataset import Dataset
from skinsynth.data.isic import Row
from skinsynth.data.order import permutation, sample_rng
from skinsynth.errors import UserError
from skinsynth.files import sha256_file
from skinsynth.knobs import Config, GeneratedClass

ATTRIBUTES = ("diagnosis", "site", "age", "sex")  # columns of the training split
NEEDS = {"diagnosis": ("diagnosis",), "site": ("site",), "person": ("age", "sex"), "caption": ()}  # field -> columns that must be known


@dataclass(frozen=True)
class Planned:
    """One image of the plan. ``attributes``: those of the training image that the prompt speaks of, or that it is made from, which is
    ``source`` then. ``attempt`` counts the images that came out faulty before."""

    number: int
    key: str
    name: str  # class name
    target: int
    prompt: str
    seed: int
    attempt: int
    attributes: dict[str, Any]
    source: int | None  # its number in the training split


@dataclass(frozen=True)
class PlannedClass:
    """``samples``: for each prompt the training images whose values it may take, or that it may be made from."""

    name: str
    target: int
    count: int
    prompts: tuple[str, ...]
    samples: tuple[tuple[int, ...], ...]

    @cached_property
    def sharing(self) -> list[tuple[int, int]]:
        """For each prompt how many have the same samples as it, and how many of these come before it."""
        return [(self.samples.count(mine), self.samples[:which].count(mine)) for which, mine in enumerate(self.samples)]

    def turn_of_samples(self, turn: int) -> int:
        """The how manieth of the class's images that are made from the same samples: prompts go through what they share together, or all of them
        would be given the same few images."""
        rounds, which = divmod(turn, len(self.prompts))
        together, before = self.sharing[which]
        return rounds * together + before


def needs_train(cfg: Config) -> bool:
    """Whether the plan depends on the training split."""
    g = cfg.generate
    return g.amount != "counts" or g.method != "text-to-image" or has_fields(cfg)


def has_fields(cfg: Config) -> bool:
    """Whether a prompt has fields, which the training split fills."""
    return any(fields(p) for c in cfg.generate.classes.values() if c.count for p in c.prompts)


def fields(prompt: str) -> list[str]:
    """The names in braces. Raises ``ValueError`` where the braces do not match."""
    return [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]


class Plan:
    """``total`` images in ``units`` output shards.

    Raises:
        UserError: nothing to generate, or a prompt that no training image can fill.
    """

    def __init__(self, cfg: Config, train: Dataset | None):
        self.cfg, self.train, self.size = cfg, train, cfg.generate.shard_size
        wanted = amounts(cfg, Counter(train.columns["target"]) if train else Counter())
        self.classes = [self._class(name, cfg.generate.classes[name], count) for name, count in wanted.items()]
        self.counts = [c.count for c in self.classes]
        self.total = sum(self.counts)
        self.units = -(-self.total // self.size)

    def _class(self, name: str, wanted: GeneratedClass, count: int) -> PlannedClass:
        samples = tuple(_matching(self.cfg, self.train, name, prompt) for prompt in wanted.prompts)
        return PlannedClass(name, wanted.target, count, tuple(wanted.prompts), samples)

    def numbers(self, unit: int) -> range:
        """The images of a unit."""
        return range(unit * self.size, min((unit + 1) * self.size, self.total))

    def image(self, number: int, attempt: int = 0) -> Planned:
        place, turn = share_out(self.counts, number)
        c = self.classes[place]
        seed = int(np.random.SeedSequence([self.cfg.seed, number, attempt]).generate_state(1, np.uint64)[0] >> np.uint64(12))  # exact in JSON
        which = turn % len(c.prompts)
        source = self._source(c.samples[which], place, c.turn_of_samples(turn), seed, attempt)
        attributes = {name: None if source is None else self.train.columns[name][source] for name in ATTRIBUTES} if self.train else {}
        made_from = source if self.cfg.generate.method != "text-to-image" else None
        return Planned(number, key(number), c.name, c.target, _filled(c.prompts[which], self.train, source), seed, attempt, attributes, made_from)

    def _source(self, samples: tuple[int, ...], place: int, turn: int, seed: int, attempt: int) -> int | None:
        """Values are drawn as often as they occur; images to start from are used equally often, and another one after a failure."""
        if not samples:
            return None
        if self.cfg.generate.method == "text-to-image" or attempt:
            return samples[int(sample_rng(seed, 1).integers(len(samples)))]
        epoch, index = divmod(turn, len(samples))
        return samples[int(permutation(len(samples), self.cfg.seed + place, epoch)[index])]

    def request(self) -> dict[str, Any]:
        """All of the plan that decides what the images are, as plain values."""
        g = self.cfg.generate
        classes = {c.name: {**asdict(g.classes[c.name]), "count": c.count} for c in self.classes}
        return {"planned": self.total, "shard_size": self.size, "seed": self.cfg.seed, "classes": classes, **self._train()}

    def _train(self) -> dict[str, Any]:
        """The training split, as far as the plan depends on it: a withdrawal leaves the manifest as it is, and takes samples away."""
        if not self.train or not needs_train(self.cfg):
            return {}
        gone = self.train.manifest["count"] - len(self.train)
        return {"train_sha256": sha256_file(self.train.folder / "manifest.json"), **({"train_withdrawn": gone} if gone else {})}


def examples(cfg: Config, train: Dataset | None) -> list[str]:
    """The prompts that images are generated for, each once, filled as for the first training image that can. ``train`` where one has fields.

    Raises:
        UserError: no training image can fill one.
    """
    found = [(prompt, _matching(cfg, train, name, prompt)) for name, c in cfg.generate.classes.items() if c.count for prompt in c.prompts]
    return list(dict.fromkeys(_filled(prompt, train, samples[0] if samples else None) for prompt, samples in found))


def _matching(cfg: Config, train: Dataset | None, name: str, prompt: str) -> tuple[int, ...]:
    """The training images of a class whose values a prompt may take, or that its images may be made from."""
    if train is None or (not fields(prompt) and cfg.generate.method == "text-to-image"):
        return ()
    wanted = cfg.generate.classes[name]
    needed = [column for field in fields(prompt) for column in NEEDS[field]]
    matching = train.select({"target": wanted.target, **wanted.where})
    found = tuple(i for i in matching if all(train.columns[column][i] is not None for column in needed))
    if not found:
        raise UserError(f"generate.classes.{name}: no training image of target {wanted.target} that matches {wanted.where} has a known "
                        f"{' and '.join(dict.fromkeys(needed)) or 'value'}, which the prompt '{prompt}' needs")
    return found


def _filled(prompt: str, train: Dataset | None, source: int | None) -> str:
    if source is None or train is None or not fields(prompt):
        return prompt
    columns = train.columns
    row = Row("", columns["target"][source], None, None, *(columns[name][source] for name in ("sex", "age", "site", "diagnosis")))
    return prompt.format(**phrases(row), caption=columns["caption"][source])


def key(number: int) -> str:
    return f"syn-{number:08d}"


def amounts(cfg: Config, real: Counter[int]) -> dict[str, int]:
    """Class -> images to generate. ``generate.amount``: "counts" takes those of the classes; "real" gives each target as many as it has
    real training images; "balance" as many as it lacks to the largest target. Classes of one target share by their counts.

    Raises:
        UserError: that is none at all.
    """
    g = cfg.generate
    classes = {name: c for name, c in g.classes.items() if c.count}
    if not classes:
        raise UserError("generate.classes asks for no image: give at least one class a count")
    if g.amount == "counts":
        return {name: c.count for name, c in classes.items()}
    most, found = max(real.values(), default=0), dict.fromkeys(classes, 0)
    for target in sorted({c.target for c in classes.values()}):
        names = [name for name, c in classes.items() if c.target == target]
        wanted = real[target] if g.amount == "real" else most - real[target]
        for number in range(wanted):
            found[names[share_out([classes[n].count for n in names], number % sum(classes[n].count for n in names))[0]]] += 1
    if not any(found.values()):
        raise UserError(f"generate.amount={g.amount} asks for no image: the training split has {dict(sorted(real.items()))} images of each target")
    return {name: count for name, count in found.items() if count}


def share_out(counts: Sequence[int], number: int) -> tuple[int, int]:
    """(which, its how manieth) of item ``number`` in an even mix of so many items of each kind: Bresenham's line, one kind after the other
    against all that are left. Each kind gets exactly its count, and about its share of any stretch."""
    rest = sum(counts)
    for kind, count in enumerate(counts):
        before = (number * count + rest // 2) // rest
        if ((number + 1) * count + rest // 2) // rest > before:
            return kind, before
        number, rest = number - before, rest - count
    raise IndexError(number)
