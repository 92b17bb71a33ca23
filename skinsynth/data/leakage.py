"""Leakage: what must not have been seen before an arm is judged. Every check names the samples; all but the last word of the byte
comparison is read from the indexes, so that a million synthetic images cost about a second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from skinsynth.data import descent
from skinsynth.data.dataset import Dataset
from skinsynth.data.stream import Source
from skinsynth.errors import UserError

HELD_OUT = ("val", "test")
SHOWN = 5
NAMES = {"groups": "groups (patients or lesions)", "patients": "patients", "lesions": "lesions", "images": "image names"}  # of ``descent.KINDS``


def check(splits: dict[str, Dataset], synthetic: Source | None) -> str | None:
    """Validation and test images are real, and neither their groups nor they themselves were trained on, by the classifier or the generator.

    ``splits``: ``train``, ``val``, ``test``; ``synthetic``: those that are trained on. Returns what is known of the latter's descent: ``known``,
    ``unknown`` (weights whose training data nobody wrote down: allowed, and to be told), or None where there are none.

    Raises:
        UserError: synthetic images in a held-out split; a group, patient, lesion or image name in two splits; a synthetic image drawn over one of a
            held-out group, or by a generator that was trained on one; an image whose very bytes are in a held-out split and elsewhere. The samples
            are named.
    """
    for name in HELD_OUT:
        kind = splits[name].manifest.get("kind")
        if kind != "real":
            raise UserError(f"{splits[name].folder} is of kind '{kind}': only real images may be in the {name} split")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        _check_groups(splits, one, other)
    lineage = (synthetic.dataset.manifest.get("lineage") or {}) if synthetic else {}
    for name in HELD_OUT:
        if synthetic:
            _check_descent(splits[name], name, synthetic, lineage)
        others = [splits["train"], *([splits["val"]] if name == "test" else [])]
        for elsewhere in [*(Source(other, range(len(other))) for other in others), *([synthetic] if synthetic else [])]:
            _check_bytes(splits[name], name, elsewhere)
    return None if synthetic is None else "unknown" if lineage.get("group_ids") is None else "known"


def _check_groups(splits: dict[str, Dataset], one: str, other: str) -> None:
    """By every name: a group may be called otherwise in a split that was prepared apart, and hold the same patient or lesion."""
    tables = [descent.table(split.folder, split.keys, split.columns) for split in (splits[one], splits[other])]
    for kind, told in NAMES.items():
        members = [_members(split.keys, names[kind]) for split, names in zip((splits[one], splits[other]), tables, strict=True)]
        shared = sorted(members[0].keys() & members[1].keys())
        if shared:
            found = (f"{name}: {_some(members[0][name])} ({one}) and {_some(members[1][name])} ({other})" for name in shared)
            raise _leak(f"{len(shared)} {told} are in both {splits[one].folder} and {splits[other].folder}", found)


def _check_descent(held_out: Dataset, name: str, synthetic: Source, lineage: dict[str, Any]) -> None:
    members, dataset = _by_group(held_out), synthetic.dataset
    group_of = {key: group for group, keys in members.items() for key in keys}
    sources, parents = (dataset.columns.get(column, [None] * len(dataset)) for column in ("source", "source_group"))
    drawn_over = [(dataset.keys[i], group_of.get(sources[i], parents[i])) for i in synthetic.samples]  # its name here, not the one of that time
    children = [(key, group) for key, group in drawn_over if group in members]
    if children:
        raise _leak(f"{len(children)} synthetic images of {dataset.folder} were drawn over images of groups of the {name} split",
                    (f"{key} from group {group} ({_some(members[group])})" for key, group in children))
    trained = descent.seen(held_out, lineage)
    if trained:
        raise _leak(f"{len(trained)} groups of the {name} split are, by name or by an image, patient or lesion of theirs, among what the generator "
                    f"of {dataset.folder} was trained on", (f"{group}: {_some(keys)}" for group, keys in sorted(trained.items())))


def _check_bytes(held_out: Dataset, name: str, elsewhere: Source) -> None:
    """The same JPEG bytes; those that do not have the same length and CRC-32 in the index need not be read."""
    prints = defaultdict(list)
    for number in range(len(held_out)):
        prints[_print(held_out, number)].append(number)
    dataset = elsewhere.dataset
    twins = [(i, j) for i in elsewhere.samples for j in prints.get(_print(dataset, i), ()) if dataset.read(i, "jpg") == held_out.read(j, "jpg")]
    if twins:
        raise _leak(f"{len(twins)} images of the {name} split lie, byte for byte, in {dataset.folder} too",
                    (f"{held_out.keys[j]} as {dataset.keys[i]}" for i, j in twins))


def _print(dataset: Dataset, number: int) -> tuple[int, ...]:
    """Bytes and CRC-32, without reading; of older parts, which have no checksum, the bytes and a constant that equals no CRC."""
    _, size, *checksum = dataset.places[number][1]["jpg"]
    return (size, *(checksum or [-1]))


def _by_group(dataset: Dataset) -> dict[Any, list[str]]:
    return _members(dataset.keys, dataset.columns["group"])


def _members(keys: list[str], names: list[str | None]) -> dict[Any, list[str]]:
    """Name -> the samples that bear it; not those without one."""
    found = defaultdict(list)
    for key, name in zip(keys, names, strict=True):
        if name is not None:
            found[name].append(key)
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _leak(what: str, found: Iterable[str]) -> UserError:
    lines = list(found)
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return UserError(f"leakage: {what}:\n  " + "\n  ".join([*lines[:SHOWN], *more]) +
                     "\nmake the datasets again (delete them and launch), or choose another data.name or synthetic set")
