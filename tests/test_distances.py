"""distances: each against its formula and its promises, and the feature space on drawn lesions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.errors import UserError
from skinsynth.knobs import Config, Model, Screen
from skinsynth.quality.distances import Scaler, compare, fid, fid_warning, kid, mmd2, prdc
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
    assert spread is not None
    assert abs(same) < 2 * spread
    assert far > 5 * near > 10 * abs(same)


def test_kid_is_unbiased_in_small_sets() -> None:
    """The mean over many pairs of small sets of one kind is zero within its error, where a biased estimate would be far above."""
    values = np.array([mmd2(drawn_from(2 * i, 10), drawn_from(2 * i + 1, 10)) for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20
    x = drawn_from(0, 10)
    biased = np.mean((x @ x.T / 8 + 1) ** 3) * 2 - 2 * np.mean((x @ drawn_from(1, 10).T / 8 + 1) ** 3)
    assert biased > 10 * values.std() / 20


def test_kid_depends_on_the_seed_alone_and_cuts_the_subsets_to_half_of_the_smaller_set() -> None:
    x, y = drawn_from(0, 60), drawn_from(1, 12, 0.2)
    assert kid(x, y, 5, 6, 3) == kid(x, y, 5, 6, 3) != kid(x, y, 5, 6, 4)
    assert kid(x, y, 5, 1000, 0) == kid(x, y, 5, 6, 0)


def test_the_spread_over_subsets_is_no_less_than_what_new_sets_differ_and_unknown_of_too_few() -> None:
    """80 images a side, subsets of up to 100 asked for: as wide as KID varies where that is by a shift, whatever the kind no narrower."""
    for shift, most in ((0.5, 1.4), (0.0, 4.0)):
        found = [kid(drawn_from(2 * i, 80), drawn_from(2 * i + 1, 80, shift), 40, 100, 0) for i in range(60)]
        real, said = np.std([mean for mean, _ in found]), np.mean([spread for _, spread in found])
        assert 0.8 * real < said < most * real
    for few in (2, 3):
        assert kid(drawn_from(0, few), drawn_from(1, 50), 5, 100, 0)[1] is None
    assert kid(drawn_from(0, 50), drawn_from(1, 50), 1, 10, 0)[1] is None  # one subset


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
    alike = kid(scale(sharp), scale(rest), 200, 20, 0)[0]
    assert kid(scale(sharp), scale(soft), 200, 20, 0)[0] > 5 * abs(alike)


def test_the_space_is_named_without_a_path(tmp_path: Path) -> None:
    assert space_name(Config()) == "builtin-vae"
    assert space_name(Config(model=Model(base=str(tmp_path / "sd15")))) == "sd15-vae"
    assert space_name(Config(screen=Screen(features=str(tmp_path / "dinov2-base")))) == "dinov2-base"
    with pytest.raises(UserError, match="no such folder"):
        VaeFeatures(Model(base=str(tmp_path / "sd15")), 4)


# ---- FID ----

def with_covariance(mean: list[float], covariance: np.ndarray, n: int = 9) -> np.ndarray:
    """Rows whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T @ np.linalg.cholesky(covariance).T + mean


def test_fid_by_hand() -> None:
    x, y = with_covariance([0, 0], np.diag([4.0, 9.0])), with_covariance([1, -2], np.diag([1.0, 25.0]))
    assert fid(x, y) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-9)  # covariances that commute: the difference of their roots


def test_fid_is_the_matrix_formula() -> None:
    from scipy.linalg import sqrtm

    x, y = drawn_from(0, 60) @ np.random.default_rng(5).normal(size=(8, 8)), drawn_from(1, 40, 0.3)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)


def test_fid_of_fewer_images_than_features_is_a_number_and_zero_to_itself() -> None:
    x = np.random.default_rng(0).normal(size=(6, 50)) * 1000
    assert fid(x, x) == pytest.approx(0, abs=1e-12 * np.trace(np.cov(x, rowvar=False)))
    assert fid(x, x + 3) == pytest.approx(50 * 9, rel=1e-6)


def test_fid_is_biased_where_kid_is_not_and_says_so() -> None:
    few, many = fid(drawn_from(0, 30), drawn_from(1, 30)), fid(drawn_from(0, 3000), drawn_from(1, 3000))
    assert few > 20 * many
    assert "30 images are too small for FID in 8 dimensions" in str(fid_warning(30, 8))
    assert "too small" in str(fid_warning(3000, 4096))
    assert "compare it at equal numbers" in str(fid_warning(3000, 512))
    assert fid_warning(10_000, 2048) is None


# ---- precision, recall, density, coverage ----

def slow_prdc(synthetic: np.ndarray, real: np.ndarray, k: int) -> dict[str, float]:
    """The definitions, one pair at a time."""
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(x: np.ndarray, i: int) -> float:
        return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    real_radii, own_radii = [radius(real, i) for i in range(len(real))], [radius(synthetic, i) for i in range(len(synthetic))]
    balls = [[distance(s, r) <= width for r, width in zip(real, real_radii, strict=True)] for s in synthetic]
    reached = [[distance(s, r) <= width for s, width in zip(synthetic, own_radii, strict=True)] for r in real]
    return {"precision": float(np.mean([any(row) for row in balls])), "recall": float(np.mean([any(row) for row in reached])),
            "density": sum(map(sum, balls)) / (k * len(synthetic)), "coverage": float(np.mean(np.any(balls, axis=0)))}


@pytest.mark.parametrize(("n", "m", "k"), [(30, 40, 5), (7, 50, 3), (40, 9, 1)])
def test_prdc_is_the_definition(n: int, m: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic, real = drawn_from(0, n, 0.4), drawn_from(1, m)
    expected = slow_prdc(synthetic, real, k)
    assert prdc(synthetic, real, k) == pytest.approx(expected)
    monkeypatch.setattr("skinsynth.quality.distances.BLOCK", 4)
    assert prdc(synthetic + 1e4, real + 1e4, k) == pytest.approx(expected)


def test_prdc_of_one_kind_is_high_and_noise_costs_precision_and_a_dropped_mode_recall() -> None:
    rng = np.random.default_rng(0)
    real, again = (rng.normal(0, 1, (400, 4)) + rng.integers(0, 2, (400, 1)) * 20 for _ in range(2))
    same = prdc(again, real, 5)
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.85
    assert same["density"] == pytest.approx(1, abs=0.1)
    dropped = prdc(again[again[:, 0] < 10], real, 5)
    assert dropped["precision"] > 0.85
    assert dropped["recall"] < 0.6
    assert dropped["coverage"] < 0.6
    noisy = prdc(again + rng.normal(0, 4, again.shape), real, 5)
    assert noisy["precision"] < 0.5 * same["precision"]
    assert noisy["density"] < 0.5


def test_one_odd_real_image_makes_precision_but_not_density() -> None:
    real = np.concatenate([drawn_from(0, 200), np.full((1, 8), 60.0)])
    far = drawn_from(1, 100, 20)
    found = prdc(far, real, 5)
    assert found["precision"] == 1
    assert found["density"] == pytest.approx(0.2)


def test_compare_gives_all_with_their_sizes_and_none_of_too_little() -> None:
    knobs = Screen(kid_subsets=5, kid_subset_size=20)
    found = compare(drawn_from(0, 50), drawn_from(1, 60), knobs, 0)
    assert found["kid"] == round(kid(drawn_from(0, 50), drawn_from(1, 60), 5, 20, 0)[0], 5)
    assert found["fid"] == round(fid(drawn_from(0, 50), drawn_from(1, 60)), 5)
    assert (found["images"], found["real_images"], found["kid_subset"]) == (50, 60, 20)
    empty = compare(np.zeros((1, 8)), drawn_from(1, 60), knobs, 0)
    assert empty.keys() == found.keys()
    assert {v for k, v in empty.items() if not k.endswith("images")} == {None}


@pytest.mark.parametrize("of", [fid, lambda x, y: prdc(x, y, 5)])
def test_the_others_refuse_too_little_too(of: Callable[..., object]) -> None:
    with pytest.raises(UserError, match="two images or more"):
        of(np.zeros((1, 4)), np.zeros((9, 4)))
