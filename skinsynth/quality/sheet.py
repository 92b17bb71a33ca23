"""Sheets of pictures for the eye: of what is being generated while it is, and of the nearest pairs that the screening found."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np

from skinsynth.data.codec import decode, encode_jpeg
from skinsynth.data.dataset import read_member
from skinsynth.data.shards import part_path
from skinsynth.files import read_json, write_bytes

COLUMNS, ROWS = 6, 4
EVERY = 10  # seconds between two of them, of all tasks together
LONGEST = 1536  # pixels


def refresh(folder: Path, unit: int, sheets: Path) -> None:
    """``<sheets>/<class>.jpg`` of the first images of each class in a finished unit; not more often than every few seconds."""
    part = read_json(part_path(folder, unit))
    for name in sorted(set(part["columns"].get("class", []))):
        path = sheets / f"{name}.jpg"
        if path.exists() and time.time() - path.stat().st_mtime < EVERY:
            continue
        chosen = [place for place, found in enumerate(part["columns"]["class"]) if found == name][:COLUMNS * ROWS]
        with open(folder / part["shard"], "rb") as tar:
            images = [decode(read_member(tar, part["members"][place]["jpg"])) for place in chosen]
        write_bytes(path, encode_jpeg(grid(images), 90), durable=False)


def grid(images: list[np.ndarray]) -> np.ndarray:
    """uint8 (height, width, 3) of one size each -> one picture, rows of ``COLUMNS``, thinned out where it would be large."""
    step = max(1, -(-images[0].shape[1] * COLUMNS // LONGEST))
    small = [image[::step, ::step] for image in images]
    small += [np.full_like(small[0], 255)] * (-len(small) % COLUMNS)
    return np.concatenate([np.concatenate(small[i:i + COLUMNS], axis=1) for i in range(0, len(small), COLUMNS)])


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
