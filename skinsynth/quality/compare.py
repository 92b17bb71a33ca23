"""Arms beside each other on the same test images: figures with intervals, differences, and what may be concluded.

Intervals are the middle 95 % of a bootstrap (Efron and Tibshirani 1993). Each resample draws groups (patients, lesions) with replacement, since
images of a patient are not independent, the same ones for all arms and seeds, so that differences are paired. Where an arm has several seeds,
it also draws seeds, for each arm apart and one fewer than there are, which makes the variance of their mean unbiased (Rao and Wu 1988). What
that moves is added to what the patients move. Chance that is neither the seed's nor the patient's alone is then counted twice, so the interval
is rather wide than narrow; drawing both in one go would count it thrice (Owen and Eckles 2012).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from skinsynth.quality.delong import delong
from skinsynth.quality.metrics import HIGHEST, METRICS, Scored, calibration, roc
from skinsynth.quality.predictions import Predictions

RESAMPLES, SUBGROUP_RESAMPLES, CHUNK = 2000, 1000, 500
SMALL = 10  # images of either class below which a subgroup is marked: its figures hang on single images
AGES = ((0, 39), (40, 59), (60, 79), (80, 200))
GRID = np.linspace(0, 1, 101)
DIGITS = 6  # of what is reported, so that the last bits of a sum do not show


@dataclass
class Estimate:
    """One figure of one arm: ``seeds`` float (seeds,), and ``draws`` float (resamples,) of their mean. NaN: undefined."""

    seeds: np.ndarray
    draws: np.ndarray

    def summary(self, highest: float = 1.0) -> dict[str, Any]:
        """``{"value", "ci": [low, high], "seeds"}``; None for what cannot be told. The figure's range is 0 to ``highest``."""
        return {"value": rounded(self.seeds.mean()), "ci": interval(np.clip(self.draws, 0, highest)), "seeds": [rounded(v) for v in self.seeds]}


def rounded(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), DIGITS) + 0.0  # no minus zero


def interval(draws: np.ndarray) -> list[float] | None:
    """The middle 95 % of the defined draws; None where more than one in twenty is undefined."""
    known = draws[np.isfinite(draws)]
    if len(known) < 0.95 * len(draws):
        return None
    low, high = np.quantile(known, (0.025, 0.975))
    return [round(float(low), DIGITS) + 0.0, round(float(high), DIGITS) + 0.0]


def patients(groups: np.ndarray, resamples: int, stream: int = 0) -> Iterator[np.ndarray]:
    """How often each of the groups (sorted names) is drawn: float64 (groups, up to ``CHUNK``), ``resamples`` columns in all."""
    count, rng = len(np.unique(groups)), np.random.default_rng([0, stream])
    for start in range(0, resamples, CHUNK):
        columns = min(CHUNK, resamples - start)
        drawn = rng.integers(count, size=(columns, count)) + count * np.arange(columns)[:, None]
        yield np.bincount(drawn.ravel(), minlength=columns * count).reshape(columns, count).T.astype(np.float64)


def estimates(found: Predictions, resamples: int = RESAMPLES, names: tuple[str, ...] = METRICS, chosen: np.ndarray | None = None,
              stream: int = 0) -> dict[str, dict[str, Estimate]]:
    """arm -> metric -> estimate. ``chosen``: bool (n,), a subgroup of the images. ``stream``: another number draws other resamples."""
    kept = np.ones(len(found.target), bool) if chosen is None else chosen
    group = np.unique(found.groups, return_inverse=True)[1]
    judges = {arm: [Scored(found.target[kept], s[kept], group[kept], int(group.max()) + 1) for s in scores] for arm, scores in found.scores.items()}
    draws: dict[str, list[list[dict[str, np.ndarray]]]] = {arm: [] for arm in judges}
    for weights in patients(found.groups, resamples, stream):
        for arm, seeds in judges.items():
            draws[arm].append([judge.resampled(weights, names) for judge in seeds])
    whole, result = np.ones((int(group.max()) + 1, 1)), {}
    for number, (arm, chunks) in enumerate(draws.items()):
        plain = [judge.resampled(whole, names) for judge in judges[arm]]
        moved = _seed_draws(len(plain), resamples, [1, stream, number])
        result[arm] = {name: _estimate(np.concatenate([one[name] for one in plain]), _joined(chunks, name), moved) for name in names}
    return result


def _joined(chunks: list[list[dict[str, np.ndarray]]], name: str) -> np.ndarray:
    """float (resamples,): the mean over the seeds."""
    return np.concatenate([np.mean([one[name] for one in seeds], axis=0) for seeds in chunks])


def _estimate(seeds: np.ndarray, of_patients: np.ndarray, drawn: np.ndarray | None) -> Estimate:
    return Estimate(seeds, of_patients if drawn is None else of_patients + seeds[drawn].mean(axis=0) - seeds.mean())


def _seed_draws(seeds: int, resamples: int, stream: list[int]) -> np.ndarray | None:
    """int (seeds - 1, resamples): which seeds each resample draws; None for a single one, of whose like nothing is known."""
    return None if seeds == 1 else np.random.default_rng(stream).integers(seeds, size=(seeds - 1, resamples))


def difference(first: Estimate, second: Estimate) -> dict[str, Any]:
    """``second`` minus ``first``: ``value``, ``ci`` and a two-sided bootstrap ``p`` (twice the smaller share of draws on either side of 0).

    Paired where both were drawn on the same resamples; with other streams the two are independent.
    """
    draws = np.round(second.draws - first.draws, 12)  # equal sums may differ in their last bit
    known = draws[np.isfinite(draws)]
    ci = interval(draws)
    p = None if ci is None else min(1.0, 2 * (1 + min((known <= 0).sum(), (known >= 0).sum())) / (1 + len(known)))
    return {"value": rounded(second.seeds.mean() - first.seeds.mean()), "ci": ci, "p": None if p is None else round(float(p), DIGITS)}


def differences(found: Predictions, of: dict[str, dict[str, Estimate]]) -> list[dict[str, Any]]:
    """Every later arm minus every earlier one, all metrics; with AUROC also DeLong's test, and ``p_holm``: p for so many pairs (Holm 1979)."""
    rows, group = [], np.unique(found.groups, return_inverse=True)[1]
    for first, second in combinations(of, 2):
        for name in METRICS:
            row = {"arms": [second, first], "metric": name, **difference(of[first][name], of[second][name]), "paired": True}
            if name == "auroc":
                row["delong"] = _rounded(delong(found.target, group, found.scores[first], found.scores[second]))
            rows.append(row)
    holm([row for row in rows if row["metric"] == "auroc"])
    return rows


def holm(rows: list[dict[str, Any]]) -> None:
    """Adds ``p_holm`` to each: the chance of any such difference among them all if there were none."""
    known, least = sorted((r for r in rows if r["p"] is not None), key=lambda r: r["p"]), 0.0
    for row in rows:
        row["p_holm"] = None
    for rank, row in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * row["p"]))
        row["p_holm"] = round(least, DIGITS)


def _rounded(values: dict[str, float | None] | None) -> dict[str, float | None] | None:
    """A p-value to three digits that count, since it may be very small."""
    return values and {k: None if v is None else float(f"{v:.3g}") if k == "p" else rounded(v) for k, v in values.items()}


def curves(found: Predictions, arm: str) -> dict[str, Any]:
    """``roc``: ``fpr``, and ``tpr`` averaged over the seeds (Fawcett 2006) with ``seeds``, one list each; None where a class is missing.
    ``calibration``: bins of all seeds together."""
    lines = [roc(found.target, s, GRID) for s in found.scores[arm]]
    known = [line for line in lines if line is not None]
    drawn = {"fpr": [round(x, 2) for x in GRID.tolist()], "tpr": np.mean(known, axis=0).round(4).tolist(),
             "seeds": [line.round(4).tolist() for line in known]} if known else None
    scores = found.scores[arm]
    bins = calibration(np.tile(found.target, len(scores)), scores.ravel())
    return {"roc": drawn, "calibration": [{k: rounded(v) if isinstance(v, float) else v for k, v in row.items()} for row in bins]}


def subgroups(found: Predictions) -> list[dict[str, Any]]:
    """Per sex, age band and site: ``by``, ``name``, ``n``, ``positive``, ``groups``, ``small``, and per arm AUROC and balanced accuracy."""
    rows: list[dict[str, Any]] = []
    for by in ("sex", "age", "site"):
        if by not in found.columns:
            continue
        labels = np.array([age_band(v) if by == "age" else v or "unknown" for v in found.columns[by].tolist()])
        for name in sorted(set(labels.tolist()), key=lambda label: (label == "unknown", label)):
            chosen = labels == name
            n, positive = int(chosen.sum()), int(found.target[chosen].sum())
            of = estimates(found, SUBGROUP_RESAMPLES, ("auroc", "balanced_accuracy"), chosen)
            rows.append({"by": by, "name": str(name), "n": n, "positive": positive, "groups": len(set(found.groups[chosen].tolist())),
                         "small": min(positive, n - positive) < SMALL,
                         "arms": {arm: {k: e.summary() for k, e in figures.items()} for arm, figures in of.items()}})
    return rows


def age_band(text: str) -> str:
    """The band of an age in years as text; ``unknown`` for what is none."""
    try:
        age = float(text)
    except ValueError:
        return "unknown"
    return next((f"{low} to {high}" if high < 200 else f"{low} and over" for low, high in AGES if low <= age < high + 1), "unknown")


def compare(found: Predictions) -> dict[str, Any]:
    """All of it, ready for ``report.json``: ``arms``, ``differences``, ``subgroups``, ``test`` (images, groups, positive)."""
    of = estimates(found)
    return {"arms": arms(found, of), "differences": differences(found, of), "subgroups": subgroups(found), "test": size(found)}


def arms(found: Predictions, of: dict[str, dict[str, Estimate]]) -> dict[str, Any]:
    """Per arm every figure with interval and seeds, its curves, and its seeds' numbers."""
    return {arm: {**{name: e.summary(HIGHEST.get(name, 1.0)) for name, e in figures.items()}, **curves(found, arm), "seeds": found.seeds[arm]}
            for arm, figures in of.items()}


def size(found: Predictions) -> dict[str, int]:
    """``images``, ``groups`` and ``positive`` images of the test set."""
    return {"images": len(found.target), "groups": len(set(found.groups.tolist())), "positive": int(found.target.sum())}
