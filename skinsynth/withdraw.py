"""A patient withdraws: which images, weights and synthetic images descend from them, and the marks that keep later stages from them.

Nothing is deleted here. A marked image is read by nobody any more; marked weights, and datasets made from them, are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skinsynth.data import descent
from skinsynth.data.dataset import parts_of, table_of
from skinsynth.data.withdrawn import Withdrawn, mark
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.pages import cards
from skinsynth.run import RunDir

REAL = "real images"
Table = dict[str, list[str | None]]


@dataclass(frozen=True)
class Descendant:
    """``keys`` None: all of the folder. ``why`` None: whether it descends from them is not known, so it is not marked."""

    kind: str
    folder: str
    keys: list[str] | None
    why: str | None


def find(group: str, shards: Path, runs: Path) -> list[Descendant]:
    """All that descends from a patient or a lesion (with the whole group that either is part of), or from a group, in a folder of datasets and a
    folder of runs.

    Raises:
        UserError: no such folder, a dataset instead of their folder, one in it with a damaged index, or an id that is an image's.
    """
    if not group.strip():
        raise UserError("the id is empty: give that of a patient, a lesion or a group")
    for path in (shards, runs):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give the one of the datasets (--shards) and the one of the runs (--runs)")
    if (shards / "manifest.json").exists() or (shards / "request.json").exists():
        raise UserError(f"{shards} is a dataset: give the folder that it lies in (--shards)")
    manifests = _manifests(shards)
    tables = _tables(manifests)
    gone = _resolve(group, tables)
    found = [d for folder, table in tables.items() if (d := _real(folder, table, group, gone))]
    found += [d for folder, manifest in manifests.items() if (d := _latents(folder, manifest, gone))]
    found += [d for folder, manifest in manifests.items() if (d := _synthetic(folder, manifest, gone))]
    for run in _runs(runs):
        found += _weights(RunDir(run), gone, shards, {Path(d.folder).name: d.why for d in found if "weights" not in d.kind})
    return found


def _manifests(shards: Path) -> dict[Path, dict[str, Any]]:
    return {path.parent: read_json(path) for path in sorted(shards.glob("*/manifest.json"))}


def _tables(manifests: dict[Path, dict[str, Any]]) -> dict[Path, Table]:
    """Of the datasets of real images."""
    return {folder: table_of(folder, manifest) for folder, manifest in manifests.items() if manifest.get("kind") == "real"}


def _runs(folder: Path) -> Iterator[Path]:
    """The run folders in it, however deep and behind links: a group may sort them by year or by person. Other tools' have a config.yaml too."""
    seen: set[Path] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = Path(path).resolve()
        if real in seen or {"config.yaml", "provenance.json"} <= {*files}:
            folders.clear()
        if real not in seen and {"config.yaml", "provenance.json"} <= {*files}:
            yield Path(path)
        seen.add(real)
        folders.sort()


def _resolve(group: str, tables: dict[Path, Table]) -> Withdrawn:
    """What an id stands for, with the groups that it is part of (among ``people``) and their images. A group is named after one of its members, and
    not the same in every dataset; an id is a lesion's only where no patient has it."""
    rows = [row for table in tables.values() for row in zip(table["groups"], table["images"], table["patients"], table["lesions"], strict=True)]
    of_image = sorted({str(name) for name, image, patient, lesion in rows if image == group and group not in (name, patient, lesion)})
    if of_image:
        raise UserError(f"{group} is an image, of the group {', '.join(of_image)} (of a patient or lesion, or its copies): give that one's id")
    people, things = ({name for name, _, patient, _ in rows if group in (name, patient)}, {name for name, _, _, lesion in rows if lesion == group})
    groups, lesion, unknown = people or things, bool(things and not people), not (people or things)
    return Withdrawn({str(name) for name in groups} | (set() if lesion else {group}), {group} if lesion or unknown else set(),
                     {group} if unknown else set(), {str(image) for name, image, *_ in rows if name in groups})


def _real(folder: Path, table: Table, group: str, gone: Withdrawn) -> Descendant | None:
    keys = sorted(gone.keys & {*table["images"]})
    joined = sorted(gone.people & {*table["groups"]} - {group})
    why = "images of theirs" + (f" (of group {', '.join(joined)})" if joined else "")
    return Descendant(REAL, str(folder), keys, why) if keys else None


def _latents(folder: Path, manifest: dict[str, Any], gone: Withdrawn) -> Descendant | None:
    if manifest.get("kind") != "latents":
        return None
    keys = sorted(key for part in parts_of(folder, manifest) for key in part["keys"] if key in gone.keys)
    return Descendant("latents", str(folder), keys, "encoded from images of theirs") if keys else None


def _synthetic(folder: Path, manifest: dict[str, Any], gone: Withdrawn) -> Descendant | None:
    if manifest.get("kind") != "synthetic":
        return None
    lineage = manifest.get("lineage") or {}
    if descent.withdrawn_from(lineage, gone):
        return Descendant("synthetic images", str(folder), None, "drawn with weights that were trained on them")
    keys = sorted(key for part in parts_of(folder, manifest) for key in _drawn_over(part, gone))
    if keys:
        return Descendant("synthetic images", str(folder), keys, "drawn over images of theirs")
    return None if _is_known(lineage) else Descendant("synthetic images", str(folder), None, None)


def _drawn_over(part: dict[str, Any], gone: Withdrawn) -> Iterator[str]:
    groups, images = (part["columns"].get(name, [None] * len(part["keys"])) for name in ("source_group", "source"))
    for key, group, image in zip(part["keys"], groups, images, strict=True):
        if group in gone.people or image in gone.keys:
            yield key


def _is_known(lineage: dict[str, Any]) -> bool:
    """Whether all is known that the weights were trained on."""
    return lineage.get("trained_group_ids", lineage.get("group_ids")) is not None


def _weights(run: RunDir, gone: Withdrawn, shards: Path, datasets: dict[str, str | None]) -> list[Descendant]:
    """The generator, and classifiers that were trained on real images of the group or on synthetic ones that descend from it, or may do so.

    ``datasets``: the names of the folders in ``shards`` that do, with the reason, or may do (None).
    """
    found = []
    lineage = read_json(run.weights / "lineage.json")
    if lineage and descent.withdrawn_from(lineage, gone):
        found.append(Descendant("weights of the generator", str(run.weights), None, "trained on images of theirs"))
    elif lineage and not _is_known(lineage):
        found.append(Descendant("weights of the generator", str(run.weights), None, None))
    cfg = run.config()
    if not _is_home(run, Path(cfg.data.shards), shards):
        return found
    for arm, wanted in cfg.classify.arms.items():
        folders = {run.dataset(cfg, {"real": "train", "synthetic": "synthetic"}[name]).name for name in wanted.used} & datasets.keys()
        why = "trained on images that are withdrawn" if any(datasets[folder] for folder in folders) else None
        if folders:
            paths = sorted(run.node(f"classify/{arm}").glob("**/weights"))
            found += [Descendant("weights of a classifier", str(weights), None, why) for weights in paths]
    return found


def _is_home(run: RunDir, told: Path, shards: Path) -> bool:
    """Whether a run's datasets are those. The configuration tells their home as it was typed: where that is relative, to a place that nobody knows
    now, it is taken for this one. What ``prepare`` noted is told from the run's own folder, and moves along with both."""
    made = (read_json(run.done_path("prepare")) or {}).get("outputs", [])
    here = run.path.resolve()
    return (not told.is_absolute() or told.resolve() == shards.resolve()
            or any((here / output).resolve().is_relative_to(shards.resolve()) for output in made))


def withdraw(group: str, found: list[Descendant], shards: Path) -> None:
    """Marks all of it, the weights first, so that nothing new is made of them meanwhile. The home of the datasets is marked in any case: what is
    not prepared yet, or being made now, is not among what was found."""
    images = {key for descendant in found if descendant.kind == REAL for key in descendant.keys or ()}
    gone = _resolve(group, _tables(_manifests(shards)))
    kind = None if group in gone.unknown else "lesion" if group in gone.things else "patient"
    mark(shards, group, sorted(images), "images of theirs", kind=kind)
    for descendant in sorted(found, key=lambda d: "weights" not in d.kind):
        if descendant.why:
            mark(Path(descendant.folder), group, descendant.keys, descendant.why)
            cards.renew(Path(descendant.folder))
