"""The mark that a folder (a dataset, weights) or samples of it descend from a patient who withdrew: ``withdrawn.json`` in it.

::

    {"groups": {"IP_123": {"keys": null, "why": "trained on them", "when": "2026-11-23"}}}   keys null: all of it

The home of the datasets has one too, with all ids that were withdrawn and their real images as far as there were any: it holds for every dataset in
it, those yet to be prepared or finished included. There an id also has its ``kind``: ``patient`` (or a group), ``lesion``, or null where it was none
that anybody knew of: numbers may be a patient's here and a lesion's there, and it may be an image's name. A dataset that lies elsewhere has its
home's beside it (``THERE``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skinsynth.errors import UserError
from skinsynth.files import locked, read_json, write_json

NAME, THERE = "withdrawn.json", "withdrawn-there.json"
ASIDE = "withdrawn: see withdrawn.json beside the datasets"  # the reason of what is never read
NOTICE = "> **Somebody withdrew"
Marks = dict[str, dict[str, Any]]  # id -> keys, why, when, and in a home kind


def mark(folder: Path, group: str, keys: list[str] | None, why: str, **more: str | None) -> None:
    """``keys``: the samples that are withdrawn; None for the folder as a whole."""
    merge(folder, {group: {"keys": keys, "why": why, **more}})


def merge(folder: Path, groups: Marks, name: str = NAME) -> None:
    """Adds marks to those that are there. Of a mark that says nothing new the file stays as it is: what was made since is made of the same images."""
    if not groups:  # nothing is written then, perhaps since it may not be
        return
    with locked(folder / f".{NAME}.lock"):
        here = _groups(folder / name)
        for group, found in groups.items():
            mine = here.get(group, {"keys": []})["keys"]
            keys = None if mine is None or found["keys"] is None else sorted({*mine, *map(str, found["keys"])})
            if group not in here or mine != keys:
                here[str(group)] = {"when": time.strftime("%Y-%m-%d"), **found, "keys": keys}
                write_json(folder / name, {"groups": here})


def withdrawn_keys(folder: Path) -> set[str]:
    """The samples that must not be read: by the folder's own marks, and by those of the home that it lies in.

    Raises:
        UserError: all of the folder is withdrawn.
    """
    groups = _groups(folder / NAME)
    for group, found in groups.items():
        if found["keys"] is None:
            raise UserError(f"{folder} is withdrawn: group {group}, {found['why']} ({found['when']}); delete it and make it again without that group")
    return {key for found in groups.values() for key in found["keys"]} | of_dataset(folder).keys


def notice(folder: Path) -> str:
    """For a person who opens the folder, one paragraph of Markdown; nothing where nobody withdrew. It names no id: cards are handed on."""
    marks = _groups(folder / NAME).values()
    if not marks:
        return ""
    whole = [found["keys"] is None for found in marks]
    what = "All of this" if any(whole) else f"{len({key for found in marks for key in found['keys']}):,} of these samples"
    why = "; ".join(sorted({found["why"] for found in marks if (found["keys"] is None) == any(whole)}))
    return f"{NOTICE} ({max(found['when'] for found in marks)}).** {what} must not be used any more: {why} ({NAME} tells which).\n\n"


@dataclass(frozen=True)
class Withdrawn:
    """``people``: ids that may be a patient's or a group's; ``things``: those that may be a lesion's, ``unknown`` ones among both; ``keys``: the real
    images that went with them."""

    people: set[str]
    things: set[str]
    unknown: set[str]
    keys: set[str]

    def __bool__(self) -> bool:
        return bool(self.people or self.things)

    def lesions(self, patients: Iterable[str | None]) -> set[str]:
        """The ``things`` where these are all the patients: an id of which nobody could tell is a lesion's only where no patient has it."""
        return self.things - (self.unknown & set(patients))


def at_home(shards: Path) -> Withdrawn:
    """What is withdrawn in a home of datasets."""
    return _withdrawn(_groups(shards / NAME))


def of_dataset(folder: Path) -> Withdrawn:
    """What is withdrawn in the home that a dataset lies in, and in that which it was brought from."""
    return _withdrawn({**_groups(folder / THERE), **_groups(folder.parent / NAME)})


def _withdrawn(groups: Marks) -> Withdrawn:
    of = {kind: {group for group, found in groups.items() if found.get("kind") == kind} for kind in ("patient", "lesion", None)}
    keys = {key for found in groups.values() for key in found["keys"] or ()}
    return Withdrawn(of["patient"] | of[None], of["lesion"] | of[None], of[None], keys | of[None])


def _groups(path: Path) -> Marks:
    return (read_json(path) or {"groups": {}})["groups"]
