"""Of whom a sample is, and what something was trained on, by every name that there is: image, patient, lesion, group.

A group is named after one of its members, so its name may be another one once data are prepared anew, with a list of duplicates or with patient
ids. Therefore a lineage lists all names of the samples that were trained on, and all of them are compared::

    "group_ids": [...]     the groups; null: not all that was trained on is known
    "trained_on": {"groups": [...], "images": [...], "patients": [...], "lesions": [...]}    what is known of it (not in older lineages)
    "drawn_over": {...}    of synthetic images: the same of the training images that they were made from (only where there are such)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skinsynth.data import withdrawn
from skinsynth.errors import UserError
from skinsynth.files import read_json

if TYPE_CHECKING:  # it needs numpy, which a launch, that looks for the models, does not
    from skinsynth.data.dataset import Dataset

KINDS = ("groups", "images", "patients", "lesions")  # of names
Names = dict[str, list[str]]  # kind -> sorted


def table(folder: Path, keys: list[str], columns: dict[str, list[Any]]) -> dict[str, list[str | None]]:
    """Kind -> that name of each sample, or None. Older parts have no patients and lesions: these are taken from the plan of ``prepare``."""
    older = "patient" not in columns or len(columns["patient"]) != len(keys)  # begun by an older version, perhaps, and ended by this one
    planned = _planned(folder) if older else {}
    found: dict[str, list[str | None]] = {"images": [*keys], "groups": columns.get("group") or [None] * len(keys)}
    for kind, column in (("patients", "patient"), ("lesions", "lesion")):
        found[kind] = [planned.get(key, {}).get(f"{column}_id") for key in keys] if older else columns[column]
    return found


def _planned(folder: Path) -> dict[str, dict[str, Any]]:
    name, _, split = folder.name.rpartition("-")
    plan = read_json(folder.with_name(f"{name}-train") / "plan.json") if split in ("train", "val", "test") else None
    return plan["samples"] if plan and "samples" in plan else {}


def names(dataset: Dataset, samples: Iterable[int]) -> Names:
    """All names of these samples, as a lineage lists them."""
    of, samples = table(dataset.folder, dataset.keys, dataset.columns), list(samples)
    return {kind: sorted({name for i in samples if (name := of[kind][i]) is not None}) for kind in KINDS}


def union(*found: Names) -> Names:
    return {kind: sorted({name for one in found for name in one.get(kind, ())}) for kind in KINDS}


def trained_on(lineage: dict[str, Any]) -> Names:
    """All that is known of what weights, or those that drew synthetic images, were trained on; of older lineages the groups alone."""
    return union(lineage.get("trained_on") or {}, {"groups": lineage.get("trained_group_ids", lineage.get("group_ids")) or []})


def withdrawn_from(lineage: dict[str, Any], gone: withdrawn.Withdrawn) -> list[str]:
    """The names, sorted, of those withdrawn that something of this lineage is known to have been trained on."""
    known = trained_on(lineage)
    people, lesions = {*known["groups"], *known["patients"]} & gone.people, {*known["lesions"]} & gone.lesions(known["patients"])
    return sorted(people | lesions | {*known["images"]} & gone.keys)


def check_withdrawn(lineage: dict[str, Any], home: Path, what: str) -> None:
    """Raises ``UserError`` where ``what`` (weights, synthetic images) descends from a patient, lesion or image that is withdrawn in the home of the
    datasets: it may have been made, or finished, after it was looked for what descends from them."""
    gone = withdrawn_from(lineage, withdrawn.at_home(home))
    if gone:
        raise UserError(f"{what} is withdrawn: it was trained on {gone[0]}{' and more' * (len(gone) > 1)}, which {home / withdrawn.NAME} names; "
                        "delete it and make it again without")


def told(lineage: dict[str, Any]) -> str:
    """How many groups it descends from, for a reader: ``137``, ``at least 137``, ``none`` (a general model as it is) or ``unknown``."""
    if lineage.get("group_ids") is not None:
        return str(len(lineage["group_ids"]) or "none")
    known = len(trained_on(lineage)["groups"])
    return f"at least {known}" if known else "unknown"


def seen(dataset: Dataset, lineage: dict[str, Any]) -> dict[str | None, list[str]]:
    """Group -> its samples that the lineage names, in whatever way: they were trained on, or drawn over."""
    named = union(trained_on(lineage), lineage.get("drawn_over") or {}, {"groups": lineage.get("group_ids") or []})
    known = {kind: set(found) for kind, found in named.items()}
    known["patients"] |= known["groups"]  # most groups are named after a patient, whose group may have another name here
    of, found = table(dataset.folder, dataset.keys, dataset.columns), defaultdict[str | None, list[str]](list)
    for i, key in enumerate(dataset.keys):
        if any(of[kind][i] in known[kind] for kind in KINDS):
            found[of["groups"][i]].append(key)
    return dict(found)
