"""What ``screen`` found, as tables: for the report, and short for cards and comparisons. Of the images' descent it speaks wherever they appear."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from skinsynth.files import read_json
from skinsynth.knobs import Screen
from skinsynth.run import RunDir

SHORT = {"generated": "generated", "accepted": "accepted", "kid": "KID, synthetic to real training images",
         "kid_real": "for scale: KID, real held-out to real training images", "copy_planted": "copies planted, of each disguise",
         "copy_recall": "planted copies found", "copy_false_alarms": "real test images that would be called copies",
         "copied_share": "training images that a synthetic one copies", "copy_threshold": "nearness from which an image is a copy"}
PERCENT = ("copy_recall", "copy_false_alarms", "copied_share")
SPACE = ("images", "real_images", "kid", "fid", "precision", "recall", "density", "coverage")
HEADS = ("images", "real images", "KID", "FID", "precision", "recall", "density", "coverage")
DISGUISES = {"flip": "flipped or turned", "crop": "cropped", "jpeg": "JPEG quality 50", "colour": "tinted", "all": "all of these at once"}


@dataclass
class Table:
    """``rows``: the first cell names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def stopped(run: RunDir) -> dict[str, Any] | None:
    """What was measured of a set that did not pass as a whole and is not used; None where there is no such."""
    found = read_json(run.node("screen") / "metrics.json") or {}
    failed = (found.get("gate") or {}).get("failures")
    return found if failed and not (run.node("screen") / "accepted.json").is_file() else None


def not_passed(found: dict[str, Any]) -> str | None:
    """That the set as a whole did not pass, with the reasons; None where it did. ``found``: as ``results.screened`` gives it."""
    gate = found.get("gate") or {}
    if not gate.get("failures"):
        return None
    used = "was used because the configuration says so" if gate.get("used") else "is not used"
    return f"The synthetic images as a set did not pass the screening, and the set {used}: {'; '.join(gate['failures'])}."


def short(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the main figures, rejections by reason among them."""
    rejected = [(f"rejected: {reason}", str(n)) for reason, n in (found.get("rejected") or {}).items() if n]
    classes = [(f"accepted, {name}", count) for name, count in accepted(found)]
    rows = [(label, _text(key, found[key], found)) for key, label in SHORT.items() if key in found]
    told = [("what trained their generator", "unknown: test images may be among it")] if found.get("lineage") == "unknown" else []
    return [*rows[:2], *classes, *told, *rejected, *rows[2:]]


def accepted(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(class, how many images of it were accepted). A run that was screened by an earlier version does not say of how many."""
    rows = found.get("classes") or found.get("kid_per_class") or {}
    return [(name, f"{row['accepted']:,}" + (f" of {row['generated']:,}" if "generated" in row else "")) for name, row in rows.items()]


def plus_minus(knobs: Screen) -> str:
    """What ± means beside KID."""
    return (f"KID is the mean over {knobs.kid_subsets} random subsets of up to {knobs.kid_subset_size} images a side, and of half of the smaller "
            "set at most. The number after ± is the standard deviation over these: how much KID of so few images varies, more than that of all does.")


def _text(key: str, value: Any, beside: dict[str, Any]) -> str:
    if value is None:
        return "–"
    if key in PERCENT:
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    std = beside.get(f"{key}_std")
    if std is None:
        return f"{value:.3f}"
    digits = _digits(std)
    return f"{value:.{digits}f} ± {std:.{digits}f}"


def _digits(std: float) -> int:
    """Decimals that show two digits of a spread: three or more, and no more than the five that are measured."""
    return 5 if std <= 0 else min(5, max(3, 1 - math.floor(math.log10(std))))


def tables(found: dict[str, Any]) -> list[Table]:
    """Those that the run's figures fill; a run that was screened by an earlier version has fewer."""
    return [table for make in (_fates, _distances, _copies, _agreement) if (table := make(found))]


def _fates(found: dict[str, Any]) -> Table | None:
    if "generated" not in found:
        return None
    limits, real = found.get("limits", {}), found.get("real_rejected", {})
    rows: list[tuple[str, ...]] = [("generated", f"{found['generated']:,}", "", ""), ("accepted", f"{found.get('accepted', 0):,}", "", ""),
                                   *((f"accepted, {name}", count, "", "") for name, count in accepted(found))]
    for reason, count in (found.get("rejected") or {}).items():
        beyond = f"{100 * real[reason]:.1f} %" if reason in real else ""
        rows.append((f"set aside: {reason}", f"{count:,}", beyond, f"{limits[reason]:,.3g}" if limits.get(reason) is not None else ""))
    return Table("What became of the synthetic images; beside it the share of real held-out images that the same limit would set aside",
                 ("what became of them", "synthetic", "real held-out", "limit"), rows)


def _distances(found: dict[str, Any]) -> Table | None:
    spaces = found.get("distances") or _kid_alone(found)
    if not spaces:
        return None
    real = {f"real {name}": value for name, value in spaces.get("real_per_class", {}).items()}
    named = {"all": "all", **{name: name for name in spaces.get("per_class", {})}, "real": "for scale: real held-out",
             **{name: f"for scale: {name} held-out" for name in real}}
    values = {"all": spaces.get("all"), **spaces.get("per_class", {}), "real": spaces.get("real"), **real}
    rows: list[tuple[str, ...]] = [(label, *(_text(key, values[name].get(key), values[name]) for key in SPACE))
                                   for name, label in named.items() if values.get(name)]
    warned = [label for name, label in named.items() if (values.get(name) or {}).get("fid_warning")]
    notes = [f"FID is biased by so few images ({', '.join(warned)}): go by KID, which is not."] if warned else []
    return Table(f"Distances to the real training images in the feature space {found.get('features', 'unknown')}", ("compared", *HEADS), rows, notes)


def _kid_alone(found: dict[str, Any]) -> dict[str, Any]:
    """Of a run that an earlier version screened."""
    if "kid" not in found:
        return {}
    return {name: {"kid": found.get(f"kid{end}"), "kid_std": found.get(f"kid{end}_std")} for name, end in (("all", ""), ("real", "_real"))}


def _copies(found: dict[str, Any]) -> Table | None:
    if "copy_recall" not in found:
        return None
    each = found.get("copy_recall_per_disguise") or {"all": found["copy_recall"]}
    rows: list[tuple[str, ...]] = [(f"planted copies found, {DISGUISES.get(name, name)}", f"{100 * share:.1f} %") for name, share in each.items()]
    rows += [(SHORT[key], _text(key, found[key], found)) for key in ("copy_planted", "copy_false_alarms", "copied_share", "copy_threshold")
             if key in found]
    told = (found.get("copies_searched") or {}).get("told")
    return Table("Copies of training images: how well they are found, and how many there are", ("measure", "value"), rows,
                 [f"Looked for among {told}."] if told else [])


def _agreement(found: dict[str, Any]) -> Table | None:
    agreement, detector = found.get("agreement") or {}, found.get("detector") or {}
    if not agreement.get("per_class"):
        return None
    rows: list[tuple[str, ...]] = [(name, *(_text("copy_recall", share.get(kind), {}) for kind in ("synthetic", "real_val")))
                                   for name, share in agreement["per_class"].items()]
    auroc = agreement.get("auroc_val")
    notes = ["The AUROC of that classifier of real images is not known." if auroc is None else
             f"That classifier of real images has an AUROC of {auroc:.3f} on the real validation images."]
    if detector.get("auroc") is not None:
        notes.append(f"A simple detector tells synthetic from real images with an AUROC of {detector['auroc']:.3f} on {detector['tested']:,} images "
                     "that it was not trained on (0.5: it cannot tell them apart).")
    return Table("Share of the images that a plain classifier of real images sees as their class", ("class", "synthetic", "real validation"), rows,
                 notes)
