"""metrics: the figures by hand, and honest Nones."""

from __future__ import annotations

import numpy as np
import pytest

from skinsynth.errors import UserError
from skinsynth.quality.metrics import binary_metrics


def test_a_table_counted_by_hand() -> None:
    target = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    score = np.array([0.9, 0.8, 0.5, 0.2, 0.7, 0.6, 0.3, 0.1, 0.1, 0.0])
    got = binary_metrics(target, score)
    pairs = [(1.0 if p > n else 0.5 if p == n else 0.0) for p in score[target == 1] for n in score[target == 0]]
    assert got == pytest.approx({"accuracy": 0.7, "sensitivity": 3 / 4, "specificity": 4 / 6, "balanced_accuracy": (3 / 4 + 4 / 6) / 2,
                                 "auroc": sum(pairs) / len(pairs)})


def test_the_threshold_is_inclusive_and_moves_what_it_should() -> None:
    target, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.6, 0.9])
    low, high = binary_metrics(target, score, 0.4), binary_metrics(target, score, 0.41)
    assert (low["sensitivity"], low["specificity"]) == (1.0, 0.5)
    assert (high["sensitivity"], high["specificity"]) == (0.5, 0.5)
    assert low["auroc"] == high["auroc"] == 0.75


@pytest.mark.parametrize(("target", "known", "unknown"), [(0, "specificity", "sensitivity"), (1, "sensitivity", "specificity")])
def test_one_class_alone_gives_no_auroc(target: int, known: str, unknown: str) -> None:
    got = binary_metrics(np.full(4, target), np.array([0.2, 0.9, 0.1, 0.4]))
    assert got["auroc"] is got["balanced_accuracy"] is got[unknown] is None
    assert got[known] == got["accuracy"]


@pytest.mark.parametrize(("target", "score", "message"), [
    ([], [], "one score per target"),
    ([0, 1], [0.5], "one score per target"),
    ([0, 2], [0.5, 0.5], r"targets 0 and 1, found \[0, 2\]"),
    ([0, 1], [0.5, 1.5], "outside 0..1"),
    ([0, 1], [0.5, float("nan")], "diverged"),
])
def test_what_cannot_be_judged_is_refused(target: list[int], score: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        binary_metrics(np.array(target), np.array(score))
