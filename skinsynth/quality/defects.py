"""What makes a picture unfit whatever it shows: blank, blurred, in a black frame, clipped, garish.

Each is one number per image. The limits come from the real training images, so they fit the camera, the size and the preparation at hand; only
blank has a limit of its own, since a real image may be faint but never empty. What share of real held-out images would be set aside is measured
with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from skinsynth.knobs import Screen

MEASURES = ("std", "sharpness", "frame", "clipped", "saturation")  # the columns of what ``measure`` gives
REASONS = {"blank": "std", "blur": "sharpness", "frame": "frame", "clipped": "clipped", "saturated": "saturation"}
DARK = 30  # grey levels: below, a pixel of the outer ring counts as frame
ENDS = (1, 254)  # values up to and from which a channel is clipped
FLOORS = {"frame": 0.1, "clipped": 0.1}  # limits are never below: where real images have no frame at all, a dark hair must not make one
MARGIN = 0.25  # of the way from the median to the limit, added where there are too few real images to know so small a share


def measure(image: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) -> float32 (5,), as ``MEASURES``: spread of the grey levels, log of the Laplacian's variance, share of dark pixels
    in the outer ring (a tenth of the side), share of clipped pixels, mean saturation 0..255."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    ring = np.ones(grey.shape, bool)
    wide = max(1, min(grey.shape) // 10)
    ring[wide:-wide, wide:-wide] = False
    sharp = np.log(cv2.Laplacian(grey, cv2.CV_32F).var() + 1e-3)
    clipped = ((image <= ENDS[0]) | (image >= ENDS[1])).any(2).mean()
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1].mean()
    return np.array([grey.std(), sharp, (grey[ring] < DARK).mean(), clipped, saturation], np.float32)


@dataclass(frozen=True)
class Limits:
    """Reason -> the value beyond which an image is set aside; a reason that is not looked at is left out."""

    values: dict[str, float]

    @classmethod
    def of(cls, real: np.ndarray, knobs: Screen) -> Limits:
        """From the measures float32 (n, 5) of the real training images."""
        found = {"blank": knobs.blank_std}
        for reason, share in (("blur", knobs.blur), ("frame", knobs.frame), ("clipped", knobs.clipped), ("saturated", knobs.saturation)):
            if share is not None:
                column = real[:, MEASURES.index(REASONS[reason])].astype(np.float64)
                found[reason] = round(max(_limit(column, share, low=reason == "blur"), FLOORS.get(reason, -np.inf)), 4)
        return cls(found)

    def beyond(self, measures: np.ndarray) -> dict[str, np.ndarray]:
        """float32 (n, 5) -> reason: bool (n,)."""
        columns = {reason: measures[:, MEASURES.index(REASONS[reason])] for reason in self.values}
        return {reason: column < self.values[reason] if reason in ("blank", "blur") else column > self.values[reason]
                for reason, column in columns.items()}


def value(reason: str, row: np.ndarray) -> float:
    """What a reason went by, of one row of measures."""
    return round(float(row[MEASURES.index(REASONS[reason])]), 4)


def _limit(column: np.ndarray, share: float, low: bool) -> float:
    """The value that a share of the column lies beyond, with the margin where the column cannot show so small a share."""
    edge = float(np.quantile(column, share if low else 1 - share))
    return edge if len(column) * share >= 1 else edge + MARGIN * (edge - float(np.median(column)))
