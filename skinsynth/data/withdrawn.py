"""The mark that a folder (a dataset, weights) or samples of it descend from a patient who withdrew: ``withdrawn.json`` in it.

::

    {"groups": {"IP_123": {"keys": null, "why": "trained on them", "when": "2026-11-23"}}}   keys null: all of it

The home of the datasets has one too, with all ids that were withdrawn and their real images as far as there were any: it holds for every dataset in
it, those yet to be prepared or finished included.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json

NAME = "withdrawn.json"


def mark(folder: Path, group: str, keys: list[str] | None, why: str) -> None:
    """``keys``: the samples that are withdrawn; None for the folder as a whole."""
    found = read_json(folder / NAME) or {"groups": {}}
    found["groups"][group] = {"keys": keys, "why": why, "when": time.strftime("%Y-%m-%d")}
    write_json(folder / NAME, found)


def merge(folder: Path, groups: dict[str, dict[str, Any]]) -> None:
    """Adds marks that were made elsewhere."""
    here = _groups(folder)
    for group, found in groups.items():
        mine = here.get(group, {"keys": []})["keys"]
        keys = None if mine is None or found["keys"] is None else sorted({*mine, *map(str, found["keys"])})
        if group not in here or mine != keys:
            mark(folder, str(group), keys, str(found["why"]))


def withdrawn_keys(folder: Path) -> set[str]:
    """The samples that must not be read: by the folder's own marks, and by those of the home that it lies in.

    Raises:
        UserError: all of the folder is withdrawn.
    """
    groups = _groups(folder)
    for group, found in groups.items():
        if found["keys"] is None:
            raise UserError(f"{folder} is withdrawn: group {group}, {found['why']} ({found['when']}); delete it and make it again without that group")
    return {key for found in groups.values() for key in found["keys"]} | at_home(folder.parent)[1]


def at_home(shards: Path) -> tuple[set[str], set[str]]:
    """The ids that were withdrawn in a home of datasets, and the real images that went with them."""
    groups = _groups(shards)
    return set(groups), {key for found in groups.values() for key in found["keys"] or ()}


def lesions(ids: set[str], patients: Iterable[str | None]) -> set[str]:
    """Which of the ids may be lesions': a number may be a patient's and, of somebody else, a lesion's. ``patients``: all that there are."""
    return ids - set(patients)


def _groups(folder: Path) -> dict[str, dict[str, Any]]:
    return (read_json(folder / NAME) or {"groups": {}})["groups"]
