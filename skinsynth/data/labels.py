"""Diagnoses and targets as the official tables have them, which name neither: HAM10000 has a code in ``dx``, the challenges of 2017 to 2019 have
a column of 0 and 1 for each class."""

from __future__ import annotations

from collections.abc import Mapping

CLASSES = {  # code -> diagnosis, and 1 for malignant; actinic keratosis (with intraepithelial carcinoma) counts as in configs/ham10000.yaml
    "mel": ("melanoma", "1"), "bcc": ("basal cell carcinoma", "1"), "scc": ("squamous cell carcinoma", "1"), "akiec": ("actinic keratosis", "1"),
    "ak": ("actinic keratosis", "1"), "nv": ("nevus", "0"), "bkl": ("benign keratosis", "0"), "df": ("dermatofibroma", "0"),
    "vasc": ("vascular lesion", "0"), "melanoma": ("melanoma", "1"), "seborrheic_keratosis": ("seborrheic keratosis", "0"),
    "unk": ("unknown", "UNK"),  # a target that is none, so that the row is set aside
}
ONE_HOT = (({"mel", "nv", "bcc"}, ""), ({"melanoma", "seborrheic_keratosis"}, "nv"))  # columns that tell such a table; the class where none is 1


def spelt_out(record: dict[str, str]) -> dict[str, str]:
    """A row with ``diagnosis`` and ``target`` of what such a table says; columns of these names that it has itself count first."""
    code = _code(record)
    if code is None:
        return record
    diagnosis, target = CLASSES.get(code, ("", code))
    return {"diagnosis": diagnosis, "target": target, **record}


def _code(record: Mapping[str, str]) -> str | None:
    """The class of a row; several, or one that is not known, as they are; None where the table is no such one."""
    if "dx" in record:
        return record["dx"].lower()
    for columns, otherwise in ONE_HOT:
        if columns <= record.keys():
            return "+".join(name for name in CLASSES if record.get(name) in ("1", "1.0")) or otherwise
    return None
