"""metrics: the figures by hand, and honest Nones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn import metrics as sk

from skinsynth.errors import UserError
from skinsynth.quality.metrics import METRICS, Scored, binary_metrics, calibration, roc


def test_a_table_counted_by_hand() -> None:
    target = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    score = np.array([0.9, 0.8, 0.5, 0.2, 0.7, 0.6, 0.3, 0.1, 0.1, 0.0])
    got = binary_metrics(target, score)
    pairs = [(1.0 if p > n else 0.5 if p == n else 0.0) for p in score[target == 1] for n in score[target == 0]]
    assert set(got) == set(METRICS)
    wanted = {"accuracy": 0.7, "sensitivity": 3 / 4, "specificity": 4 / 6, "balanced_accuracy": (3 / 4 + 4 / 6) / 2,
              "auroc": sum(pairs) / len(pairs), "f1": 6 / 9, "sensitivity_at_80": 2 / 4,
              "brier": (0.01 + 0.04 + 0.25 + 0.64 + 0.49 + 0.36 + 0.09 + 0.01 + 0.01) / 10}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)


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
    assert got["average_precision"] is got["partial_auroc"] is got["sensitivity_at_90"] is None
    assert (got["f1"] is None) == (target == 0)


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


def by_scikit_learn(target: np.ndarray, score: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    called = score >= 0.5
    false, true, _ = sk.roc_curve(target, score, sample_weight=weight, drop_intermediate=False)
    # the challenge's own formula: the classes swapped, at most 20 % "false positives", and McClish's correction taken back
    mcclish = sk.roc_auc_score(1 - target, 1 - score, max_fpr=0.2, sample_weight=weight)
    return {"auroc": sk.roc_auc_score(target, score, sample_weight=weight), "accuracy": sk.accuracy_score(target, called, sample_weight=weight),
            "balanced_accuracy": sk.balanced_accuracy_score(target, called, sample_weight=weight),
            "average_precision": sk.average_precision_score(target, score, sample_weight=weight),
            "partial_auroc": 0.02 + (0.2 - 0.02) / 0.5 * (mcclish - 0.5), "f1": sk.f1_score(target, called, sample_weight=weight, zero_division=0),
            "brier": sk.brier_score_loss(target, score, sample_weight=weight),
            "sensitivity": sk.recall_score(target, called, sample_weight=weight),
            "specificity": sk.recall_score(target, called, sample_weight=weight, pos_label=0),
            **{f"sensitivity_at_{s}": true[false <= 1 - s / 100 + 1e-9].max() for s in (80, 90, 95)}}


@pytest.mark.parametrize("digits", [1, 2, 6])
def test_equal_to_scikit_learn_with_ties_and_weights(digits: int) -> None:
    """Images that are drawn several times or not at all are scikit-learn's sample weights."""
    rng = np.random.default_rng(digits)
    for _ in range(15):
        n = int(rng.integers(10, 150))
        target, score = rng.permutation(np.arange(n) % 3 == 0).astype(int), rng.random(n).round(digits)
        weight = rng.integers(0, 4, n).astype(float)
        weight[[np.argmax(target), np.argmin(target)]] = 1  # both classes are drawn
        wanted = by_scikit_learn(target, score, weight)
        got = Scored(target, score).resampled(weight[:, None])
        assert {name: got[name][0] for name in wanted} == pytest.approx(wanted, abs=1e-9)
        plain = by_scikit_learn(target, score, np.ones(n))
        assert {name: binary_metrics(target, score)[name] for name in plain} == pytest.approx(plain, abs=1e-9)


def test_the_calibration_error_is_the_bins_weighted_gap() -> None:
    rng = np.random.default_rng(2)
    score = rng.random(500)
    target = (rng.random(500) < score**2).astype(int)
    edges, total = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (score > low) & (score <= high)
        total += inside.sum() / 500 * abs(score[inside].mean() - target[inside].mean()) if inside.any() else 0
    assert binary_metrics(target, score)["ece"] == pytest.approx(total)
    bins = calibration(target, score)
    assert sum(b["n"] for b in bins) == 500
    assert sum(b["n"] * abs(b["score"] - b["share"]) for b in bins) / 500 == pytest.approx(total)


def test_perfect_scores_are_at_the_ends_of_the_ranges() -> None:
    got = binary_metrics(np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert (got["brier"], got["ece"]) == (0, 0)
    assert got["partial_auroc"] == pytest.approx(0.2)
    assert all(got[m] == pytest.approx(1) for m in METRICS if m not in ("brier", "ece", "partial_auroc"))
    assert binary_metrics(np.array([0, 1] * 4), np.full(8, 0.5))["partial_auroc"] == pytest.approx(0.02)  # chance


def test_the_roc_curve_goes_through_scikit_learns_points() -> None:
    rng = np.random.default_rng(4)
    target, score = rng.integers(0, 2, 80), rng.integers(0, 15, 80) / 15
    false, true, _ = sk.roc_curve(target, score)
    curve = roc(target, score, false)
    assert curve is not None
    highest = [true[false == f].max() for f in false]
    assert curve == pytest.approx(np.array(highest))
    assert roc(np.ones(3, int), np.full(3, 0.5), false) is None


def test_groups_that_are_not_drawn_leave_no_figure() -> None:
    target, group = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    got = Scored(target, np.array([0.1, 0.6, 0.4, 0.9]), group).resampled(np.array([[2.0, 1.0], [0.0, 1.0]]))
    assert np.isnan(got["auroc"][0])
    assert np.isnan(got["f1"][0])
    assert got["accuracy"][0] == 0.5
    assert got["auroc"][1] == 0.75
