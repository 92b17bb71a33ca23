"""ISIC metadata and images as they come: rows, groups of images that must stay together, splits, captions.

The metadata is a CSV in the columns of SIIM-ISIC 2020 (Rotemberg et al. 2021) or of ``isic-cli``, or a table of HAM10000 or of the
challenges as published (``tables.py``). What cannot be used is not guessed: it is set aside, with the reason.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps

from skinsynth.data import tables
from skinsynth.data.shards import KEY
from skinsynth.errors import UserError

COLUMNS = {  # ours -> theirs; the first that is filled counts
    "image_name": ("image_name", "isic_id", "file_name", "image_id", "image"),
    "patient_id": ("patient_id",),
    "lesion_id": ("lesion_id",),
    "sex": ("sex",),
    "age": ("age_approx", "age_approximate", "age"),
    "site": ("anatom_site_general_challenge", "anatom_site_general", "anatom_site_1", "localization"),  # _1: the archive's since May 2026
    "diagnosis": ("diagnosis", "diagnosis_3", "diagnosis_2"),
    "target": ("target", "label", "malignant"),
    "malignancy": ("benign_malignant", "diagnosis_1"),
}
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}  # by lower-case ending
MISSING = "image file is missing"
AGAIN = "duplicated id (the same row again; kept once)"
UNKNOWN = {"unknown", "unk", "missing", "not available", "-", "?"}
MIN_SIDE = 16  # pixels
SITES = {"head/neck": "on the head or neck", "head and neck": "on the head or neck", "palms/soles": "on the palm or sole",
         "oral/genital": "in the oral or genital area", "anogenital region": "in the anogenital region", "genital": "in the genital area",
         "acral": "on acral skin"}  # others: "on the ..."

Aside = dict[str, str]  # {"key": image name, "reason": why it is left out}, as in the manifests


@dataclass(frozen=True)
class Row:
    """One image. ``None`` is unknown; age in years; target 1 is malignant; ``file`` only where no folder is searched, or the image
    was found; ``sha256`` of its bytes, then."""

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


class BadImage(Exception):
    """A file that is set aside; the message is the reason."""


def read_metadata(path: Path) -> tuple[list[Row], list[Aside]]:
    """The usable rows of a metadata CSV, in its order, and those set aside.

    Raises:
        UserError: no such file, not a UTF-8 CSV, a needed column is missing, or no row at all.
    """
    return parse(path, tables.read_csv(path, "metadata"))


def parse(path: Path, records: list[dict[str, str]]) -> tuple[list[Row], list[Aside]]:
    """As ``read_metadata``, of the records of a table: strings under lower-case names."""
    if not records:
        raise UserError(f"data.metadata: {path} holds no rows: expected a header line and one line per image")
    records = [tables.spelt_out(record) for record in records]
    _check_columns(path, records[0])
    tables.check_kind(path, records)
    rows: list[Row] = []
    aside: list[Aside] = []
    for line, record in enumerate(records, 2):
        try:
            rows.append(_row(record))
        except ValueError as error:
            aside.append({"key": _stem(_value(record, "image_name")) or f"row {line}", "reason": str(error)})
    return _unique(rows, aside)


def _check_columns(path: Path, first: Mapping[str, str]) -> None:
    """``first``: the first row, under its column names."""
    have = ", ".join(first)
    if any(re.fullmatch(r"isic_\d+(\.jpe?g)?", name) for name in first):  # as the tables of 2016 are published
        raise UserError(f"data.metadata: {path} has no header: its first line is {have}; download the metadata with isic-cli, or give it a header "
                        "line, for example image_name,benign_malignant")
    for needed in (COLUMNS["image_name"], COLUMNS["target"] + COLUMNS["malignancy"]):
        if not first.keys() & set(needed):
            raise UserError(f"data.metadata: {path} has no column '{needed[0]}' (nor {', '.join(needed[1:])}); it has: {have}. Where labels stand "
                            "in another table (Metadata, GroundTruth), join them by the image's name, or download the metadata with isic-cli")


def _row(record: Mapping[str, str]) -> Row:
    """Raises ``ValueError`` with the reason where the row cannot be used."""
    name = _stem(_value(record, "image_name"))
    if not KEY.fullmatch(name):
        raise ValueError("the image name may hold letters, digits, '_' and '-' only" if name else "no image name")
    if kind := tables.other_kind(record):
        raise ValueError(f"not dermoscopic: image_type is '{kind}'")
    sex, site = (value.lower() if (value := _known(record, column)) else None for column in ("sex", "site"))
    diagnosis = _value(record, "diagnosis")
    return Row(name, _target(record), _known(record, "patient_id"), _known(record, "lesion_id"), sex, _age(_value(record, "age")), site,
               diagnosis and re.sub(r",? NOS$", "", diagnosis).lower())


def _value(record: Mapping[str, str], ours: str) -> str | None:
    return next((record[c] for c in COLUMNS[ours] if record.get(c, "").lower() not in tables.EMPTY), None)


def _known(record: Mapping[str, str], ours: str) -> str | None:
    """As ``_value``; None also for a word that says that nobody knows: no patient of that name, who would have all such rows."""
    value = _value(record, ours)
    return None if value is None or value.lower() in UNKNOWN else value


def _stem(name: str | None) -> str:
    return re.sub(rf"({'|'.join(map(re.escape, FORMATS))})$", "", name or "", flags=re.IGNORECASE)


def _age(value: str | None) -> int | None:
    return round(float(value)) if value and re.fullmatch(r"\d{1,2}(\.\d*)?|1[01]\d(\.\d*)?", value) else None


def _target(record: Mapping[str, str]) -> int:
    """0 or 1. Raises ``ValueError`` where the columns do not say so, or contradict."""
    told, word = _value(record, "target"), _value(record, "malignancy")
    if (told or "").lower() in ("benign", "malignant"):  # a Hugging Face label may be the word
        told, word = None, word or told
    by_number = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(told or "")
    by_word = {"benign": 0, "malignant": 1}.get((word or "").lower())
    if told is not None and by_number is None:
        raise ValueError(f"unknown target '{told}' (expected 0 or 1)")
    if by_number is None and by_word is None:
        raise ValueError(f"unknown target ('{word or ''}' is neither benign nor malignant)")
    if by_number is not None and by_word is not None and by_number != by_word:
        raise ValueError(f"target {told} contradicts '{word}'")
    return by_word if by_number is None else by_number  # type: ignore[return-value]


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
    """Two folders of images: the instances get target 1, the class images target 0; the folder's name is the diagnosis.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    label = {1: instance_dir.resolve().name, 0: class_dir.resolve().name}
    if label[0] == label[1]:
        label = {1: "instance", 0: "class"}
    rows, aside = [], []
    for target, folder, key in ((1, instance_dir, "instance_data_dir"), (0, class_dir, "class_data_dir")):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMATS) if folder.is_dir() else []
        if not any(file.is_file() for file in found):
            what = f"holds no image ({', '.join(FORMATS)})" if folder.is_dir() else "is not a folder"
            raise UserError(f"data.{key}: {folder} {what}: give a folder of images")
        for file in found:
            name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{label[target]}_{file.stem}")[:120]
            if file.is_file():
                rows.append(Row(name, target, diagnosis=label[target], file=str(file)))
            else:
                aside.append({"key": name, "reason": "not a file (a folder, or a link to nothing)"})
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


class Images:
    """The image files of a folder by name, whatever their ending, in folders within it too (HAM10000 comes in two). Safe under threads."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, Lock()

    def files(self, name: str) -> list[Path]:
        """Those of that name. One that lies in the folder itself as a .jpg is looked for without reading the folder, which may hold a million."""
        plain = self.folder / f"{name}.jpg"
        if plain.is_file():
            return [plain]
        with self._lock:
            found = self._all.get(name, [])
        direct = [path for path in found if path.parent == self.folder]
        return direct if len(direct) == 1 else found

    def find(self, name: str) -> Path:
        """Raises ``BadImage`` where there is none, or more than one."""
        found = self.files(name)
        if len(found) > 1:
            raise BadImage(f"{len(found)} files have its name: {', '.join(str(path.relative_to(self.folder)) for path in found[:3])}")
        if not found:
            raise BadImage(MISSING)
        return found[0]

    @cached_property
    def _all(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = defaultdict(list)
        for place, folders, files in os.walk(self.folder, followlinks=False):
            folders.sort()
            for file in sorted(files):
                path = Path(place, file)
                if path.suffix.lower() in FORMATS and path.is_file():
                    found[path.stem].append(path)
        return dict(found)


def read_image(path: Path, sha256: str | None = None) -> np.ndarray:
    """uint8 (height, width, 3), RGB, upright. CMYK, grey, palette and alpha are converted (alpha is dropped).

    ``sha256``: of the bytes that the file had when the plan was made.

    Raises:
        BadImage: missing, empty, truncated, not an image, too small, or too large to be one.
        OSError: the file system failed; this says nothing about the image.
        UserError: it is not the file that was planned with.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if sha256:  # a file system that this node has not, perhaps: it must not be taken for images that are missing
            raise _other(path, "is gone") from None
        raise BadImage(MISSING) from None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise _other(path, "has changed")
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_form(image)
            ImageOps.exif_transpose(image, in_place=True)
            upright = image.convert("RGBA") if image.mode == "P" else image
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except BadImage:
        raise
    except Image.DecompressionBombError:  # Pillow's limit: 179 million pixels; the largest ISIC images have about 30
        raise BadImage("more pixels than any dermoscopy image (a decompression bomb?)") from None
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # decoders raise what they like for damaged data: OSError, SyntaxError, struct.error ...
        text = str(error)
        cut = "truncated" in text or "unexpected end" in text
        raise BadImage("truncated image" if cut else f"damaged image ({text or type(error).__name__})") from None


def _other(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what} since prepare looked at the images and split them: put it back as it was (is its file system there on this "
                     "node?) and start the same command again, which goes on; or delete the dataset's folders to prepare the images as they are now")


def _check_form(image: Image.Image) -> None:
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"only {image.width} x {image.height} pixels")
    if image.mode[0] in "IF":
        raise BadImage(f"pixel format {image.mode} (expected 8 bits a channel)")


def mislabelled(path: Path) -> str | None:
    """The real format of an image file whose ending names another one. It is used all the same; the user may want to know."""
    with Image.open(path) as image:
        real = image.format
    return None if real in (FORMATS.get(path.suffix.lower()), "MPO") else f"{path.name} is a {real} file"


def groups(rows: list[Row], hashes: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Image name -> id of the group that must not be torn apart: same patient, lesion, file content or published pair.

    The id is the smallest patient id of the group, else its smallest lesion id, else ``sha-`` and the smallest hash.
    Found by union-find over images, patients, lesions and hashes.
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
        for kind, value in (("patient", row.patient_id), ("lesion", row.lesion_id), ("sha", hashes.get(row.image_name))):
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


def caption(row: Row) -> str:
    """One sentence of what is known, for text-conditioned training. Ages by the decade: a dataset then has some hundred captions, and
    each text need be encoded only once."""
    known = phrases(row)
    named = known["diagnosis"] or f"{'malignant' if row.target else 'benign'} skin lesion"
    return " ".join(word for word in (f"a dermoscopy image of {_article(named)}", known["site"], known["person"]) if word)


def phrases(row: Row) -> dict[str, str]:
    """The words for ``diagnosis``, ``site`` and ``person``, each empty where it is unknown."""
    diagnosis = row.diagnosis.replace("_", " ") if row.diagnosis and row.diagnosis != "unknown" else ""
    site = SITES.get(row.site, f"on the {row.site}") if row.site else ""
    return {"diagnosis": diagnosis, "site": site, "person": _person(row.age, row.sex)}


def _person(age: int | None, sex: str | None) -> str:
    if age is None and sex not in ("male", "female"):
        return ""
    young = age is not None and age < 18
    person = {"male": "boy" if young else "man", "female": "girl" if young else "woman"}.get(sex or "", "child" if young else "person")
    return f"of a {person}" + ("" if age is None else f" {_decade(age, sex)}")


def _decade(age: int, sex: str | None) -> str:
    """``in her 40s`` for 40 to 49 years."""
    whose = {"male": "his", "female": "her"}.get(sex or "", "their")
    return "under 10" if age < 10 else f"in {whose} teens" if age < 20 else f"in {whose} {age // 10 * 10}s"


def _article(noun: str) -> str:
    return f"an {noun}" if re.match(r"[aeiouAEIOU]", noun) else f"a {noun}"
