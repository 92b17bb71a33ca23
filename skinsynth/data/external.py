"""Synthetic images that were made elsewhere (``data.synthetic``) -> ``<run>-synthetic``: prepared like the real ones, screened and used like
our own. What trained their generator is not known, and is said to be so wherever they appear.

The folder, or ``train/`` in it (a Hugging Face imagefolder; other splits are not looked at), has one of::

    metadata.csv or metadata.jsonl    file_name (relative to it, or to images/) or image_name; target, label or benign_malignant, or else the image's
                                      own folder is its label
    benign/ and malignant/            images, in upper or lower case, or 0/ and 1/; or one of them alone, with no other folder of images beside it

Images are JPEG, PNG, TIFF, BMP or WebP, under names of any letters: the samples' keys are made of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from skinsynth import cpu
from skinsynth.data import isic, set_aside, tables, withdrawn
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.folders import FORMATS, image_files
from skinsynth.data.images import BadImage, read_image
from skinsynth.data.isic import Aside, Row
from skinsynth.data.lesion import square
from skinsynth.data.shards import ShardWriter, claim, missing_parts, part_path, write_manifest
from skinsynth.data.split import random_key
from skinsynth.errors import UserError
from skinsynth.files import locked, read_json, sha256_file, write_text
from skinsynth.knobs import Config
from skinsynth.run import Progress, RunDir, Task

CLASSES = ("benign", "malignant")  # by target
LABELS = {"benign": 0, "malignant": 1, "0": 0, "1": 1}  # names of folders -> target
TABLES = ("metadata.csv", "metadata.jsonl")
NAMES = ("file_name", *isic.COLUMNS["image_name"])  # columns that name an image, the first that is filled counts
ENDINGS = tuple(FORMATS)
NOT_LISTED = "not listed in"
SHOWN = 5  # entries of a folder that is refused
KNOWN = ("sex", "age", "site", "diagnosis")
LINEAGE = {"base": "elsewhere", "weights_sha256": None, "train": None, "group_ids": None, "trained_group_ids": None}


def read(folder: Path) -> tuple[list[Row], list[Aside]]:
    """The images of a folder, with their paths, and what cannot be used.

    Raises:
        UserError: no such folder, or one of another form.
    """
    if not folder.is_dir():
        raise UserError(f"data.synthetic: {folder} is not a folder")
    entries = sorted(folder.iterdir())
    for root in (folder, *(path for path in entries if path.name.lower() == "train" and path.is_dir())):
        inside = sorted(root.iterdir())
        table = next((path for name in TABLES for path in inside if path.name.lower() == name and path.is_file()), None)
        if table:
            return _read_table(table)
        labelled = [path for path in inside if path.name.lower() in LABELS and path.is_dir()]
        if len({LABELS[path.name.lower()] for path in labelled}) == len(CLASSES) or (labelled and not _others(inside, labelled)):
            return _read_labelled(root, labelled)
    have = ", ".join(path.name for path in entries[:SHOWN]) + " ..." * (len(entries) > SHOWN)
    raise UserError(f"data.synthetic: {folder} has neither {' nor '.join(TABLES)} nor folders {' and '.join(CLASSES)} (or one of them and no other), "
                    f"in it or in train/; it has: {have or 'nothing'}. Save images of another form (parquet, arrow, archives) as such a folder")


def _others(inside: list[Path], labelled: list[Path]) -> bool:
    """Whether there are images in more folders than the labelled ones: of ``1`` among others nobody knows that it means malignant."""
    return any(path.is_dir() and path not in labelled and any(image_files(path)) for path in inside)


def lacking(rows: Iterable[Row]) -> str:
    """Words for the class of which there is no image, empty where there are both."""
    targets = {row.target for row in rows}
    return ", ".join(f"no {name} one" for target, name in enumerate(CLASSES) if target not in targets)


def _read_labelled(root: Path, folders: list[Path]) -> tuple[list[Row], list[Aside]]:
    """Raises ``UserError`` where a folder has no image."""
    entries = [path for folder in folders for path in sorted(folder.iterdir())]
    files = [path for path in entries if path.suffix.lower() in ENDINGS]
    targets = {path: LABELS[path.parent.name.lower()] for path in files}
    for folder in folders:
        if LABELS[folder.name.lower()] not in targets.values():
            raise UserError(f"data.synthetic: the folder {folder.name} in {root} holds no image ({', '.join(ENDINGS)}): fill it, or delete it")
    keys = _keys(root, files)
    rows = [Row(keys[path], target, diagnosis=CLASSES[target], file=str(path)) for path, target in targets.items() if path.is_file()]
    within = [path for folder in folders for path in image_files(folder) if path.parent != folder]
    return rows, [*({"key": keys[path], "reason": isic.NO_FILE} for path in files if not path.is_file()),
                  *({"key": path.relative_to(root).as_posix(), "reason": isic.WITHIN} for path in within)]


def _read_table(table: Path) -> tuple[list[Row], list[Aside]]:
    records = tables.read_csv(table, "synthetic") if table.suffix.lower() == ".csv" else _json_lines(table)
    root, found, aside, labels = table.parent, [], [], {*isic.COLUMNS["target"], *isic.COLUMNS["malignancy"], tables.CODE}
    for line, record in enumerate(map(tables.spelt_out, records), 1):
        named = next((record[name] for name in NAMES if record.get(name)), "")
        try:
            file = _find(root, named)
        except BadImage as error:
            aside.append({"key": named or f"row {line}", "reason": str(error)})
            continue
        own = {} if labels & record.keys() else {"target": str(LABELS.get(file.parent.name.lower(), ""))}
        found.append((file, {**record, **own}))
    keys = _keys(root, [file for file, _ in found])
    files = {keys[file]: file for file, _ in found}
    listed = {file.parent.resolve() / file.name for file in files.values()}
    aside += [{"key": path.relative_to(root).as_posix(), "reason": f"{NOT_LISTED} {table.name}"} for path in image_files(root)
              if path.parent.resolve() / path.name not in listed]
    if not found and records:
        return [], aside
    rows, more = isic.parse(table, [{**record, "image_name": keys[file]} for file, record in found], "synthetic")
    return [replace(row, file=str(files[row.image_name])) for row in rows], aside + more


def _json_lines(table: Path) -> list[dict[str, str]]:
    """The lines of a ``metadata.jsonl`` as a CSV's would be read; what is no plain value is left out.

    Raises:
        UserError: a line that is no JSON object.
    """
    found = []
    for number, line in enumerate(table.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else {}
            found.append({name.strip().lower(): str(int(value) if isinstance(value, bool) else value).strip() for name, value in record.items()
                          if isinstance(value, str | int | float)})
        except (ValueError, AttributeError):
            raise UserError(f"data.synthetic: line {number} of {table} is no JSON object (expected {{\"file_name\": ..., \"label\": ...}})") from None
    return [record for record in found if record]


def _find(root: Path, name: str) -> Path:
    """The file of an image by its name in a table, with or without its ending. A link is followed: the hub's cache consists of them.

    Raises:
        BadImage: it is not in the table's folder.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if not name:
        raise BadImage("no image name")
    if relative.is_absolute() or ".." in relative.parts:
        raise BadImage("the image's path leaves the folder")
    for folder in (root, root / "images"):
        for ending in ("", *ENDINGS, *map(str.upper, ENDINGS)):
            path = folder / f"{relative}{ending}"
            if path.suffix.lower() in ENDINGS and path.is_file():
                return path
    raise BadImage("image file is missing")


def _keys(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """A sample's key for each file: its path without what a key may not hold; where two come out the same, with a hash of the path."""
    names = {path: path.relative_to(root).as_posix() for path in files}
    plain = {path: re.sub(r"[^A-Za-z0-9_-]", "_", re.sub(r"^images/", "", name).removesuffix(path.suffix))[:100] for path, name in names.items()}
    often = Counter(plain.values())
    hashes = {path: hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16] for path, name in names.items() if often[plain[path]] > 1}
    return {path: key + (f"-{hashes[path]}" if path in hashes else "") for path, key in plain.items()}


def make_units(cfg: Config, run: RunDir, task: Task) -> None:
    """Makes this task's shards.

    Raises:
        UserError: a folder that cannot be used, no image in it, too many bad ones, or a dataset that was begun from other images.
    """
    folder = run.dataset(cfg, "synthetic")
    rows, size = [Row(**row) for row in _plan(cfg, folder)["rows"]], cfg.prepare.shard_size
    units = -(-len(rows) // size)
    mine = {unit: rows[unit * size : (unit + 1) * size] for unit in task.mine(list(range(units)))}
    todo = {unit: mine[unit] for unit in missing_parts(folder, units) if unit in mine}
    total = sum(map(len, mine.values()))
    progress = Progress(run, "prepare", task.index, total, "synthetic images", total - sum(map(len, todo.values())))
    for unit, chosen in todo.items():
        with ShardWriter(folder, unit) as shard:
            for row in chosen:
                _add(cfg, shard, row)
                progress.advance()


def finish(cfg: Config, run: RunDir) -> bool:
    """Whether nothing is left to do; the first to find all shards there writes the manifest. Raises ``UserError`` where too many images are bad."""
    if not cfg.data.synthetic:
        return True
    folder = run.dataset(cfg, "synthetic")
    plan = read_json(folder / "plan.json")
    rows = [Row(**row) for row in plan["rows"]]
    units = -(-len(rows) // cfg.prepare.shard_size)
    if missing_parts(folder, units):
        return False
    if not (folder / "manifest.json").exists():
        _check_bad(cfg, folder, rows, [*plan["aside"], *(a for unit in range(units) for a in read_json(part_path(folder, unit))["set_aside"])])
        manifest = write_manifest(folder, units, kind="synthetic", lineage=LINEAGE, settings={"size": cfg.prepare.size, "source": cfg.data.synthetic},
                                  class_names=_class_names(rows), not_used=plan["aside"])
        unused, none = len(plan["aside"]) + len(manifest["set_aside"]), lacking(rows)
        print(f"synthetic images from {cfg.data.synthetic}: {manifest['count']:,}{f' ({none})' if none else ''}, of unknown lineage; {unused:,} "
              "could not be used")
    return True


def _check_bad(cfg: Config, folder: Path, rows: list[Row], aside: list[Aside]) -> None:
    """As of real images. That a table does not list an image is no fault of that."""
    listed = [a for a in aside if not a["reason"].startswith(NOT_LISTED)]
    wanted = {row.image_name for row in rows} | {a["key"] for a in listed}
    set_aside.check(cfg, folder, len(wanted), listed, str(folder))


def _plan(cfg: Config, folder: Path) -> dict[str, Any]:
    """Which image is where: made by whichever task comes first, while the others wait. Without locks each makes it, and the same."""
    with locked(folder / ".index.lock"):
        return _locked_plan(cfg, folder)


def _locked_plan(cfg: Config, folder: Path) -> dict[str, Any]:
    found = read_json(folder / "plan.json")
    if found is None:
        rows, aside = _without_withdrawn(*read(Path(cfg.data.synthetic or "")), Path(cfg.data.shards))
        if not rows:
            raise UserError(f"data.synthetic: {cfg.data.synthetic} holds no image that can be used" + (f" ({aside[0]['reason']})" if aside else ""))
        _check_bad(cfg, folder, rows, aside)
        rows.sort(key=lambda row: random_key(cfg.seed, "external", row.image_name))  # classes mixed in every shard
        rows = list(cpu.in_threads(lambda row: replace(row, sha256=sha256_file(Path(str(row.file)))), rows))
        content = hashlib.sha256("".join(f"{row.image_name} {row.sha256}\n" for row in rows).encode()).hexdigest()
        used = {os.path.normpath(str(row.file)) for row in rows}
        unused = [path for path in map(os.path.normpath, image_files(Path(cfg.data.synthetic or ""))) if path not in used]
        found = {"rows": [vars(row) for row in rows], "aside": aside, "unused": unused, "content": content}
    knobs = {k: v for k, v in asdict(cfg.prepare).items() if k not in ("max_bad", "split")}
    claim(folder, {"stage": "prepare", "prepare": knobs, "seed": cfg.seed, "folder": cfg.data.synthetic, "content": found["content"]})
    if not (folder / "plan.json").exists():
        write_text(folder / "plan.json", json.dumps(found))
    return found


def _without_withdrawn(rows: list[Row], aside: list[Aside], shards: Path) -> tuple[list[Row], list[Aside]]:
    """A file of the name of a real image that was withdrawn in this home may be that image, whatever it is given as."""
    names = withdrawn.at_home(shards).keys
    gone = {row.image_name for row in rows if names & {row.image_name, Path(str(row.file)).stem}}
    return ([row for row in rows if row.image_name not in gone],
            [*aside, *({"key": name, "reason": withdrawn.ASIDE} for name in sorted(gone))])


def _add(cfg: Config, shard: ShardWriter, row: Row) -> None:
    try:
        image = square(read_image(Path(str(row.file)), row.sha256), cfg.prepare.size, cfg.prepare.crop, cfg.prepare.hair_removal)
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
