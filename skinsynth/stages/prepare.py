"""Real images -> ``<shards>/<name>-{train,val,test}``: split by group, lesion-centred, hair removed, resized, JPEG.

The *plan* (which image goes to which shard) is made once, by whichever task comes first, and kept as ``plan.json`` in the
train folder. It depends on the metadata, the images' bytes and the configuration, never on the number of tasks. A *unit*
is one output shard of one split. The task that sees all shards present writes the manifests, after the last checks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.table import Table

from skinsynth import cpu
from skinsynth.data import cache, external, given, isic, set_aside, summary, withdrawn
from skinsynth.data.captions import caption
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.folders import MISSING
from skinsynth.data.images import BadImage, Images, mislabelled, read_image
from skinsynth.data.isic import Aside, Row
from skinsynth.data.lesion import square
from skinsynth.data.shards import ShardWriter, claim, missing_parts, part_path, write_manifest
from skinsynth.data.split import groups, random_key, split_groups
from skinsynth.errors import UserError
from skinsynth.files import locked, read_json, sha256_file, write_text
from skinsynth.knobs import Config
from skinsynth.run import SPLITS, Progress, RunDir, Task

KNOWN = ("sex", "age", "site", "diagnosis")


@dataclass
class Plan:
    """What goes where; ``request`` is everything that determines the shards' bytes, a hash of the images included."""

    request: dict[str, Any]
    rows: int  # of the metadata, those set aside included
    set_aside: list[Aside]
    samples: dict[str, dict[str, Any]]  # image name -> the fields of its Row, and its group
    splits: dict[str, list[str]]  # split -> image names in the order of the shards
    duplicates: dict[str, int]  # pairs listed and applied, and images whose very bytes another one has

    def units(self) -> list[tuple[str, int]]:
        """(split, shard) of every unit, in a fixed order."""
        return [(split, i) for split in SPLITS for i in range(self.shards(split))]

    def shards(self, split: str) -> int:
        return -(-len(self.splits[split]) // self.request["prepare"]["shard_size"])

    def names(self, split: str, shard: int) -> list[str]:
        size = self.request["prepare"]["shard_size"]
        return self.splits[split][shard * size : (shard + 1) * size]


def prepare(cfg: Config, run: RunDir, task: Task) -> None:
    """Makes the shards that are this task's and still missing; the last task writes the manifests.

    With ``data.remote`` nothing is made: the index of the datasets there is brought, their tars when they are read.

    Raises:
        UserError: unusable metadata or configuration, too many bad images, a folder of another request, a remote that does not answer.
    """
    if cfg.data.synthetic:
        external.make_units(cfg, run, task)
    if cfg.data.remote:
        manifests = cache.adopt(cfg, run)
        if external.finish(cfg, run):
            _report(cfg, run, manifests)
        return
    given.check(cfg)
    folders = {split: run.dataset(cfg, split) for split in SPLITS}
    plan = _shared_plan(cfg, folders)
    if task.index == 0:
        given.tell_new(cfg, (a["key"] for a in plan.set_aside if a["reason"] == MISSING), print)
    _make_units(cfg, run, task, plan, folders)
    if external.finish(cfg, run) and not any(missing_parts(folders[split], plan.shards(split)) for split in SPLITS):
        _finish(cfg, run, plan, folders)


def _shared_plan(cfg: Config, folders: dict[str, Path]) -> Plan:
    """The plan on disk, or a new one: one task makes it while the others wait. Only a plan that holds claims the folders."""
    path = folders["train"] / "plan.json"
    with locked(Path(cfg.data.shards) / f".{cfg.data.name}.lock"):
        request = _request(cfg)
        found = read_json(path)
        if found is not None and found.keys() != {f.name for f in fields(Plan)}:
            raise UserError(f"{path} was begun by another version of skinsynth: delete {cfg.data.shards}/{cfg.data.name}-* and prepare again")
        plan = Plan(**found) if found is not None else make_plan(cfg, request)
        for folder in folders.values():
            claim(folder, {**request, "content": plan.request["content"]})
        if found is None:
            write_text(path, json.dumps(vars(plan), sort_keys=True))
    return plan


def _request(cfg: Config) -> dict[str, Any]:
    """All that determines the shards, but for the bytes of the images, which the plan adds as ``content``.

    ``max_bad`` is left out: it decides whether to go on, not what comes out.
    """
    data = cfg.data
    knobs = {k: v for k, v in asdict(cfg.prepare).items() if k != "max_bad"}
    hashes = {f"{key}_sha256": sha256_file(Path(path)) if (path := getattr(data, key)) else None for key in ("metadata", "duplicates")}
    paths = {key: getattr(data, key) for key in ("images", "instance_data_dir", "class_data_dir")}
    return {"stage": "prepare", "prepare": knobs, "seed": cfg.seed, **hashes, **paths}


def make_plan(cfg: Config, request: dict[str, Any]) -> Plan:
    """Reads the metadata, hashes the images, groups, splits and orders. Writes nothing but the list of a refusal."""
    data = cfg.data
    if data.metadata:
        rows, aside = isic.read_metadata(Path(data.metadata))
    else:
        rows, aside = isic.read_dreambooth(Path(data.instance_data_dir or ""), Path(data.class_data_dir or ""))
    count = len(rows) + len(aside)
    rows = _without_withdrawn(rows, Path(data.shards), aside)
    rows, hashes = _hash_images(rows, data.images, aside)
    rows = _contradictions(rows, hashes, aside)
    _check_bad(cfg, count, aside)
    pairs = isic.read_pairs(Path(data.duplicates), hashes) if data.duplicates else []
    group_of = groups(rows, hashes, pairs)
    split_of = split_groups(group_of, {r.image_name: r.target for r in rows}, asdict(cfg.prepare.split), cfg.seed)
    order = sorted(group_of, key=lambda name: random_key(cfg.seed, "order", name))
    content = hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
    return Plan({**request, "content": content}, count, aside, {r.image_name: {**vars(r), "group": group_of[r.image_name]} for r in rows},
                {split: [name for name in order if split_of[name] == split] for split in SPLITS}, _duplicates(pairs, hashes))


def _without_withdrawn(rows: list[Row], shards: Path, aside: list[Aside]) -> list[Row]:
    """Drops what was withdrawn from any dataset in this home, before an image is read; of that patient or lesion, new images too."""
    home = withdrawn.at_home(shards)
    lesions = home.lesions(row.patient_id for row in rows)
    gone = {row.image_name for row in rows if row.image_name in home.keys or row.patient_id in home.people or row.lesion_id in lesions}
    aside += [{"key": name, "reason": withdrawn.ASIDE} for name in sorted(gone)]
    return [row for row in rows if row.image_name not in gone]


def _duplicates(pairs: list[tuple[str, str]], hashes: dict[str, str]) -> dict[str, int]:
    """``pairs_applied``: both images are there; ``equal_files``: images beyond the first of each content."""
    applied = sum(one in hashes and other in hashes for one, other in pairs)
    return {"pairs_listed": len(pairs), "pairs_applied": applied, "equal_files": len(hashes) - len(set(hashes.values()))}


def _hash_images(rows: list[Row], images: str | None, aside: list[Aside]) -> tuple[list[Row], dict[str, str]]:
    """The rows whose image is there, with its path, and the sha256 of each; the others are added to ``aside``."""

    folder = Images(Path(images or ""))

    def look(row: Row) -> tuple[str, str]:
        path = Path(row.file) if row.file else folder.find(row.image_name)
        if path.stat().st_size == 0:
            raise BadImage("empty file")
        return str(path), sha256_file(path)

    kept, hashes = [], {}
    for row, found in zip(rows, _in_threads(look, rows), strict=True):
        if isinstance(found, BadImage):
            aside.append({"key": row.image_name, "reason": str(found)})
        else:
            kept.append(replace(row, file=found[0], sha256=found[1]))
            hashes[row.image_name] = found[1]
    return kept, hashes


def _contradictions(rows: list[Row], hashes: dict[str, str], aside: list[Aside]) -> list[Row]:
    """Drops images whose very bytes are listed under both targets: at least one label is wrong, and none says which."""
    targets: dict[str, set[int]] = {}
    for row in rows:
        targets.setdefault(hashes[row.image_name], set()).add(row.target)
    bad = {row.image_name for row in rows if len(targets[hashes[row.image_name]]) > 1}
    aside += [{"key": name, "reason": "the same file is listed with both targets"} for name in sorted(bad)]
    for name in bad:
        del hashes[name]
    return [row for row in rows if row.image_name not in bad]


def _in_threads(work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """``cpu.in_threads``, in which a ``BadImage`` is a result too."""

    def guarded(item: Any) -> Any:
        try:
            return work(item)
        except BadImage as error:
            return error

    cv2.setNumThreads(1)  # the images run side by side already
    yield from cpu.in_threads(guarded, items)


def _make_units(cfg: Config, run: RunDir, task: Task, plan: Plan, folders: dict[str, Path]) -> None:
    units = plan.units()
    mine = task.mine(list(range(len(units))))
    missing = {(split, i) for split in SPLITS for i in missing_parts(folders[split], plan.shards(split))}
    total = sum(len(plan.names(*units[u])) for u in mine)
    todo = [units[u] for u in mine if units[u] in missing]
    progress = Progress(run, "prepare", task.index, total, "images", total - sum(len(plan.names(*unit)) for unit in todo),
                        sum(map(len, plan.splits.values())))
    for split, shard in todo:
        _make_unit(cfg, plan, split, shard, folders[split], progress)


def _make_unit(cfg: Config, plan: Plan, split: str, shard: int, folder: Path, progress: Progress) -> None:
    def work(name: str) -> tuple[bytes, str | None]:
        path = Path(plan.samples[name]["file"])
        image = square(read_image(path, plan.samples[name].get("sha256")), cfg.prepare.size, cfg.prepare.crop, cfg.prepare.hair_removal)
        return encode_jpeg(image, cfg.prepare.quality), mislabelled(path)

    names, notes = plan.names(split, shard), []
    with ShardWriter(folder, shard) as writer:
        for name, made in zip(names, _in_threads(work, names), strict=True):
            progress.advance()
            if isinstance(made, BadImage):
                writer.skip(name, str(made))
                continue
            sample = _sample(plan, name, split)
            columns = {k: sample[k] for k in ("target", "group", "caption", *KNOWN)}
            columns |= {k: plan.samples[name][f"{k}_id"] for k in ("patient", "lesion")}
            writer.add(name, {"jpg": made[0], "json": json.dumps(sample, sort_keys=True).encode()}, **columns)
            notes += [{"key": name, "note": made[1]}] if made[1] else []
        writer.extra["notes"] = notes


def _sample(plan: Plan, name: str, split: str) -> dict[str, Any]:
    """The sample's ``json`` file."""
    fields = dict(plan.samples[name])
    group = fields.pop("group")
    return {"isic_id": name, "group": group, "split": split, "target": fields["target"], **{k: fields[k] for k in KNOWN},
            "caption": caption(Row(**fields)), "origin": "real"}


def _finish(cfg: Config, run: RunDir, plan: Plan, folders: dict[str, Path]) -> None:
    """Checks what all tasks made, writes the manifests and says what is there."""
    parts = {s: [read_json(part_path(folders[s], i)) for i in range(plan.shards(s))] for s in SPLITS}
    kept = {s: [key for part in parts[s] for key in part["keys"]] for s in SPLITS}
    aside = [{"split": "", **a} for a in plan.set_aside]
    aside += [{"split": s, **a} for s in SPLITS for part in parts[s] for a in part["set_aside"]]
    _check_bad(cfg, plan.rows, aside)
    facts = {s: _facts(cfg, plan, s, kept[s], [n for part in parts[s] for n in part["notes"]]) for s in SPLITS}
    facts["train"]["set_aside"] = [a for a in aside if a["split"] in ("", "train")]  # what never reached a split stands here
    check_disjoint(list(facts.values()))
    _check_classes(facts)
    set_aside.write(run.dataset(cfg, "train"), aside)
    _report(cfg, run, {s: write_manifest(folders[s], plan.shards(s), **facts[s]) for s in SPLITS})


def _report(cfg: Config, run: RunDir, manifests: dict[str, dict[str, Any]]) -> None:
    """The last check, what ``done.json`` and the user are told."""
    check_disjoint(list(manifests.values()))
    aside = [{"split": s, **a} for s, m in manifests.items() for a in m["set_aside"]]  # rows of no split stand in that of train
    metrics = {s: {"images": m["count"], "classes": m["classes"], "groups": m["groups"], "patients": m["patients"],
                   "set_aside": sum(a["split"] == s for a in aside)} for s, m in manifests.items()}
    reasons = dict(Counter(a["reason"] for a in aside).most_common())
    rows = len(aside) + sum(m["count"] for m in manifests.values())
    pairs, folder = manifests["train"].get("duplicates"), run.dataset(cfg, "train")
    found = list(manifests.values())
    lines = _lines(rows, len(aside), reasons, pairs)
    if all(group.startswith("sha-") for m in found for group in m["group_ids"]):
        lines.append(isic.without_ids(Path(cfg.data.metadata) if cfg.data.metadata and not cfg.data.remote else None))
    write_text(folder / "split.md", summary.markdown(f"{cfg.data.name}: {cfg.prepare.size} px, seed {cfg.seed}", found, lines))
    run.finish("prepare", {**metrics, "rows": rows, "duplicates": pairs, "set_aside": {"total": len(aside), "reasons": reasons}},
               [run.dataset(cfg, s) / "manifest.json" for s in (*SPLITS, *(["synthetic"] if cfg.data.synthetic else []))])
    _print(cfg, found, [*lines, f"the same as a file: {folder / 'split.md'}"])


def _facts(cfg: Config, plan: Plan, split: str, names: list[str], notes: list[dict[str, str]]) -> dict[str, Any]:
    samples = [plan.samples[name] for name in names]
    ids = sorted({s["group"] for s in samples})
    return {"name": f"{cfg.data.name}-{split}", "split": split, "kind": "real", "size": cfg.prepare.size, "seed": cfg.seed, "groups": len(ids),
            "group_ids": ids, "patients": len({s["patient_id"] for s in samples} - {None}), "notes": notes, "request": plan.request,
            "duplicates": plan.duplicates,
            "statistics": {str(t): summary.statistics([s for s in samples if s["target"] == t]) for t in sorted({s["target"] for s in samples})}}


def _check_bad(cfg: Config, rows: int, aside: list[Aside]) -> None:
    shards = Path(cfg.data.shards)
    set_aside.check(cfg, shards / f"{cfg.data.name}-train", rows, aside, f"{shards}/{cfg.data.name}-*")


def check_disjoint(manifests: list[dict[str, Any]]) -> None:
    """Raises ``UserError`` naming the groups that stand in two of the manifests (their ``group_ids``): leakage."""
    for i, one in enumerate(manifests):
        for other in manifests[i + 1 :]:
            both = sorted(set(one["group_ids"]) & set(other["group_ids"]))
            if both:
                first = ", ".join(both[:5]) + (" ..." if len(both) > 5 else "")
                raise UserError(f"{len(both)} groups (patients, lesions or copies) are in both {one['name']} and {other['name']}: {first}. "
                                "Results on them would be too good: delete both folders and prepare again")


def _check_classes(facts: dict[str, dict[str, Any]]) -> None:
    """The plan gave each split every class; bad images may have taken the last of one."""
    for split, fact in facts.items():
        for label in ("0", "1"):
            if label not in fact["statistics"]:
                raise UserError(f"the {split} split has no usable image of class {label} left: mend the images in set_aside.csv, or change the seed "
                                "or prepare.split, delete the folders and prepare again")


def _lines(rows: int, aside: int, reasons: dict[str, int], pairs: dict[str, int] | None) -> list[str]:
    """What a reader must know beside the table."""
    why = ": " + "; ".join(f"{n:,} x {reason}" for reason, n in reasons.items()) if reasons else ""
    found = [f"{rows:,} rows, {aside:,} set aside{why}"]
    if pairs:  # a set that was prepared by an earlier version and lies elsewhere may not say
        found.append(f"duplicates: {pairs['pairs_applied']:,} of {pairs['pairs_listed']:,} listed pairs applied; {pairs['equal_files']:,} images are "
                     "copies of another file")
    return found


def _print(cfg: Config, manifests: list[dict[str, Any]], lines: list[str]) -> None:
    rows = summary.rows(manifests)
    table = Table(title=f"{cfg.data.name}: {cfg.prepare.size} px, seed {cfg.seed}", box=None, pad_edge=False)
    for column in summary.COLUMNS[:-2]:  # sites and diagnoses need lines of their own in a log of 80 columns
        table.add_column(column, justify="left" if column in summary.LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row[:-2])
    lines = [*(f"{row[0]}, {row[1]}: {row[-2]}; {row[-1]}" for row in rows), *lines]
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
