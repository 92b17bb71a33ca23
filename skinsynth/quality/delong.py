"""DeLong's test of two AUROCs on the same images (DeLong et al. 1988), by ranks (Sun and Xu 2014), for images that come in groups.

An image's placement value is the share of the other class on whose right side it stands. DeLong's variance takes the images for independent;
those of a patient are not, so placement values are summed per group first (Obuchowski 1997). With one image per group both are the same.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata, t


def placements(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """float64 (n,), 0..1: for an image of class 1 the share of class 0 scored lower, for one of class 0 the share of class 1 scored higher
    (ties count half). The mean over either class is the AUROC. ``target``: int (n,), 0 and 1, both there; ``score``: float (n,)."""
    positive = target == 1
    m, n = int(positive.sum()), int((~positive).sum())
    overall, values = rankdata(score), np.empty(len(score))
    values[positive] = (overall[positive] - rankdata(score[positive])) / n
    values[~positive] = 1 - (overall[~positive] - rankdata(score[~positive])) / m
    return values


def delong(target: np.ndarray, group: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float | None] | None:
    """AUROC of ``second`` minus that of ``first``: ``value``, ``se``, ``z`` and two-sided ``p``; None where a class or a second group is missing.

    ``target``: int (n,). ``group``: int (n,), 0.. without gaps. ``first``, ``second``: float (seeds, n), scores of one arm each. Over seeds
    placement values are averaged, so the value is the difference of the mean AUROCs, and the standard error is that of drawing other
    patients with the trained networks as they are: how much another training would differ is not in it. z and p are None where se is 0.
    Of few groups the variance is known badly: p is Student's, with one degree of freedom less than groups hold the rarer class.
    """
    if target.min() == target.max():
        return None
    values = np.mean([placements(target, s) for s in second], axis=0) - np.mean([placements(target, s) for s in first], axis=0)
    value = float(values[target == 1].mean())
    found = _variance(target == 1, group, values - value)
    if found is None:
        return None
    variance, holders = found
    se = math.sqrt(max(variance, 0.0))
    z = value / se if se > 1e-12 else None
    return {"value": value, "se": se, "z": z, "p": None if z is None else float(2 * t.sf(abs(z), holders - 1))}


def _variance(positive: np.ndarray, group: np.ndarray, centred: np.ndarray) -> tuple[float, int] | None:
    """Obuchowski's: of both classes' means, and twice their covariance, since a group may hold both; and how many groups hold the rarer class. None
    where it cannot be told."""
    groups, sums = int(group.max()) + 1, []
    for of_class in (positive, ~positive):
        holders = len(np.unique(group[of_class]))
        if holders < 2:
            return None
        sums.append((np.bincount(group[of_class], centred[of_class], groups), holders, int(of_class.sum())))
    (a, holders_a, m), (b, holders_b, n) = sums
    variance = float(holders_a / (holders_a - 1) * (a**2).sum() / m**2 + holders_b / (holders_b - 1) * (b**2).sum() / n**2
                     + 2 * groups / (groups - 1) * (a * b).sum() / (m * n))
    return variance, min(holders_a, holders_b)
