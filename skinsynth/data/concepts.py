"""Which training images fine-tuning takes, with which prompts, and how its samples follow one another."""

from __future__ import annotations

from dataclasses import dataclass

from skinsynth.data.dataset import Dataset
from skinsynth.data.order import Mixture, permutation
from skinsynth.errors import UserError
from skinsynth.knobs import Config, Images


@dataclass(frozen=True)
class Source:
    """``samples`` are ascending numbers in the training split, ``prompts`` one for each of them; ``prior`` marks class images.
    ``share``: of what its concept draws."""

    name: str
    samples: tuple[int, ...]
    prompts: tuple[str, ...]
    prior: bool
    shards: tuple[int, ...]  # how many of the samples lie in each shard
    share: float = 1.0


def sources(cfg: Config, train: Dataset) -> list[Source]:
    """DreamBooth: instance images and, where a class prompt is given, class images of every concept. Text-to-image: one source of all
    chosen images, each with the caption that prepare made from its metadata.

    Raises:
        UserError: no concept at all, a filter that no image passes, or fewer images than a global batch holds.
    """
    found = [_captioned(cfg, train)] if cfg.finetune.method == "text-to-image" else _dreambooth(cfg, train)
    count = len({i for source in found for i in source.samples})
    if count < cfg.finetune.global_batch:
        raise UserError(f"finetune.global_batch={cfg.finetune.global_batch}, but only {count} training images are chosen: lower it, or choose more "
                        "(finetune.concepts, finetune.images)")
    return found


def _captioned(cfg: Config, train: Dataset) -> Source:
    if "caption" not in train.columns:
        raise UserError(f"{train.folder} has no captions (it was made by an earlier version): delete it and prepare again")
    samples = _take(train, cfg.finetune.images, cfg.seed, "finetune.images", ())
    return Source("captions", samples, tuple(train.columns["caption"][i] for i in samples), False, train.shard_counts(samples))


def _dreambooth(cfg: Config, train: Dataset) -> list[Source]:
    if not cfg.finetune.concepts:
        raise UserError("finetune.concepts is empty: give at least one concept with an instance_prompt")
    found = []
    for number, (name, concept) in enumerate(cfg.finetune.concepts.items()):
        key = f"finetune.concepts.{name}"
        kinds = [(concept.instance, concept.instance_prompt, "instance", False), (concept.class_, concept.class_prompt, "class", True)]
        kinds = kinds[: 2 if concept.class_prompt else 1]
        taken: tuple[int, ...] = ()
        for images, prompt, kind, prior in kinds:
            # An instance is no class image beside that, unless the class is meant to be all that there is, which a wider filter says.
            samples = taken = _take(train, images, cfg.seed + number, f"{key}.{kind}", taken if images.where == concept.instance.where else ())
            found.append(Source(name, samples, (prompt,) * len(samples), prior, train.shard_counts(samples), 1 / len(kinds)))
    return found


def mixture(cfg: Config, found: list[Source]) -> Mixture:
    """Every concept as often as the others; instance and class images of a concept in turn."""
    return Mixture(tuple(len(s.samples) for s in found), tuple(s.share for s in found), cfg.seed, tuple(s.shards for s in found), cfg.data.streams,
                   cfg.data.shuffle_window)


def prompts(found: list[Source]) -> list[str]:
    """Every prompt that fine-tuning needs, once each; the empty one first."""
    return sorted({"", *(prompt for source in found for prompt in source.prompts)})


def _take(train: Dataset, images: Images, seed: int, key: str, last: tuple[int, ...]) -> tuple[int, ...]:
    """``last``: those that are taken only where the others are too few."""
    matching = train.select(images.where)
    if not matching:
        values = {n: sorted({str(v) for v in train.columns[n]})[:12] for n in images.where}
        raise UserError(f"{key}: no training image matches {images.where}; the columns there hold {values}")
    if images.count is None or images.count >= len(matching):
        return tuple(matching)
    drawn, later = [matching[i] for i in permutation(len(matching), seed, 0)], set(last)
    return tuple(sorted(sorted(drawn, key=lambda i: i in later)[: images.count]))
