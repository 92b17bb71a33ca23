"""Groups of images that must stay together, and their splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from skinsynth.data.isic import Row
from skinsynth.errors import UserError


def groups(rows: list[Row], hashes: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Image name -> id of the group that must not be torn apart: same patient, lesion, file content, published pair, or group of an exported set.

    The id is the smallest patient id of the group, else its smallest lesion id, else that of an exported group, else ``sha-`` and the smallest hash.
    Found by union-find over images, patients, lesions, exported groups and hashes.
    """
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        root = node
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[node] != root:
            parent[node], node = root, parent[node]
        return root

    for row in rows:
        for kind, value in (("patient", row.patient_id), ("lesion", row.lesion_id), ("group", row.group), ("sha", hashes.get(row.image_name))):
            if value:
                parent[find(f"{kind} {value}")] = find(f"image {row.image_name}")
    for one, other in pairs:
        parent[find(f"image {one}")] = find(f"image {other}")
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[find(f"image {row.image_name}")].append(row)
    patients = {row.patient_id for row in rows}
    return {row.image_name: name for found in members.values() for name in [_group_id(found, hashes, patients)] for row in found}


def _group_id(found: list[Row], hashes: Mapping[str, str], patients: set[str | None]) -> str:
    if named := [row.patient_id for row in found if row.patient_id]:
        return min(named)
    if lesions := [row.lesion_id for row in found if row.lesion_id]:
        return min(lesions) if min(lesions) not in patients else f"lesion-{min(lesions)}"  # "1" may be a patient and a lesion
    if given := [row.group for row in found if row.group]:
        return min(given)
    return min(f"sha-{hashes[row.image_name][:16]}" if row.image_name in hashes else row.image_name for row in found)


def random_key(seed: int, *words: str) -> str:
    """A random sort key, the same on every machine and for every order of the rows."""
    return hashlib.sha256("\0".join((str(seed), *words)).encode()).hexdigest()


def split_groups(group_of: Mapping[str, str], targets: Mapping[str, int], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Image name -> split; whole groups, every class in its share, whatever the order of the rows.

    Groups with the rare class come first, larger before smaller, random within a power of two. Each goes where it
    lowers the chi-square distance between the images of each class that a split has and those it should have.

    Raises:
        UserError: a class has too few groups for every split to hold it.
    """
    counts: dict[str, np.ndarray] = {}  # group -> images of class 0 and of class 1
    for name, group in group_of.items():
        counts.setdefault(group, np.zeros(2, int))[targets[name]] += 1
    _check_classes(counts, list(shares))
    total = np.sum(list(counts.values()), axis=0)
    rare = int(np.argmin(total))
    order = sorted(counts, key=lambda g: (-int(counts[g][rare]).bit_length(), -int(counts[g].sum()).bit_length(), random_key(seed, "split", g)))
    want = np.outer(np.array(list(shares.values())) / sum(shares.values()), total)  # (splits, classes)
    have = np.zeros_like(want)
    place: dict[str, int] = {}
    for group in order:
        v = counts[group]
        place[group] = int(np.argmin((v * (2 * (have - want) + v) / (want * total)).sum(axis=1)))
        have[place[group]] += v
    _fill(place, order, counts, len(shares))
    names = list(shares)
    return {name: names[place[group]] for name, group in group_of.items()}


def _check_classes(counts: Mapping[str, np.ndarray], splits: list[str]) -> None:
    for label in (0, 1):
        found = sum(int(c[label] > 0) for c in counts.values())
        if found < len(splits):
            raise UserError(f"class {label} ({'malignant' if label else 'benign'}) has {found} groups of images (patients, lesions or copies), "
                            f"but the {len(splits)} splits ({', '.join(splits)}) need one each: add images, or correct the ids that join them")


def _fill(place: dict[str, int], order: list[str], counts: Mapping[str, np.ndarray], splits: int) -> None:
    """Gives a split that lacks a class the smallest group with it, from a split that keeps every class it has."""
    for _ in range(2 * splits + 1):
        held = np.zeros((splits, 2), int)  # groups with each class
        for group, at in place.items():
            held[at] += counts[group] > 0
        if held.all():
            return
        to, label = np.argwhere(held == 0)[0]
        spare = [g for g in reversed(order) if counts[g][label] and (held[place[g]][counts[g] > 0] > 1).all()]
        if not spare:
            break
        place[spare[0]] = int(to)
    raise UserError("the groups (patients, lesions, copies) are too few or too large for every split to hold every class: "
                    "add images, or correct the ids that join the groups")
