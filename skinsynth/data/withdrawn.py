"""The mark that a folder (a dataset, weights) or samples of it descend from a patient who withdrew: ``withdrawn.json`` in it.

::

    {"groups": {"IP_123": {"keys": null, "why": "trained on them", "when": "2026-11-23"}}}   keys null: all of it
"""

from __future__ import annotations

import time
from pathlib import Path

from skinsynth.errors import UserError
from skinsynth.run import read_json, write_json

NAME = "withdrawn.json"


def mark(folder: Path, group: str, keys: list[str] | None, why: str) -> None:
    """``keys``: the samples that are withdrawn; None for the folder as a whole."""
    found = read_json(folder / NAME) or {"groups": {}}
    found["groups"][group] = {"keys": keys, "why": why, "when": time.strftime("%Y-%m-%d")}
    write_json(folder / NAME, found)


def withdrawn_keys(folder: Path) -> set[str]:
    """The samples that must not be read.

    Raises:
        UserError: all of the folder is withdrawn.
    """
    groups = (read_json(folder / NAME) or {"groups": {}})["groups"]
    for group, found in groups.items():
        if found["keys"] is None:
            raise UserError(f"{folder} is withdrawn: group {group}, {found['why']} ({found['when']}); delete it and make it again without that group")
    return {key for found in groups.values() for key in found["keys"]}
