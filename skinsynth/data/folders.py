"""Image files in folders, by their names alone. Without numpy: a launch asks, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from skinsynth.errors import UserError

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}  # by lower-case ending
MISSING = "image file is missing"


def image_files(folder: Path) -> Iterator[Path]:
    """What has an image's ending in a folder and those within it, behind links too, each folder once, in a fixed order.

    Raises:
        UserError: a folder that cannot be read: its images would pass for missing ones.
    """
    seen: set[Path] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = Path(place).resolve()
        if real in seen:  # a link to a folder above it, perhaps
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, file) for file in sorted(files) if Path(file).suffix.lower() in FORMATS)


def _unreadable(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}), nor images in it: mend its permissions, or give a folder "
                    "without it") from error
