"""The views of an image that fine-tuning draws from: crops, and their mirror images. The latent cache holds just these."""

from __future__ import annotations

import zlib

import cv2
import numpy as np

from skinsynth.data.order import sample_rng
from skinsynth.knobs import Encode


def count(cfg: Encode) -> int:
    return cfg.crops * (2 if cfg.flip else 1)


def views(image: np.ndarray, key: str, cfg: Encode, seed: int) -> list[np.ndarray]:
    """uint8 (height, width, 3) -> ``count(cfg)`` of the same shape. Crops are drawn from (seed, key), so that they are the same wherever made."""
    rng, side = sample_rng(seed, zlib.crc32(key.encode())), image.shape[0]
    crops = [image]
    for _ in range(cfg.crops - 1):
        size = round(side * rng.uniform(cfg.crop_scale, 1))
        top, left = rng.integers(side - size + 1, size=2)
        crops.append(cv2.resize(image[top:top + size, left:left + size], (side, side), interpolation=cv2.INTER_CUBIC))
    return [view for crop in crops for view in ([crop, crop[:, ::-1].copy()] if cfg.flip else [crop])]
