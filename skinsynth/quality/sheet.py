"""A sheet of pictures for the eye."""

from __future__ import annotations

import cv2
import numpy as np


def pairs(pictures: list[tuple[np.ndarray, np.ndarray]], captions: list[str], columns: int = 4) -> bytes:
    """A PNG of pairs uint8 (side, side, 3), synthetic left and training right, with their similarity below."""
    cells = []
    for pair, caption in zip(pictures, captions, strict=True):
        both = np.concatenate([_tile(picture) for picture in pair], 1)
        strip = np.full((24, both.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, f"similarity {caption}", (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
        cells.append(np.pad(np.concatenate([both, strip]), ((4, 4), (4, 4), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    whole = np.concatenate([np.concatenate(cells[i:i + columns], 1) for i in range(0, len(cells), columns)])
    return cv2.imencode(".png", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR))[1].tobytes()


def _tile(image: np.ndarray, side: int = 128) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if len(image) > side else cv2.INTER_LINEAR)
