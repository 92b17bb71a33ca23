"""What is done to a training image of the classifier: its own changes, and blending with another one. All of it from the sample's own generator."""

from __future__ import annotations

import math

import cv2
import numpy as np

from skinsynth.data.order import permutation

LEVELS = np.arange(256)
TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (height, width, 3) of the same shape: one of the eight flips and turns (a lesion has no up), a little brightness and contrast."""
    turn = TURNS[rng.integers(4)]
    image = image if turn is None else cv2.rotate(image, turn)
    if rng.random() < 0.5:
        image = cv2.flip(image, 1)
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
    return cv2.LUT(image, np.clip(LEVELS * gain + offset, 0, 255).astype(np.uint8))  # of each of the 256 values what becomes of it


def partner(position: int, global_batch: int, seed: int) -> int:
    """The position, in the same global batch, that a sample is blended with: the same on any number of ranks. It may be the sample itself."""
    step, place = divmod(position, global_batch)
    return step * global_batch + int(permutation(global_batch, seed + 15485863, step)[place])


def blend(image: np.ndarray, other: np.ndarray, rng: np.random.Generator, mixup: float, cutmix: float) -> tuple[np.ndarray, float]:
    """uint8 (height, width, 3) twice -> the blend, and the image's share of it (0..1), which its label gets too.

    mixup (Zhang et al. 2018) adds the two by Beta(mixup, mixup); cutmix (Yun et al. 2019) pastes a box of the other one, whose area is
    drawn by Beta(cutmix, cutmix), and the share is that of what is seen. With both above zero, either is taken with the same chance.
    """
    paste = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if paste else mixup
    share = float(rng.beta(alpha, alpha))
    if not paste:
        return cv2.addWeighted(image, share, other, 1 - share, 0), share
    height, width = image.shape[:2]
    side, y, x = math.sqrt(1 - share) / 2, rng.random(), rng.random()
    top, bottom = (round(min(max(edge, 0), 1) * height) for edge in (y - side, y + side))
    left, right = (round(min(max(edge, 0), 1) * width) for edge in (x - side, x + side))
    image = image.copy()
    image[top:bottom, left:right] = other[top:bottom, left:right]
    return image, 1 - (bottom - top) * (right - left) / (height * width)
