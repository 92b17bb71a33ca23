"""Near-duplicates among the synthetic images themselves: the same picture drawn twice gives a classifier no second example.

Every image has a *print*: its grey picture at 16 x 16 pixels between two blurs, so without lighting and without noise. Two prints are compared by
their correlation, in the best of the eight flips and turns. The numbers of a print are whole and small, so that a matrix product of float32 is
exact: the result depends neither on blocks, nor on threads, nor on which task compared what. Most pairs are ruled out by a bound that holds for all
eight turns at once.

On ISIC 2017 at 64 pixels: a print and that of the same picture after JPEG 50, noise of 6 grey levels or a blur of one pixel correlate by 0.976 or
more (200 images); of 537 different real images, 1 % have another within 0.970.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod

import cv2
import numpy as np

from skinsynth.quality.copies import turns

SIDE = 16
BLOCK = 1024  # prints compared with as many others at a time
FEW = 50  # one pair of so many may be looked at alone; where there are more, all are, together
SLACK = 1e-3  # of the bound, which is rounded; the products that decide are not
KEPT = 4  # earlier images noted per image: a generator that always draws the same would otherwise give pairs without end


def fingerprint(thumbnail: np.ndarray) -> np.ndarray:
    """uint8 (32, 32, 3) -> int8 (SIDE, SIDE); zeros for a flat picture."""
    grey = thumbnail.astype(np.float32).mean(2)
    band = cv2.resize(cv2.GaussianBlur(grey, (0, 0), 1) - cv2.GaussianBlur(grey, (0, 0), 4), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    peak = float(np.abs(band).max())
    return np.round(band * (127 / peak)).astype(np.int8) if peak > 1e-3 else np.zeros((SIDE, SIDE), np.int8)


def near_pairs(earlier: np.ndarray, later: np.ndarray, limit: float, same: bool = False) -> np.ndarray:
    """int64 (pairs, 2), rows (later, earlier) of the prints int8 (n, SIDE, SIDE) and (m, SIDE, SIDE) that correlate by ``limit`` or more.

    Of each later one at most ``KEPT`` earlier ones, the first. ``same``: both are one set, of which only earlier < later is a pair.
    """
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(later), BLOCK):
        rows = later[start:start + BLOCK]
        kept = np.zeros(len(rows), np.int64)
        for first in range(0, min(len(earlier), start + len(rows)) if same else len(earlier), BLOCK):
            close = within(rows, earlier[first:first + BLOCK], limit)
            if same:
                close &= np.arange(first, first + close.shape[1])[None] < np.arange(start, start + len(rows))[:, None]
            if close.any():
                close &= np.cumsum(close, 1) + kept[:, None] <= KEPT
                kept += close.sum(1)
                found.append(np.argwhere(close) + np.array([start, first]))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def first_near(prints: np.ndarray, image: int, others: np.ndarray, limit: float) -> int | None:
    """The first of the images ``others`` (int) whose print correlates by ``limit`` or more with that of ``image``; prints int8 (n, SIDE, SIDE)."""
    for start in range(0, len(others), BLOCK):
        block = others[start:start + BLOCK]
        close = np.flatnonzero(within(prints[block], prints[image][None], limit)[:, 0])
        if len(close):
            return int(block[close[0]])
    return None


def within(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """bool (n, m): which of the prints int8 (n, SIDE, SIDE) and (m, SIDE, SIDE) correlate by ``limit`` or more."""
    i, j = np.nonzero(_invariant(x) @ _invariant(y).T >= limit - SLACK)
    if len(i) * FEW > len(x) * len(y):
        return correlation(x, y) >= limit
    found, flat = np.zeros((len(x), len(y)), bool), _rows(y[j])
    product = _best(x[i], lambda turned: np.einsum("nd,nd->n", turned, flat))
    found[i, j] = product / np.maximum(_length(x)[i] * _length(y)[j], 1) >= limit
    return found


def _invariant(prints: np.ndarray) -> np.ndarray:
    """float32 (n, d): no turn of a print correlates with another by more than the product of their rows. The mean of its turns is the part of a
    print that no turn changes (a quarter of it says all, since the others repeat it); of what is left the length, as if that agreed."""
    mean = 2 * _rows(np.stack(list(turns(prints))).mean(0, dtype=np.float32)[:, :SIDE // 2, :SIDE // 2])
    length = _length(prints)
    rest = np.sqrt(np.maximum(length**2 - (mean**2).sum(1), 0))
    return np.concatenate([mean, rest[:, None]], 1) / np.maximum(length, 1)[:, None]


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 (n, m), -1..1: of the prints int8 (n, SIDE, SIDE) with (m, SIDE, SIDE), the highest of all turns; 0 for flat ones."""
    flat = _rows(y)
    return _best(x, lambda turned: turned @ flat.T) / np.maximum(_length(x)[:, None] * _length(y)[None], 1)


def _best(x: np.ndarray, product: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The highest of the products that the eight turns of the prints x give."""
    return reduce(lambda best, found: np.maximum(best, found, out=best), (product(_rows(turned)) for turned in turns(x)))


def _rows(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), prod(pictures.shape[1:])).astype(np.float32)


def _length(prints: np.ndarray) -> np.ndarray:
    return np.linalg.norm(_rows(prints), axis=1)
