"""How far apart two sets of images are, in a feature space that the caller names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skinsynth.errors import UserError
from skinsynth.knobs import Screen

FEW, ENOUGH = 2048, 10_000  # images below which FID says little, and below which its bias is to be told
BLOCK = 512  # rows of a matrix of distances that are held at a time


@dataclass(frozen=True)
class Scaler:
    """Brings every feature to mean 0 and standard deviation 1 *of a reference set*, then every image to length sqrt(d): no loud channel
    and no odd picture decides alone. On 400 real images against 400 others this halved the noise of KID."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, reference: np.ndarray) -> Scaler:
        """From float (n, d). A feature that never varies is left at its scale."""
        std = reference.std(0, dtype=np.float64)
        return cls(reference.mean(0, dtype=np.float64), np.where(std > 1e-6, std, 1.0))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """float (n, d) -> float64 (n, d)."""
        scaled = (features - self.mean) / self.std
        return scaled * np.sqrt(scaled.shape[1]) / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The cubic polynomial kernel (x . y / d + 1)^3: float (n, d), (m, d) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012) of float (n, d) and (m, d); may fall below zero."""
    n, m = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int, subset_size: int, seed: int) -> tuple[float, float | None]:
    """Kernel Inception Distance (Binkowski et al. 2018) with any features: mean and standard deviation of MMD^2 over random subsets.

    The mean is about 0 for two sets of one kind, whatever their sizes (FID is not: it is biased below some 10,000 images). The deviation tells
    how much KID of so few images varies, not KID of all: of that it is an upper bound, and near it where a subset is half of either set (the
    delete-half jackknife, Shao and Wu 1989). None where the sets are too small to be halved.

    Args:
        x, y: float (n, d), (m, d); each at least two rows. subset_size is cut as ``kid_size`` says.
        subsets: how many draws. seed: of the draws; the same seed gives the same figures.

    Raises:
        UserError: fewer than two images on a side, or feature lengths that differ.
    """
    _check("KID", x, y)
    rng, size = np.random.default_rng(seed), kid_size(len(x), len(y), subset_size)
    x, y = x.astype(np.float64), y.astype(np.float64)
    found = [mmd2(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)]) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found)) if subsets > 1 and 2 * size <= min(len(x), len(y)) else None


def kid_size(n: int, m: int, subset_size: int) -> int:
    """Images of a subset: at most half of the smaller set, since subsets that are the whole of it do not differ; at least 2."""
    return max(2, min(subset_size, min(n, m) // 2))


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet Inception Distance (Heusel et al. 2017) with any features: that of two normal distributions with the sets' means and covariances.

    The trace of the square root of the product of the covariances A and B is taken as the sum of the singular values of A^1/2 B^1/2: no complex
    numbers, and no roots of rounding errors, so a covariance without full rank (fewer images than features) does no harm.

    Args:
        x, y: float (n, d), (m, d); each at least two rows.

    Raises:
        UserError: fewer than two images on a side, or feature lengths that differ.
    """
    _check("FID", x, y)
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    shared = np.linalg.svd(_root(a) @ _root(b), compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def fid_warning(images: int, dimensions: int) -> str | None:
    """What a reader of an FID must know, by the size of the smaller set; None from 10,000 images on."""
    if images < max(FEW, dimensions):
        return (f"{images} images are too small for FID in {dimensions} dimensions (at least {max(FEW, dimensions):,}, better {ENOUGH:,}): "
                "go by KID, which has no bias")
    return f"FID of {images:,} images, fewer than {ENOUGH:,}, is too high by its bias: compare it at equal numbers only" if images < ENOUGH else None


def prdc(synthetic: np.ndarray, real: np.ndarray, neighbours: int) -> dict[str, float]:
    """How much of the synthetic set looks real, and how much of the real one is reached.

    The manifold of a set is the union of balls around its images, each as wide as the distance to its k-th nearest neighbour in the set.
    ``precision`` and ``recall`` (Kynkaanniemi et al. 2019): the share of synthetic images in the real manifold, and of real ones in the synthetic.
    ``density`` and ``coverage`` (Naeem et al. 2020): how many real balls a synthetic image lies in, over k (may exceed 1), and the share of real
    balls that hold a synthetic image; odd real images matter less to these. All depend on the numbers of images.

    Args:
        synthetic, real: float (n, d), (m, d), each with more than one row. neighbours: k, cut to what the smaller set has.

    Raises:
        UserError: fewer than two images on a side, or feature lengths that differ.
    """
    _check("precision and recall", synthetic, real)
    k = min(neighbours, len(real) - 1, len(synthetic) - 1)
    centre = real.mean(0, dtype=np.float64)
    synthetic, real = ((x - centre).astype(np.float32) for x in (synthetic, real))  # near the origin float32 is enough
    real_radii, own_radii = _radii(real, k), _radii(synthetic, k)
    inside, balls, reached, covered = 0, 0, np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(synthetic), BLOCK):
        distance = _squared(synthetic[start:start + BLOCK], real)
        holds = distance <= real_radii
        inside, balls = inside + int(holds.any(1).sum()), balls + int(holds.sum())
        covered |= holds.any(0)
        reached |= (distance <= own_radii[start:start + BLOCK, None]).any(0)
    return {"precision": inside / len(synthetic), "recall": float(reached.mean()), "density": balls / (k * len(synthetic)),
            "coverage": float(covered.mean())}


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row."""
    found = []
    for start in range(0, len(x), BLOCK):
        distance = _squared(x[start:start + BLOCK], x)
        distance[np.arange(len(distance)), np.arange(start, start + len(distance))] = -1  # itself: first, whatever rounding says
        found.append(np.partition(distance, k, axis=1)[:, k])
    return np.concatenate(found)


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def _check(what: str, x: np.ndarray, y: np.ndarray) -> None:
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"{what} needs two images or more a side with equal features, found {x.shape} and {y.shape}")


def compare(synthetic: np.ndarray, real: np.ndarray, knobs: Screen, seed: int) -> dict[str, Any]:
    """All distances of float (n, d) to float (m, d), rounded, with ``images`` and ``real_images``; each None where a side has fewer than two.

    ``kid_std`` is the standard deviation over subsets of ``kid_subset`` images, as ``kid`` says. ``fid_warning`` says where the sets are too small
    for FID, else None.
    """
    sizes = {"images": len(synthetic), "real_images": len(real)}
    if min(sizes.values()) < 2:
        return {**sizes, **dict.fromkeys(("kid", "kid_std", "kid_subset", "fid", "fid_warning", "precision", "recall", "density", "coverage"))}
    mean, std = kid(synthetic, real, knobs.kid_subsets, knobs.kid_subset_size, seed)
    figures = {"kid": mean, "kid_std": std, "fid": fid(synthetic, real), **prdc(synthetic, real, knobs.neighbours)}
    return {**sizes, **{name: None if figure is None else round(figure, 5) for name, figure in figures.items()},
            "kid_subset": kid_size(len(synthetic), len(real), knobs.kid_subset_size),
            "fid_warning": fid_warning(min(sizes.values()), synthetic.shape[1])}
