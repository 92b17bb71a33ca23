"""How many images of each kind a run will have, before it has them: from the configuration and the metadata, or the manifests of what lies
prepared elsewhere. No torch here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config, Images
from skinsynth.run import SPLITS, RunDir


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

    @property
    def planted(self) -> int | None:
        """Disguised copies of training images, which ``screen`` makes to measure how many it finds."""
        from skinsynth.quality.copies import PLANTED, PLANTS

        return None if self.train is None else len(PLANTS) * min(PLANTED, self.train)


def count(cfg: Config) -> Counts:
    """The splits hold whole groups, so that the true numbers differ a little from what the metadata promise."""
    found, brought = Counts(synthetic=plan(cfg)["images"]), _brought(cfg)
    try:
        rows, trained = (_index(cfg), 1.0) if brought else (_rows(cfg), _shares(cfg)["train"])
    except UserError as error:
        found.why = str(error)
        return found
    if brought:
        sizes, shards = {name: m["count"] for name, m in brought.items()}, {name: len(m["shards"]) for name, m in brought.items()}
    else:
        sizes = {name: round(len(rows) * part) for name, part in _shares(cfg).items()}
        shards = {name: ceil(size / cfg.prepare.shard_size) for name, size in sizes.items()}
    found.train, found.held_out = sizes["train"], sizes["val"] + sizes["test"]
    found.shards = {"train": shards["train"], "held_out": shards["val"] + shards["test"]}
    if cfg.finetune.cache_latents:
        found.latents = min(found.train, sum(_taken(rows, images, trained) for images in _chosen(cfg)))
    return found


def _brought(cfg: Config) -> dict[str, dict[str, Any]] | None:
    """Of ``data.remote`` the manifests of the splits, by name, once ``prepare`` has brought them; None before that, and where images are
    prepared here."""
    found = {name: read_json(_split(cfg, name) / "manifest.json") for name in SPLITS} if cfg.data.remote else {}
    return found if found and None not in found.values() else None


def _split(cfg: Config, name: str) -> Path:
    return RunDir(Path(cfg.run)).dataset(cfg, name)


def _index(cfg: Config) -> list[Any]:
    """The training images of a dataset that lies elsewhere, with its columns; no tar need be here. Raises ``UserError`` where the index cannot be
    used."""
    from skinsynth.data.dataset import Dataset

    columns = Dataset.open(_split(cfg, "train"), tolerate=True).columns
    return [SimpleNamespace(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def plan(cfg: Config) -> dict[str, Any]:
    """What is to be generated. ``images`` of each class follow the training split where ``generate.amount`` says so: the prepared one, or
    before that about its share of the metadata (``approximate``). 0 where that cannot be known, with ``why``."""
    g, why = cfg.generate, ""
    manifest = read_json(_split(cfg, "train") / "manifest.json")
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
    return {name: getattr(split, name) / (split.train + split.val + split.test) for name in SPLITS}


def _rows(cfg: Config) -> list[Any]:
    from skinsynth.data import isic

    data = cfg.data
    if data.remote and not (data.metadata and Path(data.metadata).is_file()):
        raise UserError(f"how many lie at data.remote is known once prepare has brought their manifests into {data.shards}, as "
                        "'launch --until prepare' does")
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
