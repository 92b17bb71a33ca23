"""The report as one HTML file that asks for nothing else."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2

from skinsynth import config as configs
from skinsynth import reuse
from skinsynth.files import read_hint, read_json
from skinsynth.knobs import Config, proportion
from skinsynth.pages import figures, origin, pictures, screening
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
                      "range": spread, "mix": mix, "each": each, "quote": shlex.quote}
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def spread(ci: list[float] | None, sign: bool = False) -> str:
    """``low to high``."""
    return "–" if ci is None else " to ".join(signed(v) if sign else number(v) for v in ci)


def mix(phases: list[dict[str, Any]]) -> str:
    """What each batch is drawn from: ``1 real : 3 synthetic``, or that of each phase. ``phases``: as ``results.arm_facts`` gives them."""
    texts = [_mix(phase["sources"]) for phase in phases]
    if len(phases) == 1:
        return texts[0]
    return ", then ".join(f"{text} for {100 * phase['share']:.3g} % of the steps" for text, phase in zip(texts, phases, strict=True))


def _mix(sources: dict[str, float]) -> str:
    used = {name: weight for name, weight in sources.items() if weight > 0}
    if len(used) == 1:
        return f"{next(iter(used))} alone"
    return " : ".join(f"{share} {name}" for share, name in zip(proportion(list(used.values())), used, strict=True))


def each(values: list[Any]) -> str:
    """One value of all seeds, or each of theirs."""
    shown = ["–" if value is None else str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def render(cfg: Config, run: RunDir, summary: dict[str, Any]) -> str:
    """The whole page, pictures and all. ``summary``: as ``results.summary`` gives it."""
    curves = {arm: {seed: figures.lines(folder / "epochs.jsonl") for seed, folder in predictions.finished(cfg, run, arm).items()}
              for arm in summary["arms"]}
    epochs, split = figures.epochs(curves, {arm: row["chosen_step"] for arm, row in summary["arms"].items()})
    (sheets, all_sheets), bad, nodes = pictures.sheets(run), dict[str, str](), configs.needs(cfg)
    return environment().get_template("report.html.j2").render(
        name=run.name, path=cfg.run, summary=summary, missing=missing(cfg, run), metrics=METRICS, main=MAIN, classes=pictures.CLASSES,
        epochs=epochs, epochs_of=split, epoch_rows=_epoch_rows(curves), roc=figures.roc(summary["arms"]),
        reliability=figures.reliability(summary["arms"]),
        loss=figures.loss(figures.lines(run.node("finetune") / "metrics.jsonl")), previews=pictures.previews(run),
        prompts=read_hint(run.node("finetune") / "previews/prompts.json") or [], grids=pictures.grids(cfg, run, bad),
        sheets=sheets, all_sheets=all_sheets, pairs=pictures.pairs(cfg, run, bad), bad=bad, plots=pictures.plots(run),
        screening=screening.tables(summary["synthetic"]), not_passed=screening.not_passed(summary["synthetic"]),
        stopped=screening.stopped(run) is not None, plus_minus=screening.plus_minus(cfg.screen), nodes=nodes,
        origin=summary["lineage"], made=origin.made(summary["lineage"]), trained=origin.trained(summary["lineage"]), unknown=origin.unknown(summary),
        config=configs.dump(cfg), provenance=read_json(run.path / "provenance.json") or {}, taken_over=reuse.origins(cfg, run),
        lineage=origin.lineage(cfg, run),
        set_aside=run.metrics("prepare").get("set_aside", {}), steps=steps(cfg))


def _epoch_rows(curves: dict[str, dict[int, list[dict[str, Any]]]]) -> list[tuple[str, int, int, float, float]]:
    """(arm, seed, step, passes, accuracy) of what the plot of the epochs shows."""
    split = figures.split_of(curves)
    return [(arm, seed, row["step"], row["epoch"], row[split]["accuracy"])
            for arm, seeds in curves.items() for seed, rows in seeds.items() for row in rows]


def steps(cfg: Config) -> list[tuple[str, str, str]]:
    """(what is shown, the file that it is read from, the command that makes it), of the stages that the run's chain has."""
    arms = [(f"figures, curves and subgroups of {arm}", f"classify/{arm}/**/predictions.csv and epochs.jsonl", f"classify {{run}} --arm {arm}")
            for arm in cfg.classify.arms]
    of = {"prepare": [("data", "prepare/done.json", "prepare {run}")],
          "finetune": [("fine-tuning loss, previews", "finetune/metrics.jsonl, finetune/previews", "finetune {run}")],
          "generate": [("synthetic images", "the shards of the run", "generate {run}")],
          "screen": [("screening, nearest pairs", "screen/done.json, screen/pairs.json", "screen {run}")]}
    if cfg.data.synthetic:
        of["prepare"].append(("synthetic images, made elsewhere", "the shards of the run", "prepare {run}"))
    rows = [row for node in configs.needs(cfg) for row in of.get(node, [])] + arms + [("this page, report.json", "report/", "report {run}")]
    return [(shown, file, "python -m jobs." + command.format(run=shlex.quote(cfg.run))) for shown, file, command in rows]
