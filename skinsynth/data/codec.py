"""Bytes of images and arrays, as they stand in shards: JPEG and ``.npy``. Nothing is unpickled."""

from __future__ import annotations

import io

import numpy as np


def decode(data: bytes, out: np.ndarray | None = None, reduce: int = 1) -> np.ndarray:
    """JPEG bytes -> uint8 (height, width, 3), RGB. For our own shards; foreign files go through ``images.read_image``.

    ``reduce``: 1, 2, 4 or 8, by which both sides are divided while decoding (libjpeg's scaled inverse DCT: nearly the mean over the
    pixels), at about half the cost of decoding and resizing.

    Raises:
        ValueError: not an image, or not one of the size of ``out``.
    """
    import cv2

    how = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}[reduce]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    if image is None:
        raise ValueError("not an image that can be decoded")
    if reduce > 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if out is not None and out.shape != image.shape:
        raise ValueError(f"it is {image.shape[1]} x {image.shape[0]} pixels, not {out.shape[1]} x {out.shape[0]}")
    if out is None:
        return image
    np.copyto(out, image)
    return out


def to_npy(values: np.ndarray) -> bytes:
    """The content of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """Raises ``ValueError`` for anything but one ``.npy`` file, or where the array holds Python objects: nothing is unpickled."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 (height, width, 3), RGB -> JPEG bytes; the same bytes for the same pixels."""
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()
