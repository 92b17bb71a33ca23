"""Near-copies of training images: a generator that remembers a patient's picture has not made a new one.

Two steps. A coarse 8 x 8 thumbnail of the query, in all eight flips and turns, is compared with every training image
(matrix products) to find the candidates; each candidate is then aligned by normalised cross-correlation over small
shifts and scales at 32 x 32. What counts is not similarity as such, since all moles on pale skin are alike, but how
much nearer the nearest training image is than the next ones of other patients and lesions (as Carlini et al. 2023 judge
it for diffusion models).
The limit comes from real held-out images, which are no copies.

Measured on ISIC 2017 at 64 pixels (1,400 training, 350 validation, 399 test images): 97 % of 300 disguised copies found (turned, cropped,
tinted, JPEG 50; each attributed to its original but one), 1.3 % of the test images wrongly called copies; 8 ms an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from skinsynth.data.codec import decode, encode_jpeg
from skinsynth.errors import UserError
from skinsynth.knobs import Screen

SIDE = 32  # pixels of the thumbnails that are aligned
COARSE = 8  # and of those that find the candidates
CANDIDATES = 10  # training images aligned per query, and more where nearly all are of one group
POOL = 64  # those from which more are taken
CROWD = 3  # the nearest is judged against the CROWD-th nearest of other groups: up to two more duplicates that nobody listed cannot hide a copy
MARGIN = 3  # pixels of SIDE that the query may be shifted by, each way
SCALES = (0.9, 0.925, 0.95, 0.975, 1.0)  # of the query: with the margin, crops up to some 10 % either way
SAME = 0.99  # similarity from which an image is a copy whatever the next ones are
FLAT = 0.5  # grey levels: with less detail than this a picture has nothing to compare
DETAILS = 4096  # training images whose detail is kept, 12 kB each: some are everybody's neighbour
QUERIES, ROWS = 256, 4096  # queries and training images of one matrix product


@dataclass(frozen=True)
class Matches:
    """Per query: ``index`` int (n,) of the nearest training image, ``similarity`` float (n,) -1..1 to it after alignment, and
    ``nearness`` float (n,) 0..1: 0 for no nearer than the next ones, 1 for the same picture."""

    index: np.ndarray
    similarity: np.ndarray
    nearness: np.ndarray

    def copies(self, limit: float) -> np.ndarray:
        """bool (n,)."""
        return (self.nearness > limit) | (self.similarity >= SAME)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) -> uint8 (SIDE, SIDE, 3), each pixel the mean of its area."""
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


class Gallery:
    """Training images, ready to be searched; 3 kB and a third of it again for each."""

    def __init__(self, thumbnails: np.ndarray, groups: Sequence[str | None] | None = None):
        """uint8 (n, SIDE, SIDE, 3), and of each the group (patient, lesion) that it belongs to, where it is known.

        Raises:
            UserError: there are none.
        """
        if not len(thumbnails):
            raise UserError("no training images to compare with")
        self.thumbnails, self.coarse = thumbnails, coarse(thumbnails)
        self.groups = groups or [None] * len(thumbnails)
        self.detail = lru_cache(DETAILS)(lambda i: _detail(thumbnails[i]))

    def search(self, thumbnails: np.ndarray, threads: int = 1) -> Matches:
        """Queries uint8 (n, SIDE, SIDE, 3) against all training images. The result depends on neither ``threads`` nor the other queries."""
        with ThreadPoolExecutor(threads) as pool:
            rows = [row for start in range(0, len(thumbnails), QUERIES) for row in self._block(thumbnails[start:start + QUERIES], pool)]
        index, similarity, nearness = zip(*rows, strict=True) if rows else ((), (), ())
        return Matches(np.array(index, np.int64), np.array(similarity, np.float64), np.array(nearness, np.float64))

    def _block(self, queries: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[tuple[int, float, float]]:
        nearest, pose = candidates(coarse(queries), self.coarse)

        def align(q: int) -> tuple[int, float, float]:
            places = self._places(nearest[q])
            return self._align(queries[q], nearest[q][places], pose[q][places])

        return pool.map(align, range(len(queries)))

    def _places(self, nearest: np.ndarray) -> list[int]:
        """The first ``CANDIDATES``; where nearly all are of one patient, who may have dozens of images, the next of others: it takes a crowd to judge
        by, or every new picture that looks like theirs would be a copy."""
        groups = [self.groups[image] for image in nearest.tolist()]
        most = Counter(group for group in groups[:CANDIDATES] if group is not None).most_common(1)
        missing = CROWD - (CANDIDATES - most[0][1]) if most else 0
        others = [place for place in range(CANDIDATES, len(groups)) if groups[place] != most[0][0]] if missing > 0 else []
        return [*range(min(CANDIDATES, len(groups))), *others[:max(missing, 0)]]

    def _align(self, query: np.ndarray, nearest: np.ndarray, pose: np.ndarray) -> tuple[int, float, float]:
        """(index, similarity, nearness) of the best of the candidates, each in its pose."""
        fine, templates, found = list(turns(_detail(query)[None])), {}, []
        for candidate, turn in zip(nearest.tolist(), pose.tolist(), strict=True):
            if turn not in templates:
                templates[turn] = _templates(fine[turn][0])
            found.append(max(_correlation(self.detail(candidate), template) for template in templates[turn]))
        order = np.argsort(-np.array(found), kind="stable")
        best, crowd = found[order[0]], self._crowd(nearest[order], [found[place] for place in order])
        # Four decimals: what reaches a file must not hang on the last bit of a matrix product.
        return int(nearest[order[0]]), round(best, 4), round(float(np.clip(1 - (1 - best) / max(1 - crowd, 1e-6), 0, 1)), 4)

    def _crowd(self, images: np.ndarray, similarity: list[float]) -> float:
        """How similar images are that are not the one sought: the ``CROWD``-th of other groups than the nearest image's, or the last; of those that
        show the same lesion every one is near. 0 where there are none."""
        own = self.groups[images[0]]
        others = [found for image, found in zip(images[1:], similarity[1:], strict=True) if own is None or self.groups[image] != own]
        return others[:CROWD][-1] if others else 0.0


def candidates(queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``POOL`` gallery images that are coarsely most like each query in any of its eight turns, nearest first, and in which turn.

    Args:
        queries, gallery: int8 (n, COARSE, COARSE, 3), (m, COARSE, COARSE, 3) of ``coarse``.

    Returns:
        int64 (n, min(m, POOL)) twice: the indices, and of each the number of its turn.
    """
    turned = [_rows(t) for t in turns(queries)]
    score: np.ndarray = np.empty((len(queries), 0), np.float32)
    index: np.ndarray = np.empty((len(queries), 0), np.int64)
    pose = index
    for start in range(0, len(gallery), ROWS):
        rows = _rows(gallery[start:start + ROWS])
        products = np.stack([t @ rows.T for t in turned])  # whole numbers below 2^24: float32 is exact, in whatever order they are added
        likeness = products.max(0) / np.maximum(np.linalg.norm(rows, axis=1), 1)
        few = min(POOL, len(rows))
        here = np.sort(np.argpartition(-likeness, few - 1, axis=1)[:, :few], axis=1)
        score = np.concatenate([score, np.take_along_axis(likeness, here, 1)], 1)
        index = np.concatenate([index, here + start], 1)
        pose = np.concatenate([pose, np.take_along_axis(products.argmax(0), here, 1)], 1)
        best = np.argsort(-score, axis=1, kind="stable")[:, :POOL]
        score, index, pose = (np.take_along_axis(x, best, 1) for x in (score, index, pose))
    return index, pose


def _rows(coarse_: np.ndarray) -> np.ndarray:
    return coarse_.reshape(len(coarse_), -1).astype(np.float32)


def _correlation(image: np.ndarray, template: np.ndarray) -> float:
    """The best normalised cross-correlation over all places, -1..1; 0 where either picture is flat (OpenCV would say 1)."""
    if min(image.std(), template.std()) < FLAT:
        return 0.0
    return float(cv2.matchTemplate(image, template, cv2.TM_CCOEFF_NORMED).max())


def limit(held_out: Matches, knobs: Screen) -> float:
    """The nearness that only a share 1 - ``copy_quantile`` of the real held-out images exceed, kept between ``copy_least`` and ``copy_most``: with
    few images, or an unknown double among them, their quantile is noise. On ISIC 2017 at 64 pixels, 1 % of real images lie above 0.6 to 0.7, and
    nine in ten disguised copies above 0.74.

    Raises:
        UserError: no held-out images.
    """
    if not len(held_out.nearness):
        raise UserError("no held-out images to set the limit of near-copies by: the validation split is empty")
    return round(float(np.clip(np.quantile(held_out.nearness, knobs.copy_quantile), knobs.copy_least, knobs.copy_most)), 4)


def turns(images: np.ndarray) -> Iterator[np.ndarray]:
    """The eight flips and quarter turns of (n, side, side, channels): a lesion has no up."""
    for quarter in range(4):
        turned = np.rot90(images, quarter, (1, 2))
        yield turned
        yield turned[:, :, ::-1]


def plant(image: np.ndarray, number: int, kind: str = "all") -> np.ndarray:
    """A disguised copy of uint8 (side, side, 3), to measure how many are found: turned, cropped by 5 %, tinted, JPEG quality 50.

    ``kind``: one of ``DISGUISES``, or all of them one after the other. ``number`` chooses turn, place of the crop and tint."""
    rng = np.random.default_rng(number)
    for name, disguise in DISGUISES.items():
        if kind in (name, "all"):
            image = disguise(image, number, rng)
    return image


def _turn(image: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(list(turns(image[None]))[number % 8][0])


def _crop(image: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    side = len(image)
    cut = round(side * 0.05)
    top, left = rng.integers(0, cut + 1, 2)
    return cv2.resize(image[top:top + side - cut, left:left + side - cut], (side, side), interpolation=cv2.INTER_LINEAR)


def _tint(image: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image * rng.uniform(0.95, 1.05, 3) + rng.uniform(-8, 8, 3), 0, 255).astype(np.uint8)


def _jpeg(image: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return decode(encode_jpeg(image, 50))


DISGUISES = {"flip": _turn, "crop": _crop, "colour": _tint, "jpeg": _jpeg}  # in the order in which "all" puts them on
PLANTS = (*DISGUISES, "all")  # a unit of screen each: disguised copies of training images, to measure how many are found
PLANTED = 200  # of each


def coarse(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 (n, SIDE, SIDE, 3) -> int8 (n, COARSE, COARSE, 3): colours without their mean, the largest at 127; zeros for a flat picture."""
    step = SIDE // COARSE
    small = thumbnails.reshape(-1, COARSE, step, COARSE, step, 3).astype(np.float32).mean((2, 4))
    flat = small - small.mean((1, 2), keepdims=True)
    return np.round(flat * (127 / np.maximum(np.abs(flat).max((1, 2, 3), keepdims=True), 1e-3))).astype(np.int8)


def _detail(thumbnail_: np.ndarray) -> np.ndarray:
    """float32 (SIDE, SIDE, 3) without its slow changes (lighting, vignette), which all dermoscopy images share."""
    image = thumbnail_.astype(np.float32)
    return image - cv2.GaussianBlur(image, (0, 0), 4.0, borderType=cv2.BORDER_REFLECT)


def _templates(detail: np.ndarray) -> list[np.ndarray]:
    """The query's middle at each scale; it is slid over the training image."""
    middle = np.ascontiguousarray(detail[MARGIN:SIDE - MARGIN, MARGIN:SIDE - MARGIN])
    sides = [round(len(middle) * scale) for scale in SCALES]
    return [cv2.resize(middle, (side, side), interpolation=cv2.INTER_LINEAR) for side in sides]
