"""Is a dataset what it should be? Every planned image once, none else, every checksum right, and the index as the samples say. A few shards are in
memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skinsynth.data.dataset import check_part
from skinsynth.data.plan import key
from skinsynth.data.shards import INDEX_ALONE, missing_parts, part_path
from skinsynth.errors import UserError
from skinsynth.files import read_json

SHOWN = 20  # problems that are listed for a person
AT_ONCE = 8  # shards that are read side by side, each by a thread that has it in memory


@dataclass
class Verified:
    """``planned`` is None where no plan says how many images there should be."""

    folder: str
    kind: str
    images: int = 0
    planned: int | None = None
    left_out: int = 0
    shards: int = 0
    bytes: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.problems}


def verify(folder: Path, tell: Callable[[int, int], None] = lambda done, of: None) -> Verified:
    """Reads all of a dataset, finished or not. ``tell`` hears how many shards were read, of how many.

    Raises:
        UserError: no dataset there.
    """
    problems: list[str] = []
    request, manifest = (_read(folder / name, problems) for name in ("request.json", "manifest.json"))
    if request is None and manifest is None and not problems:
        raise UserError(f"{folder} is no dataset (neither request.json nor manifest.json): give a folder such as shards/isic-synthetic")
    found = Verified(str(folder), (manifest or {}).get("kind", "unfinished"), planned=(request or {}).get("planned"),
                     problems=problems)
    plan = request if found.planned is not None else None
    units = _units(folder, plan, manifest)
    if manifest is None and not (folder / "manifest.json").exists():
        there = len(units) if plan is None else -(-plan["planned"] // plan["shard_size"])
        found.problems.append(f"it is not finished: {len(units)} of {there} shards are there" if plan else "it is not finished: no manifest.json")
    seen: set[str] = set()
    with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        for done, (unit, part, problems) in enumerate(pool.map(lambda unit: _shard(folder, unit, manifest, plan), units), 1):
            found.problems += problems
            if part:
                _count(found, unit, part, seen, plan is None)
            tell(done, len(units))
    _totals(found, folder, manifest, units)
    return found


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """None where it is not there, or is damaged, which is a problem."""
    try:
        return read_json(path)
    except UserError as error:
        problems.append(str(error))
        return None


def _units(folder: Path, plan: dict[str, Any] | None, manifest: dict[str, Any] | None) -> list[int]:
    if manifest is not None:
        return list(range(len(manifest["shards"])))
    count = -(-plan["planned"] // plan["shard_size"]) if plan else 10**6
    return sorted(set(range(count)) - set(missing_parts(folder, count)))


def _shard(folder: Path, unit: int, manifest: dict[str, Any] | None, plan: dict[str, Any] | None) -> tuple[int, Any, list[str]]:
    """The shard's part, or None, and what is wrong."""
    try:
        part = read_json(part_path(folder, unit))
        check_part(part_path(folder, unit), manifest["shards"][unit] if manifest else {**(part or {}), "count": (part or {}).get("count")}, part)
        tar = (folder / part["shard"]).read_bytes()
    except (UserError, KeyError) as error:
        return unit, None, [str(error)]
    except FileNotFoundError as error:
        return unit, part, [] if (folder / INDEX_ALONE).exists() else [f"{part['shard']}: {error.strerror}"]
    except OSError as error:
        return unit, None, [f"{part['shard']}: {error.strerror}"]
    problems = [*_content(part, tar), *_columns(part, tar)]
    if plan:
        problems += _against_plan(part, unit, plan)
    return unit, part, problems


def _content(part: dict[str, Any], tar: bytes) -> Iterator[str]:
    """Where a tar differs from its index; the single samples are looked at only where the whole is not as it was written."""
    name = part["shard"]
    if len(tar) != part["bytes"]:
        yield f"{name} has {len(tar)} bytes of {part['bytes']}"
    same = hashlib.sha256(tar).hexdigest() == part["sha256"]
    if not same:
        yield f"{name} has another sha256 than when it was written"
    for sample, members in zip(part["keys"], part["members"], strict=True):
        for extension, (offset, size, *checksum) in members.items():
            called = f"{sample}.{extension}"
            if tar[offset - 512 : offset - 512 + len(called) + 1] != called.encode() + b"\0":
                yield f"{name}: {called} is not where the index says"
            elif not same and checksum and zlib.crc32(tar[offset : offset + size]) != checksum[0]:
                yield f"{name}: {called} is damaged"


def _columns(part: dict[str, Any], tar: bytes) -> Iterator[str]:
    """Where the columns of an index, by which training chooses and labels, are not what the samples' own json files say."""
    name, columns = part["shard"], part["columns"]
    ragged = sorted(column for column, values in columns.items() if len(values) != len(part["keys"]))
    if ragged:
        yield f"parts/{name[:-4]}.json has not one {' and one '.join(ragged)} for each of its {len(part['keys'])} samples"
        return
    for i, (sample, members) in enumerate(zip(part["keys"], part["members"], strict=True)):
        offset, size, *checksum = members.get("json", (0, 0))
        written = tar[offset : offset + size]
        if not written or (checksum and zlib.crc32(written) != checksum[0]):  # there is none, or it is damaged, which is told already
            continue
        try:
            record = json.loads(written)
            known = {**record.get("attributes", {}), **record}
        except (ValueError, AttributeError, TypeError):
            yield f"{name}: {sample}.json is not what skinsynth writes"
            continue
        for column, values in columns.items():
            if column in known and known[column] != values[i]:
                yield f"parts/{name[:-4]}.json: {column} of {sample} is {values[i]!r}, in its own json {known[column]!r}"


def _against_plan(part: dict[str, Any], unit: int, plan: dict[str, Any]) -> Iterator[str]:
    numbers = range(unit * plan["shard_size"], min((unit + 1) * plan["shard_size"], plan["planned"]))
    wanted, there = {key(n) for n in numbers}, [*part["keys"], *(item["key"] for item in part["set_aside"])]
    missing, strange = sorted(wanted - set(there)), sorted(set(there) - wanted)
    twice = sorted({k for k in there if there.count(k) > 1}) if len(set(there)) < len(there) else []
    for what, keys in (("lacks", missing), ("has, beside its plan,", strange), ("has twice", twice)):
        if keys:
            yield f"{part['shard']} {what} {len(keys)} images: {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"


def _count(found: Verified, unit: int, part: dict[str, Any], seen: set[str], compare: bool) -> None:
    found.images += part["count"]
    found.left_out += len(part["set_aside"])
    found.shards += 1
    found.bytes += part["bytes"]
    for target in map(str, part["columns"].get("target", [])):
        found.classes[target] = found.classes.get(target, 0) + 1
    if compare:  # without a plan, only all keys together tell a double
        double = sorted(seen.intersection(part["keys"]))
        found.problems += [f"{part['shard']} has {len(double)} images that an earlier shard has: {', '.join(double[:3])}"] if double else []
        seen.update(part["keys"])


def _totals(found: Verified, folder: Path, manifest: dict[str, Any] | None, units: list[int]) -> None:
    if manifest and manifest["count"] != found.images:
        found.problems.append(f"manifest.json speaks of {manifest['count']} images, there are {found.images}")
    elif manifest and manifest["classes"] != found.classes:
        found.problems.append(f"manifest.json counts {manifest['classes']} of each target, the index has {dict(sorted(found.classes.items()))}")
    listed = {f"{unit:05d}.tar" for unit in units}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            found.problems.append(f"{path.name} belongs to no part: it was not finished, or put there by hand")
    if (folder / INDEX_ALONE).exists():
        here = len(listed & {path.name for path in folder.glob("*.tar")})
        found.notes.append(f"its index was brought here by data.remote: {here} of {len(listed)} tars lie here and were read; the others are brought "
                           "when they are needed, or into data.cache")
    temps = list(folder.glob(".*.tmp"))
    if temps:
        found.notes.append(f"{len(temps)} files of tasks that are at work, or died: the next task removes those of dead ones")
    if (folder / "withdrawn.json").exists():
        found.notes.append(f"parts of it are withdrawn: see {folder / 'withdrawn.json'}")
