"""The report as one HTML file that asks for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from skinsynth import config as configs
from skinsynth.data import descent
from skinsynth.files import read_hint, read_json
from skinsynth.knobs import Config
from skinsynth.pages import figures, pictures, screening
from skinsynth.pages.results import missing
from skinsynth.quality import predictions
from skinsynth.quality.metrics import METRICS
from skinsynth.quality.verdict import p_text
from skinsynth.run import RunDir

NAMES = {"auroc": "AUROC", "f1": "F1", "brier": "Brier score", "ece": "calibration error (ECE)", "partial_auroc": "partial AUROC (0 to 0.2)",
         **{f"sensitivity_at_{s}": f"sensitivity at {s} % specificity" for s in (80, 90, 95)}}
MAIN = ("auroc", "balanced_accuracy", "accuracy", "sensitivity_at_90")  # the differences that are seen at once


def environment() -> jinja2.Environment:
    """Of the HTML templates: whatever comes from a run is escaped."""
    found = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"metric": lambda name: NAMES.get(name, name.replace("_", " ")), "p": p_text, "number": number, "signed": signed,
                      "range": spread}
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def spread(ci: list[float] | None, sign: bool = False) -> str:
    """``low to high``."""
    return "unknown" if ci is None else " to ".join(signed(v) if sign else number(v) for v in ci)


def render(cfg: Config, run: RunDir, summary: dict[str, Any]) -> str:
    """The whole page, pictures and all. ``summary``: as ``results.summary`` gives it."""
    epochs, split = _epochs(cfg, run, summary["arms"])
    (sheets, all_sheets), bad = pictures.sheets(run), dict[str, str]()
    return environment().get_template("report.html.j2").render(
        name=run.name, path=cfg.run, summary=summary, missing=missing(cfg, run), metrics=METRICS, main=MAIN, classes=pictures.CLASSES,
        epochs=epochs, epochs_of=split, roc=figures.roc(summary["arms"]), reliability=figures.reliability(summary["arms"]),
        loss=figures.loss(figures.lines(run.node("finetune") / "metrics.jsonl")), previews=pictures.previews(run),
        prompts=read_hint(run.node("finetune") / "previews/prompts.json") or [], grids=pictures.grids(cfg, run, bad),
        sheets=sheets, all_sheets=all_sheets, pairs=pictures.pairs(cfg, run, bad), bad=bad, plots=pictures.plots(run),
        screening=screening.tables(summary["synthetic"]),
        copy_quantile=getattr(cfg.screen, "copy_quantile", None), config=configs.dump(cfg), provenance=read_json(run.path / "provenance.json") or {},
        lineage=_lineage(cfg, run), groups_told=descent.told(_lineage(cfg, run)),
        set_aside=run.metrics("prepare").get("set_aside", {}), steps=steps(cfg))


def _lineage(cfg: Config, run: RunDir) -> dict[str, Any]:
    """What the synthetic images descend from: as the run's own weights say, else as the set does."""
    manifest = read_json(run.dataset(cfg, "synthetic") / "manifest.json") or {}
    return read_json(run.weights / "lineage.json") or manifest.get("lineage") or {}


def _epochs(cfg: Config, run: RunDir, arms: dict[str, Any]) -> tuple[str | None, str]:
    curves = {arm: {seed: figures.lines(folder / "epochs.jsonl") for seed, folder in predictions.finished(cfg, run, arm).items()} for arm in arms}
    return figures.epochs(curves, {arm: row["chosen_step"] for arm, row in arms.items()})


def steps(cfg: Config) -> list[tuple[str, str, str]]:
    """(what is shown, the file that it is read from, the command that makes it)."""
    arms = [(f"figures, curves and subgroups of {arm}", f"classify/{arm}/**/predictions.csv and epochs.jsonl",
             f"python -m jobs.classify {cfg.run} --arm {arm}") for arm in cfg.classify.arms]
    return [("data", "prepare/done.json", f"python -m jobs.prepare {cfg.run}"),
            ("fine-tuning loss, previews", "finetune/metrics.jsonl, finetune/previews", f"python -m jobs.finetune {cfg.run}"),
            ("synthetic images", "the shards of the run", f"python -m jobs.generate {cfg.run}"),
            ("screening, nearest pairs", "screen/done.json, screen/pairs.json", f"python -m jobs.screen {cfg.run}"), *arms,
            ("this page, report.json", "report/", f"python -m jobs.report {cfg.run}")]
