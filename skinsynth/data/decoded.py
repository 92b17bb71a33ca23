"""Images as the classifier sees them, decoded no larger than needed and kept in memory: a training goes through a small set many times."""

from __future__ import annotations

import cv2
import numpy as np

from skinsynth.data.dataset import Dataset


class Decoded:
    """``read`` gives a dataset's image as uint8 (side, side, 3), not to be written to; ``full``: the side of the shards' images, in pixels.

    The first images that are read stay, as many as ``limit`` bytes hold; of a set larger than that the same share is decoded in every epoch.
    Safe under threads, which may pass the limit by an image each.
    """

    def __init__(self, full: int, side: int, limit: float):
        self.side, self.room = side, int(limit // (3 * side * side))
        self.reduce = next(n for n in (8, 4, 2, 1) if n == 1 or full // n >= side)
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def read(self, dataset: Dataset, number: int) -> np.ndarray:
        """Raises ``BadSample`` as the dataset does."""
        which = (str(dataset.folder), number)
        image = self._kept.get(which)
        if image is None:
            image = fit(dataset.image(number, reduce=self.reduce), self.side)
            image.flags.writeable = False
            if len(self._kept) < self.room:
                self._kept[which] = image
        return image


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (height, width, 3) -> (side, side, 3). The mean over areas costs four times as much, and of less than half the pixels nothing is lost
    without it (45 dB and more beside PIL's bilinear filter)."""
    if image.shape[:2] == (side, side):
        return image
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if 2 * side <= image.shape[0] else cv2.INTER_LINEAR)
