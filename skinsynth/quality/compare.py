"""Arms beside each other on the same test images: figures with intervals, differences, and what may be concluded.

Each resample draws groups (patients, lesions) with replacement (Efron and Tibshirani 1993), since images of a patient are not independent, the
same ones for all arms and seeds, so that differences are paired. That is how much other patients would change; how much another training would,
the seeds of each arm show. Both add up as readers and cases do in studies of readers, each of whom judges with one method (Obuchowski and
Rockette 1995): the variance between seeds holds the trainings' own and what is neither the seed's nor the patient's alone, and the latter, which
resampling has in too, is counted once. Few seeds show their variance badly, so Student's t takes the place of the normal distribution, with
Satterthwaite's degrees of freedom, each arm's seeds for themselves (Welch 1947; Hillis 2007 for readers). The sum is never less than what the
patients alone move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from skinsynth.quality.delong import delong
from skinsynth.quality.metrics import BIASED, HIGHEST, METRICS, SHARES, Scored, calibration, roc
from skinsynth.quality.predictions import Predictions

RESAMPLES, SUBGROUP_RESAMPLES, CHUNK = 2000, 1000, 500
SMALL = 10  # images of either class below which a subgroup is marked: its figures hang on single images
AGES = ((0, 39), (40, 59), (60, 79), (80, 200))
GRID = np.linspace(0, 1, 101)
DIGITS = 6  # of what is reported, so that the last bits of a sum do not show


@dataclass
class Estimate:
    """One figure (a name of ``METRICS``) of one arm: ``seeds`` float (seeds,), and ``draws`` float (resamples,) of their mean. NaN: undefined.

    ``noise``: the variance between seeds that drawing other patients makes by itself. ``groups``: how many of them the figure hangs on.
    """

    name: str
    seeds: np.ndarray
    draws: np.ndarray
    noise: float
    groups: int

    def between(self) -> float:
        """The variance of the mean that its seeds show; 0 of a single one, of whose like nothing is known."""
        return 0.0 if len(self.seeds) < 2 else float(self.seeds.var(ddof=1)) / len(self.seeds)

    def summary(self) -> dict[str, Any]:
        """``{"value", "ci": [low, high], "seeds"}``; None for what cannot be told."""
        return {"value": rounded(self.seeds.mean()), "ci": self._interval(), "seeds": [rounded(v) for v in self.seeds]}

    def _interval(self) -> list[float] | None:
        """What other patients may move either way (of few groups wider, as Hesterberg 2015 expands it), and on either side what the seeds add.
        None of ``BIASED``, of too few defined draws, and where nothing differs, which says nothing; but see ``_of_share``."""
        known, found, value = defined(self.draws), spread(self.draws, self), float(self.seeds.mean())
        if known is None or self.name in BIASED:
            return None
        if found is None:
            return _of_share(value, self.groups) if self.name in SHARES and value in (0, 1) else None
        error, freedom = found
        ends = np.quantile(known, (0.025, 0.975)) - known.mean()  # what resampling moves a figure by in one direction is no part of it
        if self.name in SHARES:
            ends = np.array(_of_share(value, value * (1 - value) / max(known.var(), 1e-20))) - value
        low, high = np.sqrt((ends / stats.norm.ppf(0.975)) ** 2 + max(0.0, error**2 - known.var())) * stats.t.ppf(0.975, freedom)
        return [round(float(v), DIGITS) + 0.0 for v in np.clip((value - low, value + high), 0, HIGHEST.get(self.name, 1.0))]


def _of_share(value: float, trials: float) -> list[float]:
    """The exact interval of a share (Clopper and Pearson 1934), of as many single trials as would vary as much (Korn and Graubard 1998). The middle
    of its draws is too narrow near 0 and 1, of few images of the other kind, and nothing at all without any."""
    right, wrong = value * trials, (1 - value) * trials
    low = stats.beta.ppf(0.025, right, wrong + 1) if right > 0 else 0.0
    high = stats.beta.ppf(0.975, right + 1, wrong) if wrong > 0 else 1.0
    return [round(float(low), DIGITS), round(float(high), DIGITS)]


def rounded(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), DIGITS) + 0.0  # no minus zero


def defined(draws: np.ndarray) -> np.ndarray | None:
    """The defined draws; None where more than one in twenty is undefined."""
    known = draws[np.isfinite(draws)]
    return None if len(known) < 0.95 * len(draws) else known


def spread(draws: np.ndarray, *arms: Estimate) -> tuple[float, float] | None:
    """Standard error and degrees of freedom of what ``draws`` resample, made of those arms' figures. None where too few are defined, or where
    neither draws nor seeds differ, which says nothing of other patients."""
    known = defined(draws)
    if known is None:
        return None
    seen = [arm.between() for arm in arms]
    whole = known.var() + max(0.0, sum(seen) - sum(arm.noise / len(arm.seeds) for arm in arms))
    if whole < 1e-20:
        return None
    # Where arms err alike the estimates between seeds may add up to more than there is: shares of it, or the freedom would fall below any part's.
    seen = [variance * min(1.0, whole / sum(seen)) if variance else 0.0 for variance in seen]
    of_patients = (max(0.0, whole - sum(seen)), max(1, min(arm.groups for arm in arms) - 1))
    parts = [of_patients, *((variance, len(arm.seeds) - 1) for variance, arm in zip(seen, arms, strict=True))]
    return float(np.sqrt(whole)), float(whole**2 / sum(part**2 / freedom for part, freedom in parts if part))


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
    for arm, chunks in draws.items():
        plain = [judge.resampled(whole, names) for judge in judges[arm]]
        result[arm] = {name: _estimate(name, np.concatenate([one[name] for one in plain]), chunks, judges[arm][0].holders(name)) for name in names}
    return result


def _estimate(name: str, seeds: np.ndarray, chunks: list[list[dict[str, np.ndarray]]], groups: int) -> Estimate:
    draws = np.concatenate([np.stack([one[name] for one in chunk]) for chunk in chunks], axis=1)  # (seeds, resamples)
    known = draws[:, np.isfinite(draws[0])] - seeds[:, None]
    noise = float(known.var(axis=0, ddof=1).mean()) if len(seeds) > 1 and known.size else 0.0
    return Estimate(name, seeds, draws.mean(axis=0), noise, groups)


def difference(first: Estimate, second: Estimate) -> dict[str, Any]:
    """``second`` minus ``first``: ``value``, ``ci`` and a two-sided ``p``, which is below 0.05 where the interval leaves 0 out; ``seeds`` of both.

    Paired where both were drawn on the same resamples; with other streams the two are independent.
    """
    value = float(second.seeds.mean() - first.seeds.mean())
    row: dict[str, Any] = {"value": rounded(value), "ci": None, "p": None, "seeds": [len(second.seeds), len(first.seeds)]}
    found = None if first.name in BIASED else spread(second.draws - first.draws, first, second)
    if found is not None:
        error, freedom = found
        half = error * stats.t.ppf(0.975, freedom)
        row |= {"ci": [rounded(value - half), rounded(value + half)], "p": _digits(2 * stats.t.sf(abs(value) / error, freedom))}
    return row


def differences(found: Predictions, of: dict[str, dict[str, Estimate]]) -> list[dict[str, Any]]:
    """Every later arm minus every earlier one, all metrics; with AUROC also DeLong's test, and whether both are the ``same`` trained networks: they
    have the very same predictions of all images, as where a run took them over from another. Of these nothing is tested."""
    rows, group = [], np.unique(found.groups, return_inverse=True)[1]
    for first, second in combinations(of, 2):
        same = np.array_equal(found.scores[first], found.scores[second])
        for name in METRICS:
            row = {"arms": [second, first], "metric": name, **difference(of[first][name], of[second][name]), "paired": True}
            row |= {"ci": None, "p": None} if same else {}
            if name == "auroc":
                row["delong"] = _rounded(delong(found.target, group, found.scores[first], found.scores[second]))
                row["same"] = same
            rows.append(row)
    return rows


def main(rows: list[dict[str, Any]], first: str | None) -> list[dict[str, Any]]:
    """The comparisons that were meant from the start, of which alone something is claimed: by AUROC, with the first arm, on its test images."""
    return [row for row in rows if row["metric"] == "auroc" and row["arms"][1] == first and row["paired"]]


def correct(rows: list[dict[str, Any]], first: str | None) -> list[dict[str, Any]]:
    """The rows, those of AUROC with ``p_holm``: p for as many comparisons as are meant (Holm 1979); None of the others."""
    for row in rows:
        row |= {"p_holm": None} if row["metric"] == "auroc" else {}
    holm(main(rows, first))
    return rows


def tested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have a p, for as many as which ``holm`` corrects: where nothing differs, nothing was tested."""
    return [row for row in rows if row["p"] is not None]


def holm(rows: list[dict[str, Any]]) -> None:
    """Adds ``p_holm`` to each: the chance of any such difference among them all if there were none."""
    known, least = sorted(tested(rows), key=lambda r: r["p"]), 0.0
    for row in rows:
        row["p_holm"] = None
    for rank, row in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * row["p"]))
        row["p_holm"] = _digits(least)


def _digits(p: float) -> float:
    """Three that count, since it may be very small."""
    return float(f"{p:.3g}")


def _rounded(values: dict[str, float | None] | None) -> dict[str, float | None] | None:
    return values and {k: None if v is None else _digits(v) if k == "p" else rounded(v) for k, v in values.items()}


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
    rows = correct(differences(found, of), next(iter(of), None))
    return {"arms": arms(found, of), "differences": rows, "subgroups": subgroups(found), "test": size(found)}


def arms(found: Predictions, of: dict[str, dict[str, Estimate]]) -> dict[str, Any]:
    """Per arm every figure with interval and seeds, its curves, and its seeds' numbers."""
    return {arm: {**{name: e.summary() for name, e in figures.items()}, **curves(found, arm), "seeds": found.seeds[arm]}
            for arm, figures in of.items()}


def size(found: Predictions) -> dict[str, int]:
    """``images``, ``groups`` and ``positive`` images of the test set."""
    return {"images": len(found.target), "groups": len(set(found.groups.tolist())), "positive": int(found.target.sum())}
