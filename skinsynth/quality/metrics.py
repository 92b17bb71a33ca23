"""How good a binary classifier is."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, roc_auc_score


def binary_metrics(target: np.ndarray, score: np.ndarray, threshold: float = 0.5) -> dict[str, float | None]:
    """target int (n,), 0 or 1; score float (n,), 0..1. AUROC is None where only one class is present."""
    called = (score >= threshold).astype(int)
    both = len(np.unique(target)) == 2
    return {
        "accuracy": float(accuracy_score(target, called)),
        "balanced_accuracy": float(balanced_accuracy_score(target, called)),
        "auroc": float(roc_auc_score(target, score)) if both else None,
        "sensitivity": float(recall_score(target, called, pos_label=1, zero_division=0)),
        "specificity": float(recall_score(target, called, pos_label=0, zero_division=0)),
    }
