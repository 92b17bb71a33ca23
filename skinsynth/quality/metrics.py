"""What a binary classifier is judged by: single figures, and the same for thousands of resamples at once.

A resample gives each group of images (a patient) a weight, the number of times that it was drawn. Every figure here is made of sums over
groups, so all resamples are one sparse matrix times one matrix of weights; the plain figure is the resample in which each weight is one.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from skinsynth.errors import UserError

METRICS = ("auroc", "balanced_accuracy", "accuracy", "average_precision", "partial_auroc", "sensitivity_at_80", "sensitivity_at_90",
           "sensitivity_at_95", "sensitivity", "specificity", "f1", "brier", "ece")
BINS = 15  # of the calibration error
LEAST_SENSITIVITY = 0.8  # where the partial area begins
HIGHEST = {"partial_auroc": 0.2}  # of the figures that do not go up to 1
SHARES = ("accuracy", "sensitivity", "specificity")  # of images, each right or wrong
BIASED = ("ece",)  # chance alone moves them upwards, and resampling once more: the draws lie beside the truth, and no interval is made of them
TAILS = {"partial_auroc": (1, 1 - LEAST_SENSITIVITY),  # class and share of it that such a figure is made of: the others are ranked beyond
         **{f"sensitivity_at_{percent}": (0, 1 - percent / 100) for percent in (80, 90, 95)}}
OF_CLASS = {"sensitivity": [1], "f1": [1], "specificity": [0], "accuracy": [], "brier": [], "ece": []}  # the others need both classes
COUNTS = ("tp", "fp", "fn", "tn")
ALL = (*COUNTS, "error", *(f"bin{i}" for i in range(BINS)))  # rows of sums before those of the curve


def binary_metrics(target: np.ndarray, score: np.ndarray, threshold: float = 0.5) -> dict[str, float | None]:
    """Every figure of ``METRICS``, each 0..1 but ``partial_auroc`` (0..0.2).

    ``target``: int (n,), 0 or 1. ``score``: float (n,), 0..1, the probability of class 1, which is predicted from ``threshold`` on.

    auroc, average_precision: as scikit-learn's ``roc_auc_score`` and ``average_precision_score``.
    partial_auroc: the area between ROC curve, right edge and the line of 80 % sensitivity, 0..0.2; the measure of the ISIC 2024 challenge
    (chance gives 0.02).
    sensitivity_at_80, _90, _95: the highest sensitivity at a threshold with at least that specificity, without interpolation.
    accuracy, balanced_accuracy, sensitivity (recall of class 1), specificity (recall of class 0), f1 (of class 1): at ``threshold``.
    brier: mean squared error of the score. ece: expected calibration error over 15 bins of equal width (Guo et al. 2017), of the
    probability of class 1; bins are open below and closed above.

    A figure that needs a class which is not there is None, never a flattering number.

    Raises:
        UserError: no samples, lengths differ, other targets than 0 and 1, a score outside 0..1 or not a number.
    """
    found = Scored(target, score, threshold=threshold)
    values = found.resampled(np.ones((found.groups, 1)))
    return {name: None if np.isnan(v[0]) else float(v[0]) for name, v in values.items()}


def check(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(target, score float64), or ``UserError`` as ``binary_metrics`` says."""
    target, score = np.asarray(target), np.asarray(score, np.float64)
    if target.ndim != 1 or target.shape != score.shape or not len(target):
        raise UserError(f"metrics need one score per target, found {target.shape} targets and {score.shape} scores")
    if not np.isin(target, (0, 1)).all():
        raise UserError(f"binary metrics take the targets 0 and 1, found {sorted(set(target.tolist()))[:5]}")
    if not ((score >= 0) & (score <= 1)).all():  # NaN fails too
        raise UserError("a classifier's score lies outside 0..1 or is not a number: the training has probably diverged (lower classify.lr)")
    return target, score


class Scored:
    """One classifier's scores, ready to be judged on any resample of the groups.

    ``target`` and ``score`` as in ``binary_metrics``; ``group``: int (n,), 0..``groups``-1, None: each image its own.
    ``groups`` may be larger than what occurs in ``group``: a subgroup of the images under the weights of the whole.
    """

    def __init__(self, target: np.ndarray, score: np.ndarray, group: np.ndarray | None = None, groups: int | None = None, threshold: float = 0.5):
        target, score = check(target, score)
        self.group = np.arange(len(target)) if group is None else np.asarray(group)
        self.groups = groups or int(self.group.max()) + 1
        self.positive = target == 1
        self.sums = self._rows(*self._summed(score, threshold), len(ALL))
        self.levels = np.unique(score[self.positive])  # ascending; the curve rises at each of these scores
        m = len(self.levels)
        mine, others = score[self.positive], score[~self.positive]
        above, equal = m - np.searchsorted(self.levels, others, "right"), m - np.searchsorted(self.levels, others, "left")
        # between two levels lies one row of negatives, and one for those that tie with a level: 2k above the k-th level, 2k+1 at it
        self.rises = self._rows(m - 1 - np.searchsorted(self.levels, mine), self.group[self.positive], np.ones(len(mine)), m)
        self.falls = self._rows(above + equal, self.group[~self.positive], np.ones(len(others)), 2 * m + 1)

    def _summed(self, score: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, group, value) of what is only summed: the four counts, the squared error, and score minus target per bin."""
        cell = np.where(score >= threshold, np.where(self.positive, 0, 1), np.where(self.positive, 2, 3))
        gap, place = score - self.positive, len(COUNTS)
        bins = np.clip(np.ceil(score * BINS).astype(int) - 1, 0, BINS - 1)
        rows = np.concatenate([cell, np.full(len(score), place), place + 1 + bins])
        return rows, np.tile(self.group, 3), np.concatenate([np.ones(len(score)), gap**2, gap])

    def _rows(self, row: np.ndarray, group: np.ndarray, value: np.ndarray, rows: int) -> sparse.csr_array:
        return sparse.csr_array((value, (row, group)), shape=(rows, self.groups))

    def holders(self, name: str) -> int:
        """How many groups a figure hangs on: those that hold an image of the class that it needs, of two classes the rarer one. Of a class whose
        ``TAILS`` alone count, as many as are in them."""
        tail, share = TAILS.get(name, (None, 1.0))
        of_class = [round(len(np.unique(self.group[self.positive == bool(c)])) * (share if c == tail else 1)) for c in OF_CLASS.get(name, [0, 1])]
        return min(of_class) if of_class else len(np.unique(self.group))

    def resampled(self, weights: np.ndarray, names: tuple[str, ...] = METRICS) -> dict[str, np.ndarray]:
        """The named figures, each float64 (resamples,), NaN where a class is missing. ``weights``: float64 (groups, resamples), 0 or more."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self._at_threshold(weights)
            if set(names) - found.keys():
                found |= self._of_curve(weights)
        return {name: found[name] for name in names}

    def _at_threshold(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        sums = self.sums @ weights
        tp, fp, fn, tn = sums[:4]
        total, sensitivity, specificity = tp + fp + fn + tn, tp / (tp + fn), tn / (tn + fp)
        f1 = np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
        return {"accuracy": (tp + tn) / total, "balanced_accuracy": (sensitivity + specificity) / 2, "sensitivity": sensitivity,
                "specificity": specificity, "f1": f1, "brier": sums[4] / total, "ece": np.abs(sums[5:]).sum(0) / total}

    def _of_curve(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """From the ROC curve, which is straight between the points before and after each level (rows: levels, descending)."""
        rise, fall = self.rises @ weights, np.cumsum(self.falls @ weights, axis=0)
        tp = np.cumsum(rise, axis=0)
        positives, negatives = rise.sum(0), fall[-1]
        missing = (positives == 0) | (negatives == 0)
        true, step, false = tp / positives, rise / positives, fall[1::2] / negatives
        before, after = 1 - fall[0:-1:2] / negatives, 1 - false  # specificity on either side of the level
        precision = tp / (tp + fall[1::2])
        found = {"auroc": (step * (before + after)).sum(0) / 2, "average_precision": np.where(step > 0, step * precision, 0).sum(0),
                 "partial_auroc": _area_above(true, step, before, after)}
        for percent in (80, 90, 95):
            allowed = false <= 1 - percent / 100 + 1e-9
            found[f"sensitivity_at_{percent}"] = np.where(allowed, true, 0).max(0, initial=0)
        return {name: np.where(missing, np.nan, value) for name, value in found.items()}


def _area_above(true: np.ndarray, step: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of the trapezoids with the sensitivities ``true - step`` to ``true``, the part above ``LEAST_SENSITIVITY``."""
    low = np.clip(LEAST_SENSITIVITY, true - step, true)
    share = np.divide(low - (true - step), step, out=np.zeros_like(step), where=step > 0)
    return ((true - low) * (before + share * (after - before) + after)).sum(0) / 2


def roc(target: np.ndarray, score: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Sensitivity, float64 (len(grid),), at the false-positive rates ``grid`` (ascending, 0..1), straight between the curve's points.

    At a rate where the curve rises it is the upper end. None where a class is missing. Raises ``UserError`` as ``binary_metrics`` does.
    """
    target, score = check(target, score)
    if target.min() == target.max():
        return None
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    true, false = np.cumsum(target[order] == 1)[last] / (target == 1).sum(), np.cumsum(target[order] == 0)[last] / (target == 0).sum()
    rates, first = np.unique(false[::-1], return_index=True)  # of points above each other the highest
    highest = true[::-1][first]
    if rates[0] > 0:
        rates, highest = np.append(0.0, rates), np.append(0.0, highest)
    return np.interp(grid, rates, highest)


def calibration(target: np.ndarray, score: np.ndarray) -> list[dict[str, float | int]]:
    """The bins of ``ece`` that hold an image: ``low``, ``high``, ``n``, mean ``score`` and ``share`` of class 1."""
    target, score = check(target, score)
    bins = np.clip(np.ceil(score * BINS).astype(int) - 1, 0, BINS - 1)
    return [{"low": i / BINS, "high": (i + 1) / BINS, "n": int((bins == i).sum()), "score": float(score[bins == i].mean()),
             "share": float(target[bins == i].mean())} for i in range(BINS) if (bins == i).any()]
