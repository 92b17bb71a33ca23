"""What a split holds, in numbers (for the manifests) and in words (``split.md``, and what ``prepare`` prints)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

CLASSES = {"0": "benign", "1": "malignant"}
COLUMNS = ("split", "class", "images", "share", "groups", "patients", "age", "female", "male", "sites", "diagnoses")
LEFT = ("split", "class", "sites", "diagnoses")  # columns of words; those of numbers stand to the right
COMMONEST = 3


def statistics(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one class; ages in years; what is unknown is counted under ``unknown``."""
    ages = [s["age"] for s in samples if s["age"] is not None]
    counts = {k: dict(sorted(Counter(str(s[k] or "unknown") for s in samples).items())) for k in ("sex", "site", "diagnosis")}
    mean = round(sum(ages) / len(ages), 2) if ages else None
    age = {"known": len(ages), "mean": mean, "min": min(ages, default=None), "max": max(ages, default=None)}
    return {"images": len(samples), "groups": len({s["group"] for s in samples}), "patients": len({s["patient_id"] for s in samples} - {None}),
            "age": age, **counts}


def rows(manifests: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row of ``COLUMNS`` per split and class. ``share``: of the class's images in all splits."""
    manifests = list(manifests)
    total = {label: sum(m["statistics"].get(label, {"images": 0})["images"] for m in manifests) for label in CLASSES}
    return [_row(m["split"], label, m["statistics"][label], total[label]) for m in manifests for label in CLASSES if label in m["statistics"]]


def _row(split: str, label: str, found: dict[str, Any], total: int) -> tuple[str, ...]:
    age, images = found["age"], found["images"]
    years = f"{age['mean']:.1f} ({age['min']}-{age['max']})" if age["known"] else "unknown"
    sexes = (_percent(found["sex"].get(sex, 0), images) for sex in ("female", "male"))
    return (split, CLASSES[label], f"{images:,}", _percent(images, total), f"{found['groups']:,}", f"{found['patients']:,}", years, *sexes,
            _commonest(found["site"], images), _commonest(found["diagnosis"], images))


def _commonest(counts: dict[str, int], images: int) -> str:
    first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]
    return ", ".join(f"{name} {_percent(count, images)}" for name, count in first)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def markdown(name: str, manifests: list[dict[str, Any]], lines: Iterable[str]) -> str:
    """The content of ``split.md``: the table, what each split holds in all, and ``lines`` about the whole."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join("---" if column in LEFT else "---:" for column in COLUMNS) + "|"]
    table = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows(manifests)]
    whole = [f"- {m['split']}: {m['count']:,} images, {m['groups']:,} groups, {m['patients']:,} patients" for m in manifests]
    notes = ("Share: of the class's images in all splits. A group is never split: images of one patient, lesion, file content or listed pair of "
             "duplicates. Age in years: mean (range) of those known. Percentages of sex, sites and diagnoses: of the row's images.")
    return "\n".join([f"# {name}", "", *head, *table, "", notes, "", *whole, *(f"- {line}" for line in lines), ""])
