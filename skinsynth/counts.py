"""How many images of each kind a run will have, before it has them: from the configuration and the metadata. No torch here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config, Images
from skinsynth.run import RunDir


@dataclass
class Counts:
    """Images of each kind; ``why`` says what kept the real ones from being counted."""

    train: int | None = None
    held_out: int | None = None
    latents: int | None = None
    synthetic: int = 0
    shards: dict[str, int] = field(default_factory=dict)  # of train and held_out
    why: str = ""

    @property
    def real(self) -> int | None:
        return None if self.train is None or self.held_out is None else self.train + self.held_out


def count(cfg: Config) -> Counts:
    """The splits hold whole groups, so that the true numbers differ a little."""
    found = Counts(synthetic=plan(cfg)["images"])
    try:
        rows = _rows(cfg)
    except UserError as error:
        found.why = str(error)
        return found
    share = _shares(cfg)
    sizes = {name: round(len(rows) * part) for name, part in share.items()}
    found.train, found.held_out = sizes["train"], sizes["val"] + sizes["test"]
    shards = {name: ceil(size / cfg.prepare.shard_size) for name, size in sizes.items()}
    found.shards = {"train": shards["train"], "held_out": shards["val"] + shards["test"]}
    if cfg.finetune.cache_latents:
        found.latents = min(found.train, sum(_taken(rows, images, share["train"]) for images in _chosen(cfg)))
    return found


def plan(cfg: Config) -> dict[str, Any]:
    """What is to be generated. ``images`` of each class follow the training split where ``generate.amount`` says so: the prepared one, or
    before that about its share of the metadata (``approximate``). 0 where that cannot be known, with ``why``."""
    g, why = cfg.generate, ""
    manifest = read_json(RunDir(Path(cfg.run)).dataset(cfg, "train") / "manifest.json")
    try:
        found = _classes(cfg, manifest)
    except UserError as error:
        found, why = {}, str(error)
    known = {} if cfg.data.synthetic else g.classes
    classes = {name: {"target": known[name].target, "images": count, "prompts": list(known[name].prompts)} if known else {"images": count}
               for name, count in found.items()}
    total = sum(found.values())
    return {"classes": classes, "images": total, "shards": ceil(total / g.shard_size), "shard_size": g.shard_size, "amount": g.amount,
            "from": cfg.data.synthetic or "generated",
            "approximate": g.amount != "counts" and manifest is None, "method": g.method, "weights": g.weights, "scheduler": g.scheduler,
            "steps": g.steps, "guidance": g.guidance, "negative_prompt": g.negative_prompt, "seed": cfg.seed, "why": why}


def _classes(cfg: Config, manifest: dict[str, Any] | None) -> dict[str, int]:
    from skinsynth.data.plan import amounts

    if cfg.data.synthetic:
        from skinsynth.data import external

        return dict(Counter(external.CLASSES[row.target] for row in external.read(Path(cfg.data.synthetic))[0]))
    if cfg.generate.amount == "counts":
        return amounts(cfg, Counter())
    if manifest:
        return amounts(cfg, Counter({int(target): count for target, count in manifest["classes"].items()}))
    share = _shares(cfg)["train"]
    return amounts(cfg, Counter({target: round(count * share) for target, count in Counter(row.target for row in _rows(cfg)).items()}))


def _shares(cfg: Config) -> dict[str, float]:
    split = cfg.prepare.split
    return {name: getattr(split, name) / (split.train + split.val + split.test) for name in ("train", "val", "test")}


def _rows(cfg: Config) -> list[Any]:
    from skinsynth.data import isic

    data = cfg.data
    if data.metadata:
        return isic.read_metadata(Path(data.metadata))[0]
    if data.instance_data_dir and data.class_data_dir:
        return isic.read_dreambooth(Path(data.instance_data_dir), Path(data.class_data_dir))[0]
    raise UserError("data.metadata is not set")


def _chosen(cfg: Config) -> list[Images]:
    """What fine-tuning takes of the training images."""
    if cfg.finetune.method == "text-to-image":
        return [cfg.finetune.images]
    return [images for c in cfg.finetune.concepts.values() for images in (c.instance, *([c.class_] if c.class_prompt else []))]


def _taken(rows: list[Any], images: Images, share: float) -> int:
    """How many training images a concept takes; a column that is known only later lets all pass."""
    def fits(row: Any) -> bool:
        for name, value in images.where.items():
            wanted = {str(v) for v in (value if isinstance(value, list) else [value])}
            if hasattr(row, name) and str(getattr(row, name)) not in wanted:
                return False
        return True

    matching = round(sum(map(fits, rows)) * share)
    return matching if images.count is None else min(matching, images.count)
