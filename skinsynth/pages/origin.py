"""Where the synthetic images come from, in facts and in sentences: what trained their generator, what they were drawn over, whose values
they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skinsynth.data import descent, plan
from skinsynth.files import read_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir

ELSEWHERE = "elsewhere"  # as ``data.external`` calls the base of images that were not made here
UNKNOWN = ("It is not known what trained the generator of the synthetic images, so nobody can tell whether test images were among what it saw.")


def lineage(cfg: Config, run: RunDir) -> dict[str, Any]:
    """Of the generator: as the run's own weights say, else as the set does. ``drawn_over`` is the set's. {}: there are neither."""
    made = (read_json(run.dataset(cfg, "synthetic") / "manifest.json") or {}).get("lineage") or {}
    trained = {"group_ids": made["trained_group_ids"]} if "trained_group_ids" in made else {}  # not those that are drawn over
    return {**made, **trained, **(read_json(run.weights / "lineage.json") or {})}


def facts(cfg: Config, run: RunDir) -> dict[str, Any]:
    """For ``report.json``; {} where there are no synthetic images and no weights.

    ``known`` (bool): whether all that trained the generator is; ``base``, ``train``, ``weights_sha256``, ``groups`` (text); ``method``, ``strength``,
    ``redraw`` of ``generate``; ``drawn_over``: how many of the training ``images`` and ``groups``. None: not so, or unknown.
    """
    found, manifest = lineage(cfg, run), read_json(run.dataset(cfg, "synthetic") / "manifest.json")
    if not found and manifest is None:
        return {}
    settings, over = (manifest or {}).get("settings", {}), found.get("drawn_over")
    method = ELSEWHERE if found.get("base") == ELSEWHERE else settings.get("method", cfg.generate.method)
    return {"known": found.get("group_ids") is not None, "base": name(str(found.get("base", "unknown"))), "train": found.get("train"),
            "weights_sha256": found.get("weights_sha256"), "groups": descent.told(found), "method": method,
            "strength": settings.get("strength"), "redraw": settings.get("redraw"),
            "drawn_over": over and {kind: len(over.get(kind, [])) for kind in ("images", "groups")},
            "source": name(str(settings["source"])) if "source" in settings else None}


def trained(origin: dict[str, Any]) -> str:
    """What the generator was trained on. ``origin``: as ``facts`` gives it."""
    groups, train = origin.get("groups", "unknown"), origin.get("train")
    if groups == "none":
        return train or "no images of this or any other run: a general model as it was published"
    if groups == "unknown":
        return f"{train}, and nobody knows what else" if train else "unknown"
    told = f"{train + ': ' if train else ''}{groups} group{'s' * (groups != '1')} (patients, lesions or copies)"
    return told if origin["known"] else f"{told}; all of it nobody knows"


def unknown(summary: dict[str, Any]) -> str | None:
    """``UNKNOWN`` where it is so: as the set says, or as ``screen`` and the arms noted of one that is gone."""
    noted = [summary["synthetic"].get("lineage"), *(row["lineage"] for row in summary["arms"].values())]
    return UNKNOWN if summary["lineage"].get("known") is False or "unknown" in noted else None


def name(base: str) -> str:
    """A hub id as it is; of a path its last part: where things lay on one machine is nobody's business."""
    return Path(base).name if Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1 else base


def made(origin: dict[str, Any]) -> str:
    """What an image shows of a patient, and whose word its class is. ``origin``: as ``facts`` gives it."""
    if origin.get("method") == ELSEWHERE:
        return ("The images were made elsewhere: how, and whether from photographs of patients, is not known here. The class of each is what whoever "
                "made them says.")
    if origin.get("method", "text-to-image") == "text-to-image":
        return ("Every image was drawn by a model from noise and a prompt, and starts from no photograph. Its class is what the model was asked for; "
                "no physician made that diagnosis.")
    over = origin["drawn_over"]
    whose = "a real training image"
    if over:
        whose = f"one of {over['images']:,} real training images of {over['groups']:,} group{'s' * (over['groups'] != 1)}"
    return (f"Every image was drawn by a model over {whose}, at strength {_text(origin['strength'])} (0 leaves what is there, 1 draws it anew). "
            f"{_left(origin)}")


def _left(origin: dict[str, Any]) -> str:
    """What is still the real image's."""
    if origin["method"] == "inpaint" and origin["redraw"] == "skin":
        return ("Only the skin round the lesion was drawn: the lesion itself is a patient's, as it was photographed, and the image's class is that "
                "lesion's diagnosis.")
    if origin["method"] == "inpaint":
        return ("Only the lesion and a rim round it were drawn: the skin round it is a patient's. The class is what the model was asked for, over a "
                "lesion that was chosen for its own.")
    return ("Of the patient's lesion and skin something may still be seen. The class is what the model was asked for, over an image that was chosen "
            "for its own.")


def _text(value: Any) -> str:
    return "unknown" if value is None else str(value)


def columns(cfg: Config, origin: dict[str, Any]) -> str:
    """Where the values beside an image come from, as ``generate`` and ``data.external`` write them."""
    known, method = "Age, sex, site and diagnosis beside an image", origin.get("method", "text-to-image")
    if method == ELSEWHERE:
        return f"{known}, where there are any, stand in the table that came with it; nobody checked them here. Skin type is not known of any."
    if method != "text-to-image":
        return f"{known} are those of the training image that it was drawn over (`source`). Skin type is not known of any."
    if plan.has_fields(cfg):
        return (f"{known} are those of a training image, from which its prompt was filled: asked for, and seen by nobody. Skin type is not known "
                "of any.")
    return "Age, sex, skin type, body site and diagnosis are not known of any image: nobody was photographed."
