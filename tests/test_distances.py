"""distances: KID against its formula and its promises, and the feature space on drawn lesions."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.errors import UserError
from skinsynth.knobs import Config, Model, Screen
from skinsynth.quality.distances import Scaler, kid, mmd2
from skinsynth.quality.features import VaeFeatures, space_name


def drawn_from(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, 8))


def test_mmd_is_the_formula_of_the_paper() -> None:
    x, y = drawn_from(0, 5), drawn_from(1, 7, 0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 8 + 1) ** 3

    xx = sum(k(x[i], x[j]) for i, j in product(range(5), repeat=2) if i != j) / (5 * 4)
    yy = sum(k(y[i], y[j]) for i, j in product(range(7), repeat=2) if i != j) / (7 * 6)
    xy = sum(k(a, b) for a, b in product(x, y)) / (5 * 7)
    assert mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_is_about_zero_for_one_kind_and_grows_with_the_shift() -> None:
    same, spread = kid(drawn_from(0, 300), drawn_from(1, 200), 50, 100, 0)
    near = kid(drawn_from(0, 300), drawn_from(1, 200, 0.3), 50, 100, 0)[0]
    far = kid(drawn_from(0, 300), drawn_from(1, 200, 1.0), 50, 100, 0)[0]
    assert abs(same) < 2 * spread
    assert far > 5 * near > 10 * abs(same)


def test_kid_is_unbiased_in_small_sets() -> None:
    """The mean over many pairs of small sets of one kind is zero within its error, where a biased estimate would be far above."""
    values = np.array([mmd2(drawn_from(2 * i, 10), drawn_from(2 * i + 1, 10)) for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20
    x = drawn_from(0, 10)
    biased = np.mean((x @ x.T / 8 + 1) ** 3) * 2 - 2 * np.mean((x @ drawn_from(1, 10).T / 8 + 1) ** 3)
    assert biased > 10 * values.std() / 20


def test_kid_depends_on_the_seed_alone_and_cuts_the_subsets_to_the_smaller_set() -> None:
    x, y = drawn_from(0, 60), drawn_from(1, 12, 0.2)
    assert kid(x, y, 5, 10, 3) == kid(x, y, 5, 10, 3) != kid(x, y, 5, 10, 4)
    assert kid(x, y, 5, 1000, 0) == kid(x, y, 5, 12, 0)
    mean, spread = kid(x, x[:60], 4, 60, 0)  # all of both, each time: nothing left to draw
    assert spread == pytest.approx(0, abs=1e-12)
    assert mean == pytest.approx(mmd2(x, x), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [((1, 4), (9, 4)), ((9, 4), (0, 4)), ((9, 4), (9, 5))])
def test_kid_of_too_little_is_refused(x: tuple[int, int], y: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="two images or more"):
        kid(np.zeros(x), np.zeros(y), 5, 5, 0)


def test_scaling_evens_out_loud_features_and_odd_images() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal([5, 100, 3, 0], [1, 50, 0, 0.01], (300, 4))
    scaled = Scaler.of(reference.astype(np.float32))(reference)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 2)
    assert np.allclose(scaled[:, [0, 1, 3]].std(0), 2 / np.sqrt(3), rtol=0.1)
    assert np.allclose(scaled[:, 2], 0, atol=1e-4)
    odd = Scaler.of(reference)([[5, 100 + 50 * 1000, 3, 0]])
    assert np.allclose(odd, [[0, 2, 0, 0]], atol=1e-2)


@pytest.fixture(scope="module")
def pictures(drawn: Path) -> np.ndarray:
    files = sorted((drawn / "images").glob("*.jpg"))[:80]
    found = np.stack([cv2.resize(cv2.imread(str(f)), (32, 32), interpolation=cv2.INTER_AREA)[..., ::-1] for f in files])
    return found[np.random.default_rng(0).permutation(len(found))]


def test_features_do_not_depend_on_batching_and_order(pictures: np.ndarray) -> None:
    extractor = VaeFeatures(Model(), 4)
    whole = extractor(pictures[:7])
    assert whole.dtype == np.float32
    assert np.array_equal(whole, np.concatenate([extractor(pictures[i:i + 1]) for i in range(7)]))
    assert np.array_equal(whole[::-1], extractor(pictures[:7][::-1]))
    assert len(np.unique(whole, axis=0)) == 7


def test_the_feature_space_tells_blurred_lesions_from_sharp_ones(pictures: np.ndarray) -> None:
    extractor = VaeFeatures(Model(), 16)
    blurred = np.stack([cv2.GaussianBlur(p, (0, 0), 1.0) for p in pictures[40:]])
    sharp, rest, soft = extractor(pictures[:40]), extractor(pictures[40:]), extractor(blurred)
    scale = Scaler.of(sharp)
    alike = kid(scale(sharp), scale(rest), 20, 30, 0)[0]
    assert kid(scale(sharp), scale(soft), 20, 30, 0)[0] > 5 * abs(alike)


def test_the_space_is_named_without_a_path(tmp_path: Path) -> None:
    assert space_name(Config()) == "builtin-vae"
    assert space_name(Config(model=Model(base=str(tmp_path / "sd15")))) == "sd15-vae"
    assert space_name(Config(screen=Screen(features=str(tmp_path / "dinov2-base")))) == "dinov2-base"
    with pytest.raises(UserError, match="no such folder"):
        VaeFeatures(Model(base=str(tmp_path / "sd15")), 4)
