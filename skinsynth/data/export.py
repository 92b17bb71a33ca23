"""Datasets for people who need files, and one image of a dataset with all that is known of it."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skinsynth.data import descent
from skinsynth.data.dataset import Dataset, check_here, check_part, gone_from
from skinsynth.data.places import Places
from skinsynth.data.shards import part_path
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_text

SIIM = ("image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis", "benign_malignant", "target")
IDS = ("lesion_id", "group")  # columns beyond those: what must not be torn apart where the images are prepared again
OF_PARTS = {"patient_id": "patient", "lesion_id": "lesion"}  # column -> that of the parts; synthetic images have none
EXTRA = ("origin", "prompt", "seed", "weights_sha256", "source")  # columns of synthetic images; source: the real one drawn over


def export(folder: Path, target: Path, form: str, only: set[str] | None, tell: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Writes the images as files: ``siim`` (``images/`` and ``metadata.csv`` in the columns of SIIM-ISIC 2020) or ``imagefolder``
    (``train/`` with ``metadata.csv``, as Hugging Face datasets reads it). Returns how many. Nothing is there before all is.

    Raises:
        UserError: no finished dataset, a key in ``only`` that it does not have, one whose index holds names that could leave a folder, or ``target``
            is there already.
        BadSample: an image that is not as it was written.
    """
    data, target = Dataset.open(folder), target.absolute()
    unknown = sorted(only - {*data.keys} - gone_from(folder, data.manifest)) if only else []
    if unknown:
        raise UserError(f"{folder} has no {unknown[0]}{f' and {len(unknown) - 1} others' * (len(unknown) > 1)} of those listed: the list is of "
                        "another dataset")
    if (kind := data.manifest.get("kind")) not in ("real", "synthetic"):
        raise UserError(f"{folder} holds no images but {kind}: there is nothing to export")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: give a new folder, or delete it")
    temp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        count = _write(data, temp, form, only, tell)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    temp.rename(target)
    return count


def _write(data: Dataset, temp: Path, form: str, only: set[str] | None, tell: Callable[[int, int], None]) -> int:
    count, shards = 0, len(data.manifest["shards"])
    place = temp / ("images" if form == "siim" else "train")
    place.mkdir(parents=True)
    rows, names = io.StringIO(), {"siim": (*SIIM, *IDS, *EXTRA), "imagefolder": ("file_name", *SIIM[1:], *IDS, *EXTRA)}[form]
    table = csv.DictWriter(rows, names, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for number in range(shards):
        for index in data.shard_samples(number):
            key = data.keys[index]
            if only is not None and key not in only:
                continue
            (place / f"{key}.jpg").write_bytes(data.read(index, "jpg"))
            ids = {name: data.columns[column][index] for name, column in OF_PARTS.items() if column in data.columns}
            table.writerow({"file_name": f"{key}.jpg", **_row(key, data.json(index)), **ids, "group": _group(data, index)})
            count += 1
        tell(number + 1, shards)
    write_text((temp if form == "siim" else place) / "metadata.csv", rows.getvalue())
    return count


def _group(data: Dataset, index: int) -> str | None:
    """The same for all of a group, and nobody's id: the group may be called by another patient."""
    group = data.columns["group"][index] if "group" in data.columns else None
    return group and f"group-{hashlib.sha256(group.encode()).hexdigest()[:16]}"


def _row(key: str, record: dict[str, Any]) -> dict[str, Any]:
    known = {**record, **record.get("attributes", {})}
    target = int(record["target"])
    return {**{name: record.get(name) for name in EXTRA}, "image_name": key, "sex": known.get("sex"),
            "age_approx": known.get("age"), "anatom_site_general_challenge": known.get("site"), "diagnosis": known.get("diagnosis"),
            "benign_malignant": "malignant" if target else "benign", "target": target}


def show(folder: Path, key: str) -> tuple[dict[str, Any], bytes]:
    """Everything that is known of one image, and its JPEG.

    Raises:
        UserError: no dataset, no such image, it was left out or is withdrawn (with the reason), or its tar lies elsewhere.
        BadSample: it is not as it was written.
    """
    part, manifest = _part_of(folder, key), read_json(folder / "manifest.json") or {}
    if key in gone_from(folder, manifest):
        raise UserError(f"{key} of {folder} is withdrawn: withdrawn.json in it, or beside it, tells who; its picture must not be used any more")
    check_here(folder / part["shard"])
    data, index = _alone(folder, part), part["keys"].index(key)
    record, jpeg, (offset, size, *_) = data.json(index), data.read(index, "jpg"), part["members"][index]["jpg"]
    lineage = manifest.get("lineage", {})
    groups = descent.told(lineage)
    return {"key": key, **record, "dataset": str(folder), "shard": str(folder / part["shard"]), "offset": offset, "bytes": size,
            **({"made_by": part["made_by"]} if "made_by" in part else {}),
            **({"trained_on": lineage.get("train"), "trained_on_sha256": lineage.get("train_sha256"), "weights_made_by": lineage.get("code"),
                "trained_on_groups": groups if groups in ("unknown", "none") else f"{groups}, listed in {folder / 'manifest.json'} under lineage"}
               if lineage else {})}, jpeg


def _alone(folder: Path, part: dict[str, Any]) -> Dataset:
    """One shard, read with the same checks as a finished dataset: this one may still be in the making."""
    places = Places()
    for members in part["members"]:
        places.append(0, members)
    return Dataset(folder, {"shards": [part]}, part["keys"], part["columns"], places)


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
        check_part(part_path(folder, unit), part, part)
        if key in part["keys"]:
            return part
        for item in part["set_aside"]:
            if item["key"] == key:
                raise UserError(f"{key} was left out of {folder}: {item['reason']}")
    first = (read_json(part_path(folder, 0)) or {"keys": []})["keys"][:1]
    raise UserError(f"{folder} has no image {key} (yet)" + (f": its keys are like {first[0]}" if first else ""))
