"""Contact sheets: what is being generated, for the eye, while it is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from skinsynth.data.shards import decode, encode_jpeg, part_path
from skinsynth.run import read_json, write_bytes

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
            images = [decode(_read(tar, part["members"][place]["jpg"])) for place in chosen]
        write_bytes(path, encode_jpeg(grid(images), 90), durable=False)


def _read(tar: object, place: list[int]) -> bytes:
    tar.seek(place[0])  # type: ignore[attr-defined]
    return tar.read(place[1])  # type: ignore[attr-defined]


def grid(images: list[np.ndarray]) -> np.ndarray:
    """uint8 (height, width, 3) of one size each -> one picture, rows of ``COLUMNS``, thinned out where it would be large."""
    step = max(1, -(-images[0].shape[1] * COLUMNS // LONGEST))
    small = [image[::step, ::step] for image in images]
    small += [np.full_like(small[0], 255)] * (-len(small) % COLUMNS)
    return np.concatenate([np.concatenate(small[i:i + COLUMNS], axis=1) for i in range(0, len(small), COLUMNS)])
