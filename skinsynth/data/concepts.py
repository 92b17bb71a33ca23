"""Which training images each DreamBooth concept takes, and how its samples follow one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from skinsynth.config import Config, Images
from skinsynth.data.order import Mixture, permutation
from skinsynth.data.shards import Dataset
from skinsynth.errors import UserError


@dataclass(frozen=True)
class Source:
    """Images that share a prompt: ``samples`` are numbers in the training split, ``prior`` marks class images."""

    name: str
    prompt: str
    samples: tuple[int, ...]
    prior: bool


def sources(cfg: Config, train: Dataset) -> list[Source]:
    """Instance images and, where a class prompt is given, class images of every concept.

    Raises:
        UserError: no concept at all, or a filter that no image passes.
    """
    if not cfg.finetune.concepts:
        raise UserError("finetune.concepts is empty: give at least one concept with an instance_prompt")
    found = []
    for number, (name, concept) in enumerate(cfg.finetune.concepts.items()):
        key = f"finetune.concepts.{name}"
        found.append(Source(name, concept.instance_prompt, _take(train, concept.instance, cfg.seed + number, f"{key}.instance"), False))
        if concept.class_prompt:
            found.append(Source(name, concept.class_prompt, _take(train, concept.class_, cfg.seed + number, f"{key}.class"), True))
    return found


def mixture(found: list[Source], seed: int) -> Mixture:
    """Every concept as often as the others; instance and class images of a concept in turn."""
    return Mixture(tuple(len(s.samples) for s in found), tuple(1.0 for _ in found), seed)


def prompts(cfg: Config) -> list[str]:
    """Every prompt that fine-tuning or generation will need, once each; the empty one first."""
    named = [p for c in cfg.finetune.concepts.values() for p in (c.instance_prompt, c.class_prompt)]
    return list(dict.fromkeys(["", *named, cfg.generate.negative_prompt, *(p for g in cfg.generate.classes.values() for p in g.prompts)]))


def captions(train: Dataset, samples: Iterable[int]) -> list[str]:
    """The distinct captions of the given samples, sorted: what is to be encoded where each image is trained on with its own words.

    Raises:
        UserError: the dataset has no captions.
    """
    if "caption" not in train.columns:
        raise UserError(f"{train.folder} has no captions (it was made by an earlier version): delete it and prepare again")
    return sorted({train.columns["caption"][i] for i in samples})


def _take(train: Dataset, images: Images, seed: int, key: str) -> tuple[int, ...]:
    matching = train.select(images.where)
    if not matching:
        values = {n: sorted({str(v) for v in train.columns[n]})[:12] for n in images.where}
        raise UserError(f"{key}: no training image matches {images.where}; the columns there hold {values}")
    if images.count is None or images.count >= len(matching):
        return tuple(matching)
    return tuple(sorted(matching[i] for i in permutation(len(matching), seed, 0)[: images.count]))
