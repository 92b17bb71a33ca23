"""Plots as SVG in a data URI: the same bytes for the same data, sharp at any size, no file beside the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

COLOURS = ("#3b5b92", "#b3541e", "#2d7d46", "#7a3b8f", "#576574", "#a3224f", "#0b7a75")  # told apart also by the line's style, for eyes and printers
STYLES = ("-", "--", "-.", ":")


def svg(draw: Callable[[Any], None], size: tuple[float, float] = (5.8, 3.5)) -> str:
    """What ``draw`` puts on the axes, as ``data:image/svg+xml;base64,...``."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "skinsynth", "font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
                                "text.parse_math": False}):  # the names of runs are no formulas
        figure, axes = pyplot.subplots(figsize=size)
        draw(axes)
        axes.grid(alpha=0.25)
        figure.tight_layout()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=False)
        pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def looks(arms: list[str]) -> dict[str, dict[str, str]]:
    """Colour and line style of each arm."""
    return {arm: {"color": colour, "linestyle": style} for arm, colour, style in zip(arms, cycle(COLOURS), cycle(STYLES), strict=False)}


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; none where it is not there. A line that was torn, as the last one of a job that was killed, is left out."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def split_of(curves: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """``test`` where all rows have it, as those of the first releases; ``val``; empty where there is no row."""
    rows = [row for seeds in curves.values() for found in seeds.values() for row in found]
    return "" if not rows else "test" if all("test" in row for row in rows) else "val"


def epochs(curves: dict[str, dict[int, list[dict[str, Any]]]], chosen: dict[str, list[int | None]]) -> tuple[str | None, str]:
    """(figure, which images it is drawn from). ``curves``: arm -> seed -> rows of ``epochs.jsonl``; ``chosen``: arm -> step of each seed."""
    if not (split := split_of(curves)):
        return None, ""

    def draw(axes: Any) -> None:
        for arm, look in looks(list(curves)).items():
            for (number, found), step in zip(enumerate(curves[arm].values()), chosen[arm], strict=True):
                x, y = [r["epoch"] for r in found], [100 * r[split]["accuracy"] for r in found]
                axes.plot(x, y, lw=1.3, alpha=0.9, label=None if number else arm, **look)
                for row in (r for r in found if r["step"] == step):
                    axes.plot(row["epoch"], 100 * row[split]["accuracy"], marker="*", ms=11, color=look["color"])
        axes.set_xlabel("steps x batch / real training images")
        axes.set_ylabel("accuracy, %")
        axes.legend(framealpha=0.85, edgecolor="none")  # over lines that cross it

    return svg(draw), {"test": "test", "val": "validation"}[split]


def roc(arms: dict[str, Any]) -> str | None:
    """Per arm the mean curve of its seeds, and each seed's as a thin line."""
    known = {arm: row["roc"] for arm, row in arms.items() if row.get("roc")}
    if not known:
        return None

    def draw(axes: Any) -> None:
        for arm, look in looks(list(arms)).items():
            if arm not in known:
                continue
            for line in known[arm]["seeds"] if len(known[arm]["seeds"]) > 1 else []:
                axes.plot(known[arm]["fpr"], line, lw=0.6, alpha=0.5, color=look["color"])
            axes.plot(known[arm]["fpr"], known[arm]["tpr"], lw=2, label=f"{arm}, {arms[arm]['auroc']['value']:.3f}", **look)
        axes.plot([0, 1], [0, 1], color="#9aa5b1", lw=0.8)
        axes.axhline(0.8, color="#9aa5b1", lw=0.8, ls=":")
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        axes.set_aspect("equal")
        axes.legend(frameon=False, loc="lower right", title="AUROC")

    return svg(draw, (4.8, 4.6))


def reliability(arms: dict[str, Any]) -> str | None:
    """Share of malignant images over the mean score of each bin; larger dots hold more images."""
    if not any(row.get("calibration") for row in arms.values()):
        return None

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#9aa5b1", lw=0.8)
        for arm, look in looks(list(arms)).items():
            bins = arms[arm]["calibration"]
            size = np.array([b["n"] for b in bins])
            axes.plot([b["score"] for b in bins], [b["share"] for b in bins], lw=1.2, label=arm, **look)
            axes.scatter([b["score"] for b in bins], [b["share"] for b in bins], s=8 + 120 * size / size.sum(), color=look["color"], alpha=0.7)
        axes.set_xlabel("predicted probability of malignant")
        axes.set_ylabel("share that is malignant")
        axes.set_aspect("equal")
        axes.legend(frameon=False, loc="upper left")

    return svg(draw, (4.8, 4.6))


def intervals(rows: list[tuple[str, float, list[float]]], label: str) -> str | None:
    """One line per (name, value, [low, high]): the values with their intervals."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for place, (_, value, (low, high)) in enumerate(reversed(rows)):
            axes.plot([low, high], [place, place], color=COLOURS[0], lw=2)
            axes.plot(value, place, "o", color=COLOURS[0])
        axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(label)

    return svg(draw, (5.8, 1.1 + 0.36 * len(rows)))


def loss(rows: list[dict[str, Any]]) -> str | None:
    """Loss of fine-tuning over the steps, and its moving mean."""
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

    return svg(draw)
