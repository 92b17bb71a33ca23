"""A patient withdraws: which images, weights and synthetic images descend from them, and the marks that keep later stages from them.

Nothing is deleted here. A marked image is read by nobody any more; marked weights, and datasets made from them, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skinsynth.data.shards import part_path
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.run import RunDir, read_json


@dataclass(frozen=True)
class Descendant:
    """``keys`` None: all of the folder. ``why`` None: whether it descends from the group is not known, so it is not marked."""

    kind: str
    folder: str
    keys: list[str] | None
    why: str | None


def find(group: str, shards: Path, runs: Path) -> list[Descendant]:
    """All that descends from a patient or lesion group, in a folder of datasets and a folder of runs.

    Raises:
        UserError: no such folder.
    """
    for path in (shards, runs):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give the one of the datasets (--shards) and the one of the runs (--runs)")
    folders = sorted(p.parent for p in shards.glob("*/manifest.json"))
    manifests = {folder: read_json(folder / "manifest.json") for folder in folders}
    found = [d for folder in folders if (d := _real(folder, manifests[folder], group))]
    images = {key for d in found for key in d.keys or []}
    found += [d for folder in folders if (d := _latents(folder, manifests[folder], images))]
    found += [d for folder in folders if (d := _synthetic(folder, manifests[folder], group))]
    whole = {d.folder for d in found}
    for run in sorted(p.parent for p in runs.glob("*/config.yaml")):
        found += _weights(RunDir(run), group, whole)
    return found


def _columns(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Key -> value, of all samples that have such a column."""
    found: dict[str, Any] = {}
    for number in range(len(manifest["shards"])):
        part = read_json(part_path(folder, number))
        found |= dict(zip(part["keys"], part["columns"].get(name, []), strict=False))
    return found


def _real(folder: Path, manifest: dict[str, Any], group: str) -> Descendant | None:
    if manifest.get("kind") != "real" or group not in manifest.get("group_ids", []):
        return None
    keys = sorted(key for key, value in _columns(folder, manifest, "group").items() if value == group)
    return Descendant("real images", str(folder), keys, "images of theirs")


def _latents(folder: Path, manifest: dict[str, Any], images: set[str]) -> Descendant | None:
    if manifest.get("kind") != "latents":
        return None
    parts = (read_json(part_path(folder, number)) for number in range(len(manifest["shards"])))
    keys = sorted(key for part in parts for key in part["keys"] if key in images)
    return Descendant("latents", str(folder), keys, "encoded from images of theirs") if keys else None


def _synthetic(folder: Path, manifest: dict[str, Any], group: str) -> Descendant | None:
    if manifest.get("kind") != "synthetic":
        return None
    keys = sorted(key for key, value in _columns(folder, manifest, "source_group").items() if value == group)
    trained = manifest["lineage"].get("trained_group_ids", manifest["lineage"].get("group_ids"))
    if trained is not None and group in trained:
        return Descendant("synthetic images", str(folder), None, "drawn with weights that were trained on them")
    if keys:
        return Descendant("synthetic images", str(folder), keys, "drawn over images of theirs")
    return Descendant("synthetic images", str(folder), None, None) if trained is None else None


def _weights(run: RunDir, group: str, whole: set[str]) -> list[Descendant]:
    """The generator, and classifiers that were trained on real images of the group or on synthetic ones that descend from it."""
    found = []
    lineage = read_json(run.weights / "lineage.json")
    if lineage and group in (lineage["group_ids"] or []):
        found.append(Descendant("weights of the generator", str(run.weights), None, "trained on images of theirs"))
    cfg = run.config()
    for arm, wanted in cfg.classify.arms.items():
        folders = {str(run.dataset(cfg, {"real": "train", "synthetic": "synthetic"}[name])) for name in wanted.used}
        for weights in sorted(run.node(f"classify/{arm}").glob("**/weights")):
            if folders & whole:
                found.append(Descendant("weights of a classifier", str(weights), None, "trained on images that are withdrawn"))
    return found


def withdraw(group: str, found: list[Descendant]) -> None:
    """Marks all of it, the weights first, so that nothing new is made of them meanwhile."""
    for descendant in sorted(found, key=lambda d: "weights" not in d.kind):
        if descendant.why:
            mark(Path(descendant.folder), group, descendant.keys, descendant.why)
