"""Datasets for people who need files, and one image of a dataset with all that is known of it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skinsynth.data.shards import part_path, read_member
from skinsynth.data.withdrawn import withdrawn_keys
from skinsynth.errors import UserError
from skinsynth.run import read_json, write_text

SIIM = ("image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis", "benign_malignant", "target")
EXTRA = ("origin", "prompt", "seed", "weights_sha256")  # columns of synthetic images beyond those


def export(folder: Path, target: Path, form: str, only: set[str] | None, tell: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Writes the images as files: ``siim`` (``images/`` and ``metadata.csv`` in the columns of SIIM-ISIC 2020) or ``imagefolder``
    (``train/`` with ``metadata.csv``, as Hugging Face datasets reads it). Returns how many. Nothing is there before all is.

    Raises:
        UserError: no finished dataset, or ``target`` is there already.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise UserError(f"dataset {folder} is not there or not finished (no manifest.json)")
    if manifest.get("kind") not in ("real", "synthetic"):
        raise UserError(f"{folder} holds no images but {manifest.get('kind')}: there is nothing to export")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: give a new folder, or delete it")
    temp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        count = _write(folder, len(manifest["shards"]), temp, form, only, tell)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    temp.rename(target)
    return count


def _write(folder: Path, shards: int, temp: Path, form: str, only: set[str] | None, tell: Callable[[int, int], None]) -> int:
    gone, count = withdrawn_keys(folder), 0
    place = temp / ("images" if form == "siim" else "train")
    place.mkdir(parents=True)
    rows, names = io.StringIO(), {"siim": (*SIIM, *EXTRA), "imagefolder": ("file_name", *SIIM[1:], *EXTRA)}[form]
    table = csv.DictWriter(rows, names, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for number in range(shards):
        for key, files in samples(folder, number):
            if key in gone or (only is not None and key not in only):
                continue
            (place / f"{key}.jpg").write_bytes(files["jpg"])
            table.writerow({"file_name": f"{key}.jpg", **_row(key, json.loads(files["json"]))})
            count += 1
        tell(number + 1, shards)
    write_text((temp if form == "siim" else place) / "metadata.csv", rows.getvalue())
    return count


def _row(key: str, record: dict[str, Any]) -> dict[str, Any]:
    known = {**record, **record.get("attributes", {})}
    target = int(record["target"])
    patient = "" if record["origin"] == "synthetic" else record["group"]
    return {**{name: record.get(name) for name in EXTRA}, "image_name": key, "patient_id": patient, "sex": known.get("sex"),
            "age_approx": known.get("age"), "anatom_site_general_challenge": known.get("site"), "diagnosis": known.get("diagnosis"),
            "benign_malignant": "malignant" if target else "benign", "target": target}


def samples(folder: Path, number: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one shard: key, and extension -> content."""
    part = read_json(part_path(folder, number))
    with open(folder / part["shard"], "rb") as tar:
        for key, members in zip(part["keys"], part["members"], strict=True):
            yield key, {extension: read_member(tar, place) for extension, place in members.items()}


def show(folder: Path, key: str) -> tuple[dict[str, Any], bytes]:
    """Everything that is known of one image, and its JPEG.

    Raises:
        UserError: no dataset, no such image, or it was left out (with the reason).
    """
    part = _part_of(folder, key)
    members, tar = part["members"][part["keys"].index(key)], folder / part["shard"]
    with open(tar, "rb") as f:
        files = {extension: read_member(f, place) for extension, place in members.items()}
    manifest, record = read_json(folder / "manifest.json") or {}, json.loads(files["json"])
    lineage = manifest.get("lineage", {})
    groups = lineage.get("group_ids")
    return {"key": key, **record, "dataset": str(folder), "shard": str(tar), "offset": members["jpg"][0], "bytes": members["jpg"][1],
            **({"made_by": part["made_by"]} if "made_by" in part else {}),
            **({"trained_on": lineage.get("train"), "trained_on_sha256": lineage.get("train_sha256"), "weights_made_by": lineage.get("code"),
                "trained_on_groups": "unknown" if groups is None else f"{len(groups)}, listed in {folder / 'manifest.json'} under lineage.group_ids"}
               if lineage else {})}, files["jpg"]


def _part_of(folder: Path, key: str) -> dict[str, Any]:
    request = read_json(folder / "request.json")
    if request is None:
        raise UserError(f"{folder} is no dataset (no request.json)")
    number = key.removeprefix("syn-")
    units = [int(number) // request["shard_size"]] if "planned" in request and number.isdigit() else range(10**9)
    for unit in units:
        part = read_json(part_path(folder, unit))
        if part is None:
            break
        if key in part["keys"]:
            return part
        for item in part["set_aside"]:
            if item["key"] == key:
                raise UserError(f"{key} was left out of {folder}: {item['reason']}")
    first = (read_json(part_path(folder, 0)) or {"keys": []})["keys"][:1]
    raise UserError(f"{folder} has no image {key} (yet)" + (f": its keys are like {first[0]}" if first else ""))
