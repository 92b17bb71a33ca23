"""Tables and folders of images as they come, as rows.

The metadata is a CSV in the columns of SIIM-ISIC 2020 (Rotemberg et al. 2021) or of ``isic-cli``, or a table of HAM10000 or of the
challenges as published (``tables.py``). What cannot be used is not guessed: it is set aside, with the reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from skinsynth.data import tables
from skinsynth.data.folders import FORMATS, image_files
from skinsynth.data.shards import KEY
from skinsynth.errors import UserError

COLUMNS = {  # ours -> theirs; the first that is filled counts
    "image_name": ("image_name", "isic_id", "file_name", "image_id", "image"),
    "patient_id": ("patient_id", "patient"),  # patient: ISIC 2020's test images
    "lesion_id": ("lesion_id",),
    "group": ("group",),  # where export wrote the table: elsewhere the word may mean anything
    "sex": ("sex",),
    "age": ("age_approx", "age_approximate", "age"),
    "site": ("anatom_site_general_challenge", "anatom_site_general", "anatom_site_1", "localization"),  # _1: the archive's since May 2026
    "diagnosis": ("diagnosis", "diagnosis_3", "diagnosis_2"),
    "target": ("target", "label", "malignant"),
    "malignancy": ("benign_malignant", "diagnosis_1"),
}
WORDS = {"benign": 0, "malignant": 1}
TARGETS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, **WORDS}  # a Hugging Face label may be the word
AGAIN = "duplicated id (the same row again; kept once)"
UNKNOWN = {"unknown", "unk", "missing", "not available", "-", "?", "-1", "-1.0"}
NO_FILE = "not a file (a folder, or a link to nothing)"
WITHIN = "in a folder within its class's folder: put it beside the others"
Aside = dict[str, str]  # {"key": image name, "reason": why it is left out}, as in the manifests


@dataclass(frozen=True)
class Row:
    """One image. ``None`` is unknown; age in years; target 1 is malignant; ``file`` only where no folder is searched, or the image
    was found; ``sha256`` of its bytes, then. ``group``: of an exported image, the group that it was in, whatever had joined it."""

    image_name: str
    target: int
    patient_id: str | None = None
    lesion_id: str | None = None
    sex: str | None = None
    age: int | None = None
    site: str | None = None
    diagnosis: str | None = None
    file: str | None = None
    sha256: str | None = None
    group: str | None = None


def read_metadata(path: Path) -> tuple[list[Row], list[Aside]]:
    """The usable rows of a metadata CSV, in its order, and those set aside.

    Raises:
        UserError: no such file, not a UTF-8 CSV, a needed column is missing, or no row at all.
    """
    return parse(path, tables.read_csv(path, "metadata"))


def parse(path: Path, records: list[dict[str, str]], what: str = "metadata") -> tuple[list[Row], list[Aside]]:
    """As ``read_metadata``, of the records of a table: strings under lower-case names. ``what``: the key of ``data`` that gives it."""
    if not records:
        raise UserError(f"data.{what}: {path} holds no rows: expected a header line and one line per image")
    records = [tables.spelt_out(record) for record in records]
    _check_columns(path, what, records[0])
    tables.check_kind(path, what, records)
    rows: list[Row] = []
    aside: list[Aside] = []
    for line, record in enumerate(records, 2):
        try:
            rows.append(_row(record, what))
        except ValueError as error:
            aside.append({"key": _stem(_value(record, "image_name")) or f"row {line}", "reason": str(error)})
    return _unique(rows, aside)


def _check_columns(path: Path, what: str, first: Mapping[str, str]) -> None:
    """``first``: the first row, under its column names."""
    have = ", ".join(first)
    if any(re.fullmatch(r"isic_\d+(\.jpe?g)?", name) for name in first):  # as the tables of 2016 are published
        raise UserError(f"data.{what}: {path} has no header: its first line is {have}; download the metadata with isic-cli, or give it a header "
                        "line, for example image_name,benign_malignant")
    rename = "Where another one names the images (img_id, derm, bcn_filename), rename it to image_name. "
    for needed, coded, advice in ((COLUMNS["image_name"], False, rename), (COLUMNS["target"] + COLUMNS["malignancy"], tables.CODE in first, "")):
        if not coded and not first.keys() & set(needed):
            raise UserError(f"data.{what}: {path} has no column '{needed[0]}' (nor {', '.join(needed[1:])}); it has: {have}. {advice}Where labels "
                            "stand in another table (Metadata, GroundTruth), join them by the image's name, or download the metadata with isic-cli")


def _row(record: Mapping[str, str], what: str) -> Row:
    """Raises ``ValueError`` with the reason where the row cannot be used."""
    name = _stem(_value(record, "image_name"))
    if not KEY.fullmatch(name):
        raise ValueError("the image name may hold letters, digits, '_' and '-' only" if name else "no image name")
    if kind := tables.other_kind(record):
        raise ValueError(f"not dermoscopic: image_type is '{kind}'")
    if origin := tables.other_origin(record, what):
        raise ValueError(f"not {'synthetic' if what == 'synthetic' else 'real'}: origin is '{origin}'")
    sex, site = (value.lower() if (value := _known(record, column)) else None for column in ("sex", "site"))
    diagnosis = _value(record, "diagnosis")
    group = _known(record, "group") if record.get("origin", "").lower() == "real" else None
    return Row(name, _target(record), _known(record, "patient_id"), _known(record, "lesion_id"), sex, _age(_value(record, "age")), site,
               diagnosis and re.sub(r",? NOS$", "", diagnosis).lower(), group=group)


def _value(record: Mapping[str, str], ours: str, none: set[str] = tables.EMPTY) -> str | None:
    return next((record[c] for c in COLUMNS[ours] if record.get(c, "").lower() not in none), None)


def _known(record: Mapping[str, str], ours: str) -> str | None:
    """As ``_value``; None also for a word that says that nobody knows: no patient of that name, who would have all such rows."""
    return _value(record, ours, tables.EMPTY | UNKNOWN)


def _stem(name: str | None) -> str:
    return re.sub(rf"({'|'.join(map(re.escape, FORMATS))})$", "", name or "", flags=re.IGNORECASE)


def _age(value: str | None) -> int | None:
    return round(float(value)) if value and re.fullmatch(r"\d{1,2}(\.\d*)?|1[01]\d(\.\d*)?", value) else None


def _target(record: Mapping[str, str]) -> int:
    """0 or 1. Raises ``ValueError`` where neither columns nor code say so, or two of them contradict; a code of ``CONVENTION`` gives way."""
    told, word, code = _value(record, "target"), _value(record, "malignancy"), record.get(tables.CODE, "")
    if told is not None and told.lower() not in TARGETS:
        raise ValueError(f"unknown target '{told}' (expected 0 or 1)")
    said = [(record[c], known[record[c].lower()]) for ours, known in (("target", TARGETS), ("malignancy", WORDS)) for c in COLUMNS[ours]
            if record.get(c, "").lower() in known]
    by_code = tables.CLASSES.get(code, ("", code))[1]
    if by_code in TARGETS and not (said and code in tables.CONVENTION):
        said.append((code, TARGETS[by_code]))
    if not said:
        raise ValueError(f"unknown target '{by_code}' (expected 0 or 1)" if by_code else
                         f"unknown target ('{word or ''}' is neither benign nor malignant)")
    for value, target in said:
        if target != said[0][1]:
            raise ValueError(f"target {said[0][0]} contradicts '{value}'")
    return said[0][1]


def without_ids(table: Path | None) -> str:
    """What to tell where no row has the id of a patient or lesion. Names the columns of the table that look like ids and are not read."""
    names, read = next(iter(tables.read_csv(table, "metadata") if table else []), {}), {c for columns in COLUMNS.values() for c in columns}
    like = [name for name in names if re.search("patient|lesion|subject", name) and name not in read]
    return ("no patient or lesion ids: only identical files and listed pairs of duplicates are kept together"
            + (f" (not read: {', '.join(like)}; what holds such ids must be called patient_id or lesion_id)" if like else ""))


def _unique(rows: list[Row], aside: list[Aside]) -> tuple[list[Row], list[Aside]]:
    """One row per image name: rows that agree are kept once, rows that differ not at all."""
    same: dict[str, list[Row]] = defaultdict(list)
    kept = []
    for row in rows:
        same[row.image_name].append(row)
    for name, found in same.items():
        if all(row == found[0] for row in found):
            kept.append(found[0])
            aside += [{"key": name, "reason": AGAIN}] * (len(found) - 1)
        else:
            aside += [{"key": name, "reason": "duplicated id with rows that differ"}] * len(found)
    return kept, aside


def read_dreambooth(instance_dir: Path, class_dir: Path) -> tuple[list[Row], list[Aside]]:
    """Two folders of images: the instances get target 1, the class images target 0; the folder's name is the diagnosis. Images in folders within them
    are set aside, but for those of the one folder where it lies within the other.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    label = {1: instance_dir.resolve().name, 0: class_dir.resolve().name}
    if label[0] == label[1]:
        label = {1: "instance", 0: "class"}
    rows, aside, within = [], [], dict[Path, str]()
    for target, folder, key in ((1, instance_dir, "instance_data_dir"), (0, class_dir, "class_data_dir")):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMATS) if folder.is_dir() else []
        if not any(file.is_file() for file in found):
            what = f"holds no image ({', '.join(FORMATS)}), folders within it aside" if folder.is_dir() else "is not a folder"
            raise UserError(f"data.{key}: {folder} {what}: give a folder of images")
        for file in found:
            name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{label[target]}_{file.stem}")[:120]
            if file.is_file():
                rows.append(Row(name, target, diagnosis=label[target], file=str(file)))
            else:
                aside.append({"key": name, "reason": NO_FILE})
        within |= {path.resolve(): f"{label[target]}/{path.relative_to(folder).as_posix()}" for path in image_files(folder) if path.parent != folder}
    taken = {Path(str(row.file)).resolve() for row in rows} if within else set()
    aside += [{"key": name, "reason": WITHIN} for path, name in within.items() if path not in taken]
    return _distinct(rows), aside


def _distinct(rows: list[Row]) -> list[Row]:
    """"a.jpg" beside "a.png": two images, so two names, and neither that of "a-2.jpg"."""
    taken, last, named = {row.image_name for row in rows}, dict[str, int](), []
    for row in rows:
        own = name = row.image_name
        while own in last and name in taken:  # the first keeps its name
            last[own] += 1
            name = f"{own[:112]}-{last[own]}"
        last.setdefault(own, 1)
        taken.add(name)
        named.append(replace(row, image_name=name))
    return named


def read_pairs(path: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of image names from the two columns that hold most ids (of these images, or ISIC ids): others may have numbers that are ids by chance.

    Raises:
        UserError: no such file, or not two columns of ids.
    """
    records, known = tables.read_csv(path, "duplicates"), set(names)

    def ids(column: str) -> int:
        return sum(_stem(r[column]) in known or re.fullmatch(r"ISIC_\d+", _stem(r[column])) is not None for r in records)

    header = [column for column in (records[0] if records else []) if column]  # an index as pandas writes it has no name
    counts = {column: count for column in header if (count := ids(column))}
    best = sorted(counts, key=lambda c: (-counts[c], re.search("image|isic|name", c) is None))[:2]
    columns = sorted(best, key=header.index)
    if records and len(columns) < 2:
        raise UserError(f"data.duplicates: {path} needs two columns of image names; it has: {', '.join(records[0])}")
    return [(_stem(r[columns[0]]), _stem(r[columns[1]])) for r in records if r[columns[0]] and r[columns[1]]]
