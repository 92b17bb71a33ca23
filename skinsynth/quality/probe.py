"""Two simple classifiers on features: one of real images that says whether a synthetic one shows its class, and one that tells real from
synthetic. Both are regularised logistic regressions: quick, without a random part, and too plain to remember single images of a large set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from skinsynth.quality.distances import Scaler

STRENGTH = 0.1  # scikit-learn's C; on ISIC 2017 (builtin-vae, 1,290 training images) 0.01, 0.1 and 1 gave 0.66, 0.68 and 0.70 on the test split


class Probe:
    """Logistic regression on features; classes count alike however many images they have."""

    def __init__(self, features: np.ndarray, targets: np.ndarray):
        """float (n, d), int (n,) of two classes or more, for which see ``possible``."""
        self.scale = Scaler.of(features)
        self.model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000).fit(self.scale(features), targets)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """float (n, d) -> float64 (n, classes), rows sum to 1, columns as ``classes``."""
        return self.model.predict_proba(self.scale(features))

    @property
    def classes(self) -> list[int]:
        return [int(c) for c in self.model.classes_]

    def of(self, features: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """float32 (n,): the probability of each row's own class; NaN where the classifier has never seen it."""
        found, known = self(features), self.classes
        column = np.array([known.index(t) if t in known else -1 for t in targets.tolist()], int)
        return np.where(column >= 0, found[np.arange(len(found)), column], np.nan).astype(np.float32)


def possible(targets: np.ndarray) -> bool:
    """True where there are two classes with two images each, the least that a classifier can be fitted to."""
    counts = np.unique(targets, return_counts=True)[1]
    return len(counts) > 1 and int(counts.min()) > 1


def auroc(targets: np.ndarray, scores: np.ndarray) -> float | None:
    """None where one of the classes (0 and 1) is missing."""
    return round(float(roc_auc_score(targets, scores)), 4) if set(targets.tolist()) == {0, 1} else None


def halves(names: Sequence[str]) -> np.ndarray:
    """bool (n,): which half each name falls into, by its hash: the same name always into the same one."""
    return np.array([bool(hashlib.sha256(name.encode()).digest()[0] & 1) for name in names], bool)


def detector(real: np.ndarray, groups: Sequence[str], synthetic: np.ndarray, keys: Sequence[str]) -> dict[str, float | int | None]:
    """How well real images are told from synthetic ones: fitted on one half, scored on the other.

    Real images are halved by group (patient or lesion), synthetic ones by key: nothing of one half is in the other.

    Args:
        real, synthetic: float (n, d), (m, d). groups, keys: n and m strings.

    Returns:
        ``auroc`` on the second half, 0.5 where they cannot be told apart (None where a half lacks one kind), and ``tested`` images.
    """
    features, first = np.concatenate([real, synthetic]), np.concatenate([halves(groups), halves(keys)])
    made = np.repeat([0, 1], [len(real), len(synthetic)])
    if not possible(made[first]) or first.all():
        return {"auroc": None, "tested": 0}
    return {"auroc": auroc(made[~first], Probe(features[first], made[first])(features[~first])[:, 1]), "tested": int((~first).sum())}
