"""What a binary classifier is judged by."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

from skinsynth.errors import UserError


def binary_metrics(target: np.ndarray, score: np.ndarray, threshold: float = 0.5) -> dict[str, float | None]:
    """accuracy, balanced_accuracy, auroc, sensitivity (recall of class 1) and specificity (recall of class 0), all 0..1.

    ``target``: int (n,), 0 or 1. ``score``: float (n,), 0..1; class 1 is predicted from ``threshold`` on.
    A figure that needs a class which is not there is None, never a flattering number.

    Raises:
        UserError: no samples, lengths differ, other targets than 0 and 1, a score outside 0..1 or not a number.
    """
    target, score = np.asarray(target), np.asarray(score, np.float64)
    if target.ndim != 1 or target.shape != score.shape or not len(target):
        raise UserError(f"metrics need one score per target, found {target.shape} targets and {score.shape} scores")
    if not np.isin(target, (0, 1)).all():
        raise UserError(f"binary metrics take the targets 0 and 1, found {sorted(set(target.tolist()))[:5]}")
    if not ((score >= 0) & (score <= 1)).all():  # NaN fails too
        raise UserError("a classifier's score lies outside 0..1 or is not a number: the training has probably diverged (lower classify.lr)")
    positive, called = target == 1, score >= threshold
    sensitivity, specificity = _share(called[positive]), _share(~called[~positive])
    both = sensitivity is not None and specificity is not None
    return {"accuracy": float((called == positive).mean()),
            "balanced_accuracy": (sensitivity + specificity) / 2 if both else None,  # type: ignore[operator]
            "auroc": float(roc_auc_score(target, score)) if both else None,
            "sensitivity": sensitivity, "specificity": specificity}


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None
