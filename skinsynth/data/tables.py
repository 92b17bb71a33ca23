"""CSV tables of images as they are published.

Some official ones name neither diagnosis nor target: HAM10000 has a code in ``dx``, the challenges of 2017 to 2019 a column of 0 and 1 for
each class.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from skinsynth.errors import UserError

EMPTY = {"", "na", "n/a", "nan", "none", "null"}
CLASSES = {  # code -> diagnosis, and 1 for malignant; actinic keratosis (with intraepithelial carcinoma) counts as in configs/ham10000.yaml
    "mel": ("melanoma", "1"), "bcc": ("basal cell carcinoma", "1"), "scc": ("squamous cell carcinoma", "1"), "akiec": ("actinic keratosis", "1"),
    "ak": ("actinic keratosis", "1"), "nv": ("nevus", "0"), "bkl": ("benign keratosis", "0"), "df": ("dermatofibroma", "0"),
    "vasc": ("vascular lesion", "0"), "melanoma": ("melanoma", "1"), "seborrheic_keratosis": ("seborrheic keratosis", "0"),
    "unk": ("unknown", "UNK"),  # a target that is none, so that the row is set aside
}
CONVENTION = {"akiec", "ak"}  # some count it as malignant, others not: what a table says itself counts before the code
CODE = "its code"  # where ``spelt_out`` puts it: no column's name
ONE_HOT = (({"mel", "nv", "bcc"}, ""), ({"melanoma", "seborrheic_keratosis"}, "nv"))  # columns that tell such a table; the class where none is 1


def read_csv(path: Path, what: str) -> list[dict[str, str]]:
    """Stripped strings under lower-case column names; a byte order mark, CRLF, and semicolons or tabs for commas are fine.

    Raises:
        UserError: no such file, not UTF-8, a column twice, a row with more fields than the header, whose values would stand under wrong names, or a
            quotation mark that is never closed, which would swallow the lines that follow.
    """
    if not path.is_file():
        raise UserError(f"data.{what}: {path} does not exist or is not a file: give the path of the CSV")
    try:
        text = re.sub(r"\Asep=.\r?\n", "", path.read_bytes().decode("utf-8-sig"))  # what Excel may put before the header
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        header = [name.strip().lower() for name in next(lines, [])]
        _check_twice(path, what, header)
        empty, records = dict.fromkeys(header, ""), []
        for line in lines:
            _check_surplus(path, what, lines.line_num, line[len(header) :])
            if line:
                records.append(empty | dict(zip(header, (sys.intern(v.strip()) for v in line), strict=False)))  # few values differ
        return records
    except UnicodeDecodeError as error:
        raise UserError(f"data.{what}: {path} is not a CSV in UTF-8 ({error}): export it as one") from None
    except csv.Error as error:
        raise UserError(f"data.{what}: {path} cannot be read as a CSV from line {lines.line_num} on, or from a quotation mark before it that is not "
                        f"closed ({error}): mend that line, or export the table again") from None


def _delimiter(text: str) -> str:
    """By the header: where it has no comma, a semicolon (Excel's, where the comma is decimal) or a tab."""
    header = text.partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def _check_twice(path: Path, what: str, header: list[str]) -> None:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise UserError(f"data.{what}: {path} has more than one column '{twice[0]}' (upper and lower case are one): rename or remove all but one")


def _check_surplus(path: Path, what: str, number: int, surplus: list[str]) -> None:
    """Empty fields at the end of a line are as spreadsheets leave them."""
    if any(value.strip() for value in surplus):
        raise UserError(f"data.{what}: line {number} of {path} has more fields than the header has names, so its values may stand under wrong ones: "
                        "put a value that holds a comma in quotation marks (\"head, neck\"), or give the header the name that it lacks")


def spelt_out(record: dict[str, str]) -> dict[str, str]:
    """A row with ``CODE`` and ``diagnosis`` of what such a table says; a column ``diagnosis`` that it has itself counts first."""
    code = _code(record)
    return record if code is None else {"diagnosis": CLASSES.get(code, ("",))[0], **record, CODE: code}


def _code(record: Mapping[str, str]) -> str | None:
    """The class of a row; several, or one that is not known, as they are; None where the table is no such one."""
    if "dx" in record:
        return record["dx"].lower()
    for columns, otherwise in ONE_HOT:
        if columns <= record.keys():
            return "+".join(name for name in CLASSES if record.get(name) in ("1", "1.0")) or otherwise
    return None


def check_kind(path: Path, what: str, records: list[dict[str, str]]) -> None:
    """One by one such rows are set aside; where all are, the whole set is of another kind. ``what``: the key of ``data``, as in ``read_csv``."""
    other = [kind for record in records if (kind := other_kind(record))]
    if len(other) == len(records):
        kinds = ", ".join(sorted(set(other))[:3])
        raise UserError(f"data.{what}: by the column image_type of {path} no image is dermoscopic ({kinds}), and captions, prompts and limits here "
                        "are for dermoscopy images: take such images (to use these all the same, remove the column)")
    if all(other_origin(record, what) for record in records):
        found = ", ".join(sorted({record["origin"] for record in records})[:3])
        wanted, key = ("synthetic", "data.metadata, for real ones") if what == "synthetic" else ("real", "data.synthetic, for synthetic ones")
        raise UserError(f"data.{what}: by the column origin of {path} no image is {wanted} ({found}): give them as {key} (where the column says "
                        "something else, rename it)")


def other_kind(record: Mapping[str, str]) -> str | None:
    """What ``image_type`` calls an image that is not dermoscopic."""
    kind = record.get("image_type", "")
    return kind if kind.lower() not in EMPTY and not re.search("derm(at)?oscop", kind.lower()) else None


def other_origin(record: Mapping[str, str], what: str) -> str | None:
    """The ``origin``, as ``export`` writes it, of an image that is not what the key of ``data`` is for. Another word may be a hospital."""
    origin = record.get("origin", "")
    return origin if origin.lower() == ("real" if what == "synthetic" else "synthetic") else None
