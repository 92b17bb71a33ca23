"""Several finished runs on one page: ``skinsynth report A B C``.

Runs with the very same test images are compared pair by pair on the same resamples. Others have resamples of their own, and their differences are
marked as unpaired: there another set of test images alone can make a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from skinsynth.errors import UserError
from skinsynth.files import write_json, write_text
from skinsynth.knobs import Config
from skinsynth.pages import figures, page, results, screening
from skinsynth.quality import predictions
from skinsynth.quality.compare import Estimate, arms, correct, difference, differences, estimates, size
from skinsynth.quality.metrics import METRICS
from skinsynth.quality.predictions import Predictions
from skinsynth.quality.verdict import verdict
from skinsynth.run import RunDir


def reports(paths: Sequence[Path | str], out: Path) -> Path:
    """Writes ``out/index.html`` and ``out/report.json`` about the runs in ``paths`` (two or more folders); returns the page's path.

    The first arm of the first run is what the others are held against. Arms are called ``<run>/<arm>``.

    Raises:
        UserError: fewer than two runs, one given twice, a folder that is no run, or damaged predictions.
    """
    runs = [RunDir(Path(path)) for path in paths]
    if len(runs) < 2 or len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("report compares two or more different runs: give each run folder once")
    found = [(name, run, run.config()) for name, run in zip(_names(runs), runs, strict=True)]
    summary = gather(found)
    write_json(out / "report.json", summary)
    write_text(out / "index.html", _page(found, summary))
    return out / "index.html"


def _names(runs: list[RunDir]) -> list[str]:
    """Folder names; where two are alike, with their number."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


def gather(found: list[tuple[str, RunDir, Config]]) -> dict[str, Any]:
    """What ``report.json`` holds: ``arms``, ``differences``, ``synthetic`` and ``unfinished`` by run, ``same_test_images``, ``verdict``."""
    sets = _sets([(name, read) for name, run, cfg in found if (read := predictions.read(cfg, run, predictions.arms_of(cfg)))])
    of = [estimates(images, stream=stream) for stream, images in enumerate(sets)]
    rows = [row for images, figs in zip(sets, of, strict=True) for row in differences(images, figs)]
    rows += [row for one, other in combinations(of, 2) for row in _unpaired(one, other)]
    by_set = {arm: {**row, "test": size(images)} for images, figs in zip(sets, of, strict=True) for arm, row in arms(images, figs).items()}
    ordered = {f"{name}/{arm}": {**by_set[f"{name}/{arm}"], **results.arm_facts(cfg, run, arm)}
            for name, run, cfg in found for arm in predictions.arms_of(cfg) if f"{name}/{arm}" in by_set}
    rows = correct(rows, next(iter(ordered), None))
    fewest = min((row["test"] for row in ordered.values()), key=lambda test: test["positive"], default=None)
    return {"arms": ordered, "differences": rows, "synthetic": {name: results.screened(cfg, run) for name, run, cfg in found},
            "unfinished": {name: results.unfinished(cfg, run) for name, run, cfg in found}, "same_test_images": len(sets) <= 1,
            "verdict": results.with_lineage(verdict({"arms": ordered, "differences": rows, "test": fewest}, "these runs"), ordered, {})}


def _unpaired(one: dict[str, dict[str, Estimate]], other: dict[str, dict[str, Estimate]]) -> list[dict[str, Any]]:
    return [{"arms": [second, first], "metric": m, **difference(one[first][m], other[second][m]), "paired": False}
            for first in one for second in other for m in METRICS]


def _sets(read: list[tuple[str, Predictions]]) -> list[Predictions]:
    """One ``Predictions`` for all runs with the same test images, its arms under the runs' names."""
    sets: list[Predictions] = []
    for name, one in read:
        home = next((whole for whole in sets if whole.same_images(one)), None)
        if home is None:
            home = Predictions(one.keys, one.groups, one.target)
            sets.append(home)
        home.scores |= {f"{name}/{arm}": scores for arm, scores in one.scores.items()}
        home.seeds |= {f"{name}/{arm}": seeds for arm, seeds in one.seeds.items()}
    return sets


def _page(found: list[tuple[str, RunDir, Config]], summary: dict[str, Any]) -> str:
    sentence = ("All runs were judged on the same test images: differences are paired, each resample draws the same patients for all."
                if summary["same_test_images"] else
                "The runs were not all judged on the same test images. Where two arms were not, their difference is unpaired: the images alone may "
                "make it, so it says little of the arms.")
    spaces = {name: str(row.get("features", "unknown")) for name, row in summary["synthetic"].items()}
    known = [(arm, row["auroc"]["value"], row["auroc"]["ci"]) for arm, row in summary["arms"].items() if row["auroc"]["ci"]]
    return page.environment().get_template("several.html.j2").render(
        runs={str(run.path): name for name, run, _ in found}, summary=summary, sentence=sentence, metrics=METRICS, main=page.MAIN, spaces=spaces,
        missing=[f"{name}: {line}" for name, run, cfg in found for line in results.missing(cfg, run)], plot=figures.intervals(known, "AUROC"),
        plus_minus={name: screening.plus_minus(cfg.screen) for name, _, cfg in found},
        not_passed={name: screening.not_passed(row) for name, row in summary["synthetic"].items()},
        screening={name: screening.short(row) for name, row in summary["synthetic"].items()})
