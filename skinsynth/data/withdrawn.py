"""The mark that a folder (a dataset, weights) or samples of it descend from a patient who withdrew: ``withdrawn.json`` in it.

::

    {"groups": {"IP_123": {"keys": null, "why": "trained on them", "when": "2026-11-23"}}}   keys null: all of it

The home of the datasets has one too, with the real images that are withdrawn: it holds for every dataset in it, those yet to be prepared included.
"""

from __future__ import annotations

import time
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


def _groups(folder: Path) -> dict[str, dict[str, Any]]:
    return (read_json(folder / NAME) or {"groups": {}})["groups"]
