"""probe: the plain classifiers find what is there, and nothing where nothing is."""

from __future__ import annotations

import numpy as np

from skinsynth.quality.probe import Probe, auroc, detector, halves, possible


def cloud(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, 8)).astype(np.float32)


def names(n: int, head: str) -> list[str]:
    return [f"{head}-{i}" for i in range(n)]


def test_the_probability_is_that_of_each_rows_own_class() -> None:
    probe = Probe(np.concatenate([cloud(0, 90), cloud(1, 30, 2)]), np.repeat([0, 1], [90, 30]))
    x, targets = np.concatenate([cloud(2, 40), cloud(3, 40, 2)]), np.repeat([0, 1], 40)
    own = probe.of(x, targets)
    assert own.dtype == np.float32
    assert (own > 0.5).mean() > 0.9
    assert np.allclose(own + probe.of(x, 1 - targets), 1, atol=1e-6)
    assert np.isnan(probe.of(x[:2], np.array([2, 7]))).all()
    assert auroc(targets, probe(x)[:, 1]) > 0.95


def test_one_class_or_one_image_is_not_enough_to_fit() -> None:
    assert possible(np.array([0, 0, 1, 1]))
    assert not possible(np.array([0, 0, 0]))
    assert not possible(np.array([0, 0, 1]))
    assert auroc(np.zeros(4, int), np.arange(4.0)) is None


def test_the_detector_tells_another_kind_and_not_the_same() -> None:
    same = detector(cloud(0, 600), names(600, "g"), cloud(1, 600), names(600, "s"))
    assert abs(same["auroc"] - 0.5) < 0.06  # type: ignore[operator]
    other = detector(cloud(0, 600), names(600, "g"), cloud(1, 600, 0.5), names(600, "s"))
    assert other["auroc"] > 0.85  # type: ignore[operator]
    assert 500 < other["tested"] < 700  # type: ignore[operator]


def test_images_of_one_patient_are_never_on_both_sides() -> None:
    """Groups of ten equal images with a random look each: by image, the detector would know those of the test half by heart."""
    looks = np.repeat(cloud(0, 40) * 5, 10, axis=0)
    found = detector(looks, [f"patient-{i // 10}" for i in range(400)], cloud(1, 400) * 5, names(400, "s"))
    assert found["auroc"] < 0.75  # type: ignore[operator]
    assert np.array_equal(halves(["a", "b", "a"])[[0]], halves(["a", "b", "a"])[[2]])
    assert 0.4 < halves(names(1000, "x")).mean() < 0.6


def test_where_all_fall_into_one_half_there_is_no_score() -> None:
    one_half = [name for name in names(400, "g") if halves([name])[0]]
    assert detector(cloud(0, 50), one_half[:50], cloud(1, 50), one_half[50:100]) == {"auroc": None, "tested": 0}


def test_no_synthetic_images_is_no_score() -> None:
    assert detector(cloud(0, 50), names(50, "g"), cloud(1, 0), []) == {"auroc": None, "tested": 0}
