"""Synthetic images that were made elsewhere (``data.synthetic``) -> ``<run>-synthetic``: prepared like the real ones, screened and used like
our own. What trained their generator is not known, and is said to be so wherever they appear.

The folder has ``metadata.csv`` (in it, or in ``train/`` as a Hugging Face imagefolder) with ``image_name`` or ``file_name`` and ``target``,
``label`` or ``benign_malignant``, and the images beside it or in ``images/``; or it has the two folders ``benign`` and ``malignant``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skinsynth.data import isic
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.isic import Aside, BadImage, Row
from skinsynth.data.lesion import square
from skinsynth.data.shards import ShardWriter, claim, missing_parts, write_manifest
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, write_text
from skinsynth.knobs import Config
from skinsynth.run import Progress, RunDir, Task

CLASSES = ("benign", "malignant")  # by target
KNOWN = ("sex", "age", "site", "diagnosis")
LINEAGE = {"base": "elsewhere", "weights_sha256": None, "train": None, "group_ids": None, "trained_group_ids": None}


def read(folder: Path) -> tuple[list[Row], list[Aside]]:
    """The images of a folder, with their paths, and what cannot be used.

    Raises:
        UserError: no such folder, or one of another form.
    """
    if not folder.is_dir():
        raise UserError(f"data.synthetic: {folder} is not a folder")
    tables = [path for path in (folder / "metadata.csv", folder / "train" / "metadata.csv") if path.is_file()]
    if not tables and not all((folder / name).is_dir() for name in CLASSES):
        raise UserError(f"data.synthetic: {folder} has neither metadata.csv (nor train/metadata.csv) nor the two folders {' and '.join(CLASSES)}")
    if not tables:
        return isic.read_dreambooth(folder / "malignant", folder / "benign")
    rows, aside = isic.read_metadata(tables[0])
    images = tables[0].parent / "images" if (tables[0].parent / "images").is_dir() else tables[0].parent
    found = []
    for row in rows:
        try:
            found.append(replace(row, file=str(isic.find_image(images, row.image_name))))
        except BadImage as error:
            aside.append({"key": row.image_name, "reason": str(error)})
    return found, aside


def make_units(cfg: Config, run: RunDir, task: Task) -> None:
    """Makes this task's shards.

    Raises:
        UserError: a folder that cannot be used, no image in it, or a dataset that was begun from other images.
    """
    folder = run.dataset(cfg, "synthetic")
    rows, size = [Row(**row) for row in _plan(cfg, folder)["rows"]], cfg.prepare.shard_size
    mine = task.mine(missing_parts(folder, -(-len(rows) // size)))
    cut = {unit: rows[unit * size : (unit + 1) * size] for unit in mine}
    progress = Progress(run, "prepare", task.index, sum(map(len, cut.values())), "synthetic images")
    for unit, chosen in cut.items():
        with ShardWriter(folder, unit) as shard:
            for row in chosen:
                _add(cfg, shard, row)
                progress.advance()


def finish(cfg: Config, run: RunDir) -> bool:
    """Whether nothing is left to do; the first to find all shards there writes the manifest."""
    if not cfg.data.synthetic:
        return True
    folder = run.dataset(cfg, "synthetic")
    plan = read_json(folder / "plan.json")
    rows = [Row(**row) for row in plan["rows"]]
    units = -(-len(rows) // cfg.prepare.shard_size)
    if missing_parts(folder, units):
        return False
    if not (folder / "manifest.json").exists():
        manifest = write_manifest(folder, units, kind="synthetic", lineage=LINEAGE, settings={"size": cfg.prepare.size, "source": cfg.data.synthetic},
                                  class_names=_class_names(rows), not_used=plan["aside"])
        unused = len(plan["aside"]) + len(manifest["set_aside"])
        print(f"synthetic images from {cfg.data.synthetic}: {manifest['count']:,}, of unknown lineage; {unused:,} could not be used")
    return True


def _plan(cfg: Config, folder: Path) -> dict[str, Any]:
    """Which image is where: made by whichever task comes first. Two that make it at once make the same."""
    found = read_json(folder / "plan.json")
    if found is None:
        rows, aside = read(Path(cfg.data.synthetic or ""))
        if not rows:
            raise UserError(f"data.synthetic: {cfg.data.synthetic} holds no image that can be used" + (f" ({aside[0]['reason']})" if aside else ""))
        rows.sort(key=lambda row: isic.random_key(cfg.seed, "external", row.image_name))  # classes mixed in every shard
        content = hashlib.sha256("".join(f"{row.image_name} {sha256_file(Path(str(row.file)))}\n" for row in rows).encode()).hexdigest()
        found = {"rows": [vars(row) for row in rows], "aside": aside, "content": content}
    knobs = {k: v for k, v in asdict(cfg.prepare).items() if k not in ("max_bad", "split")}
    claim(folder, {"stage": "prepare", "prepare": knobs, "seed": cfg.seed, "folder": cfg.data.synthetic, "content": found["content"]})
    if not (folder / "plan.json").exists():
        write_text(folder / "plan.json", json.dumps(found))
    return found


def _add(cfg: Config, shard: ShardWriter, row: Row) -> None:
    try:
        image = square(isic.read_image(Path(str(row.file))), cfg.prepare.size, cfg.prepare.crop, cfg.prepare.hair_removal)
    except BadImage as error:
        shard.skip(row.image_name, str(error))
        return
    known = {name: getattr(row, name) for name in KNOWN}
    facts = {"target": row.target, "class": CLASSES[row.target], **known}
    record = {**facts, "origin": "synthetic", "made": "elsewhere", "file": Path(str(row.file)).name, "weights_sha256": None}
    shard.add(row.image_name, {"jpg": encode_jpeg(image, cfg.prepare.quality), "json": json.dumps(record, sort_keys=True).encode()}, **facts)


def _class_names(rows: list[Row]) -> dict[str, Any]:
    counts = Counter(row.target for row in rows)
    return {CLASSES[target]: {"target": target, "count": count} for target, count in sorted(counts.items())}
