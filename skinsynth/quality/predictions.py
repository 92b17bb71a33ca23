"""The arms' scores of the test images, read from a run. A seed counts once its files are whole."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config
from skinsynth.quality.metrics import check
from skinsynth.run import RunDir

COLUMNS = ("sex", "age", "site", "diagnosis")  # of later runs; empty: unknown


@dataclass
class Predictions:
    """Of n test images: ``keys`` and ``groups`` (str), ``target`` int (n,), ``scores`` arm -> float (seeds, n), ``seeds`` arm -> their numbers,
    ``columns`` str (n,) each, those that all files have."""

    keys: np.ndarray
    groups: np.ndarray
    target: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    seeds: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def same_images(self, other: Predictions) -> bool:
        return (np.array_equal(self.keys, other.keys) and np.array_equal(self.target, other.target)
                and np.array_equal(self.groups, other.groups))


def arms_of(cfg: Config) -> list[str]:
    """The arms, those trained on real images alone first: the others are held against the first one."""
    return sorted(cfg.classify.arms, key=lambda arm: cfg.classify.arms[arm].used != ["real"])


def seed_folders(cfg: Config, run: RunDir, arm: str) -> dict[int, Path]:
    """Seed -> the folder with its files, whole or not. An arm without ``seed-*`` folders is its own single seed."""
    folder = run.node(f"classify/{arm}")
    found = {int(p.name[5:]): p for p in folder.glob("seed-*") if p.is_dir() and p.name[5:].isdigit()}
    return dict(sorted(found.items())) if found else {cfg.seed: folder}


def finished(cfg: Config, run: RunDir, arm: str) -> dict[int, Path]:
    """The seeds of an arm whose files are whole."""
    folder = run.node(f"classify/{arm}")
    found = seed_folders(cfg, run, arm)
    if set(found.values()) == {folder}:
        return found if run.metrics(f"classify/{arm}") and (folder / "predictions.csv").is_file() else {}
    return {seed: path for seed, path in found.items() if (path / "predictions.csv").is_file() and (path / "metrics.json").is_file()}


def seed_facts(run: RunDir, arm: str, folder: Path) -> dict[str, Any]:
    """What a finished seed says of itself (``chosen_step``, ``steps``, ``train_samples`` ...)."""
    return read_json(folder / "metrics.json") or run.metrics(f"classify/{arm}")


def read(cfg: Config, run: RunDir, arms: list[str]) -> Predictions | None:
    """The finished seeds of those arms; None where there is none.

    Raises:
        UserError: a file that is not what ``classify`` writes, or other test images or groups than those of the first file.
    """
    whole: Predictions | None = None
    for arm in arms:
        scores = []
        for seed, folder in finished(cfg, run, arm).items():
            one, score = _file(folder / "predictions.csv", arm, seed)
            if whole is None:
                whole = one
            elif not whole.same_images(one):
                other = next(iter(whole.seeds), arm)
                stale = [name for name in (other, arm) if not run.is_done(f"classify/{name}")] or [arm]
                raise UserError(f"{folder / 'predictions.csv'}: arm {arm}, seed {seed} was judged on other test images (or in another order) than "
                                f"arm {other}: delete {' and '.join(str(run.node(f'classify/{name}')) for name in stale)} and launch again")
            whole.columns = {name: whole.columns[name] for name in whole.columns if name in one.columns}
            scores.append(score)
            whole.seeds.setdefault(arm, []).append(seed)
        if scores and whole is not None:
            whole.scores[arm] = np.stack(scores)
    return whole


def _file(path: Path, arm: str, seed: int) -> tuple[Predictions, np.ndarray]:
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    missing = {"key", "group", "target", "score"} - (rows[0].keys() if rows else set())
    if missing:
        raise UserError(f"{path} (arm {arm}, seed {seed}) has no {'row' if not rows else 'column ' + ', '.join(sorted(missing))}: "
                        "delete the arm's folder and launch again")
    try:
        target, score = np.array([int(r["target"]) for r in rows]), np.array([float(r["score"]) for r in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} (arm {arm}, seed {seed}) holds a target or score that is no number: {error}") from None
    check(target, score)
    columns = {name: np.array([r[name] or "" for r in rows]) for name in COLUMNS if name in rows[0]}
    return Predictions(np.array([r["key"] for r in rows]), np.array([r["group"] for r in rows]), target, columns=columns), score
