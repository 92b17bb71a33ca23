"""report: what came out, for people (``index.html``, one file) and for scripts (``report.json``). A pure reader of the run.

``report.json`` holds no times, paths or versions: a run that was interrupted gives the same bytes as one that was not.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

from skinsynth import config as configs
from skinsynth.data.cache import open_dataset
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task, read_json, write_json, write_text

METRICS = ("accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity")
CLASSES = {0: "benign", 1: "malignant"}
GRID = 12  # images per class and source
RESAMPLES = 2000


def report(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``report/report.json`` and ``report/index.html``; what is missing from the run is said on the page."""
    arms = {arm: run.metrics(f"classify/{arm}") for arm in cfg.classify.arms if run.metrics(f"classify/{arm}")}
    screened, prepared = run.metrics("screen"), run.metrics("prepare")
    summary = {"arms": arms, "synthetic": screened, "data": {s: prepared[s] for s in ("train", "val", "test") if s in prepared},
               "differences": differences(run, arms)}
    folder = run.path / "report"
    write_json(folder / "report.json", summary)
    write_text(folder / "index.html", page(cfg, run, summary))
    run.finish("report", {"arms": len(arms)}, [folder / "report.json", folder / "index.html"])


def differences(run: RunDir, arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Every other arm minus the first one, on the same test images, with the middle 95 % of a bootstrap over groups.

    The groups (patients, lesions) are drawn with replacement, since images of one patient are not independent
    (Efron and Tibshirani 1993, the paired percentile bootstrap).
    """
    names, found = list(arms), []
    for other in names[1:]:
        groups, target, first = _predictions(run, names[0])
        _, _, second = _predictions(run, other)
        if target.min() == target.max():  # one class alone: no AUROC, nothing to balance
            continue
        for metric in ("accuracy", "balanced_accuracy", "auroc"):
            value = _metric(metric, target, second) - _metric(metric, target, first)
            low, high = np.quantile(_bootstrap(metric, groups, target, first, second), (0.025, 0.975))
            found.append({"arms": [other, names[0]], "metric": metric, "value": round(value, 6),
                          "ci": [round(float(low), 6), round(float(high), 6)], "test_images": len(target), "test_groups": len(set(groups))})
    return found


def _predictions(run: RunDir, arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group, target, score) of the test images."""
    with open(run.node(f"classify/{arm}") / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return np.array([r["group"] for r in rows]), np.array([int(r["target"]) for r in rows]), np.array([float(r["score"]) for r in rows])


def _metric(name: str, target: np.ndarray, score: np.ndarray) -> float:
    """Own formulas: scikit-learn checks its input anew each time, and the bootstrap asks some ten thousand times (a test compares them)."""
    if name == "auroc":  # by ranks (Mann-Whitney)
        order = np.argsort(score, kind="stable")
        ranks = np.empty(len(score))
        _, inverse, counts = np.unique(score[order], return_inverse=True, return_counts=True)
        ranks[order] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        positive = target == 1
        return float((ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum())
    right = (score >= 0.5) == (target == 1)
    return float(right.mean()) if name == "accuracy" else float((right[target == 0].mean() + right[target == 1].mean()) / 2)


def _bootstrap(metric: str, groups: np.ndarray, target: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[float]:
    rng, names = np.random.default_rng(0), np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        if 0 < target[drawn].sum() < len(drawn):
            values.append(_metric(metric, target[drawn], second[drawn]) - _metric(metric, target[drawn], first[drawn]))
    return values


def verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """What a reader who stops here should know: a headline, and the figures with their caution."""
    found = next((d for d in summary["differences"] if d["metric"] == "auroc"), None)
    if found is None:
        return ("There is nothing to compare yet.",
                "It takes two trained arms and test images of both classes to say whether synthetic images help; this run does not have them.")
    (low, high), (other, first) = found["ci"], found["arms"]
    if low > 0:
        headline = f"In this run, {other} told malignant from benign better than {first}."
    elif high < 0:
        headline = f"In this run, {other} told malignant from benign worse than {first}."
    else:
        headline = f"This run shows no clear difference between {other} and {first}."
    arms = summary["arms"]
    figures = (f"AUROC {arms[other]['auroc']:.3f} ({other}) against {arms[first]['auroc']:.3f} ({first}), a difference of {found['value']:+.3f}; "
               f"drawing the {found['test_groups']} test patients or lesions anew, 95 % of the differences lie between {low:+.3f} and {high:+.3f}. ")
    return headline, figures + (f"One training run per arm and {found['test_images']} test images cannot prove an effect: another seed would "
                                "give other numbers, and that variation is not in the interval.")


def page(cfg: Config, run: RunDir, summary: dict[str, Any]) -> str:
    """The whole page, pictures and all."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        name=run.name, verdict=verdict(summary), summary=summary, metrics=METRICS, classes=CLASSES, epochs=_epochs(run, summary["arms"]),
        loss=_loss(run), previews=_previews(run),
        prompts=list(dict.fromkeys(p for g in cfg.generate.classes.values() for p in g.prompts)), grids=_grids(cfg, run),
        pairs=_pairs(cfg, run), copy_quantile=cfg.screen.copy_quantile, config=configs.dump(cfg),
        provenance=read_json(run.path / "provenance.json") or {},
        lineage=read_json(run.weights / "lineage.json") or {}, set_aside=run.metrics("prepare").get("set_aside", {}))


def _previews(run: RunDir) -> list[tuple[str, str | None]]:
    """(caption, picture): before and after, and the strip where more was drawn on the way."""
    folder = run.node("finetune") / "previews"
    steps = sorted(folder.glob("[0-9]*.png"))
    found = [("before" if int(path.stem) == 0 else f"after {int(path.stem):,} steps", _picture(path)) for path in (*steps[:1], *steps[1:][-1:])]
    return [*found, ("over time: the number of steps above each", _picture(folder / "strip.png"))] if len(steps) > 2 else found


def _picture(path: Path) -> str | None:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _png(image: np.ndarray) -> str:
    import cv2

    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()).decode()


def _grids(cfg: Config, run: RunDir) -> list[tuple[str, str, str]]:
    """(class, source, picture) of the first images of each class: real training images, and accepted synthetic ones."""
    found, accepted = [], set((read_json(run.node("screen") / "accepted.json") or {"keys": []})["keys"])
    for target, name in CLASSES.items():
        for source, kind in (("real", "train"), ("synthetic", "synthetic")):
            try:
                data = open_dataset(cfg, run, kind)
            except UserError:  # said on the page: the grid is not there
                continue
            chosen = [i for i in data.select({"target": target}) if kind == "train" or data.keys[i] in accepted][:GRID]
            if chosen:
                images = [data.image(i) for i in chosen] + [np.full_like(data.image(chosen[0]), 255)] * (GRID - len(chosen))
                rows = [np.concatenate(images[r:r + 6], axis=1) for r in range(0, GRID, 6)]
                found.append((name, source, _png(np.concatenate(rows))))
    return found


def _pairs(cfg: Config, run: RunDir) -> list[dict[str, Any]]:
    """The nearest pairs as ``screen`` found them, each with its picture: synthetic left, training right."""
    try:
        synthetic, train = open_dataset(cfg, run, "synthetic"), open_dataset(cfg, run, "train")
    except UserError:
        return []
    number = {key: i for data in (synthetic, train) for i, key in enumerate(data.keys)}
    return [{**pair, "picture": _png(np.concatenate([synthetic.image(number[pair["key"]]), train.image(number[pair["train_key"]])], axis=1))}
            for pair in read_json(run.node("screen") / "pairs.json") or [] if pair["key"] in number and pair["train_key"] in number]


def _figure(draw: Any, label: str) -> str:
    """An inline SVG, the same bytes for the same data."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "skinsynth", "font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.4))
        draw(axes)
        axes.grid(alpha=0.25)
        figure.tight_layout()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=False)
        pyplot.close(figure)
    svg = file.getvalue()
    return svg[svg.index("<svg"):].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _epochs(run: RunDir, arms: dict[str, Any]) -> str | None:
    curves = {arm: _rows(run.node(f"classify/{arm}") / "epochs.jsonl") for arm in arms}
    if not any(curves.values()):
        return None

    def draw(axes: Any) -> None:
        for colour, (arm, rows) in zip(("#576574", "#2d7d46", "#b3541e", "#3b5b92", "#7a3b8f"), curves.items(), strict=False):
            axes.plot([r["epoch"] for r in rows], [100 * r["test"]["accuracy"] for r in rows], marker="o", ms=3, color=colour, label=arm)
            chosen = next(r for r in rows if r["step"] == arms[arm]["chosen_step"])
            axes.plot(chosen["epoch"], 100 * chosen["test"]["accuracy"], marker="*", ms=14, color=colour)
        axes.set_xlabel("passes over the real training images")
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False)

    return _figure(draw, "Test accuracy over the epochs, one line per arm")


def _loss(run: RunDir) -> str | None:
    rows = _rows(run.node("finetune") / "metrics.jsonl")
    if not rows:
        return None

    def draw(axes: Any) -> None:
        values = np.array([r["loss"] for r in rows])
        width = max(1, len(values) // 40)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot([r["step"] for r in rows], values, color="#576574", alpha=0.25, lw=0.8)
        axes.plot([r["step"] for r in rows][width - 1:], smooth, color="#b3541e", label=f"mean of {width} steps")
        axes.set_xlabel("step")
        axes.set_ylabel("denoising loss")
        axes.legend(frameon=False)

    return _figure(draw, "Fine-tuning loss over the steps")
