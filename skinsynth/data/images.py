"""Image files as they come, of any kind: found by name in a folder, read as RGB or refused with the reason."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps

from skinsynth.data.folders import FORMATS, MISSING, image_files
from skinsynth.errors import UserError

MIN_SIDE = 16  # pixels


class BadImage(Exception):
    """A file that is set aside; the message is the reason."""


class Images:
    """The image files of a folder by name, whatever their ending, in folders within it too (HAM10000 comes in two). Safe under threads."""

    def __init__(self, folder: Path):
        self.folder, self._lock = folder, Lock()

    def files(self, name: str) -> list[Path]:
        """Those of that name. One that lies in the folder itself as a .jpg is looked for without reading the folder, which may hold a million."""
        plain = self.folder / f"{name}.jpg"
        if plain.is_file():
            return [plain]
        with self._lock:
            found = self._all.get(name, [])
        direct = [path for path in found if path.parent == self.folder]
        return direct if len(direct) == 1 else found

    def find(self, name: str) -> Path:
        """Raises ``BadImage`` where there is none, or more than one."""
        found = self.files(name)
        if len(found) > 1:
            raise BadImage(f"{len(found)} files have its name: {', '.join(str(path.relative_to(self.folder)) for path in found[:3])}")
        if not found:
            raise BadImage(MISSING)
        return found[0]

    @cached_property
    def _all(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = defaultdict(list)
        for path in image_files(self.folder):
            if path.is_file():
                found[path.stem].append(path)
        return dict(found)


def read_image(path: Path, sha256: str | None = None) -> np.ndarray:
    """uint8 (height, width, 3), RGB, upright. CMYK, grey, palette and alpha are converted (alpha is dropped).

    ``sha256``: of the bytes that the file had when the plan was made.

    Raises:
        BadImage: missing, empty, truncated, not an image, too small, or too large to be one.
        OSError: the file system failed; this says nothing about the image.
        UserError: it is not the file that was planned with.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if sha256:  # a file system that this node has not, perhaps: it must not be taken for images that are missing
            raise _other(path, "is gone") from None
        raise BadImage(MISSING) from None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise _other(path, "has changed")
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_form(image)
            ImageOps.exif_transpose(image, in_place=True)
            upright = image.convert("RGBA") if image.mode == "P" else image
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except BadImage:
        raise
    except Image.DecompressionBombError:  # Pillow's limit: 179 million pixels; the largest ISIC images have about 30
        raise BadImage("more pixels than any dermoscopy image (a decompression bomb?)") from None
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # decoders raise what they like for damaged data: OSError, SyntaxError, struct.error ...
        text = str(error)
        cut = "truncated" in text or "unexpected end" in text
        raise BadImage("truncated image" if cut else f"damaged image ({text or type(error).__name__})") from None


def _other(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what} since prepare looked at the images and split them: put it back as it was (is its file system there on this "
                     "node?) and start the same command again, which goes on; or delete the dataset's folders to prepare the images as they are now")


def _check_form(image: Image.Image) -> None:
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"only {image.width} x {image.height} pixels")
    if image.mode[0] in "IF":
        raise BadImage(f"pixel format {image.mode} (expected 8 bits a channel)")


def mislabelled(path: Path) -> str | None:
    """The real format of an image file whose ending names another one. It is used all the same; the user may want to know."""
    with Image.open(path) as image:
        real = image.format
    return None if real in (FORMATS.get(path.suffix.lower()), "MPO") else f"{path.name} is a {real} file"
