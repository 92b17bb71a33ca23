"""Traces of the generator that the eye misses: the mean power spectrum and the autocorrelation of the residual, real beside synthetic.

After Corvi et al. 2023, "Intriguing properties of synthetic images: from generative adversarial networks to diffusion models". Where they take a
learned denoiser for the residual (the picture less its content), a Gaussian blur does here. Both are means over images, so each shard adds up its
own and a large set needs no more memory than a small one.
"""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np

RINGS = 16  # of equal width, from the centre of the spectrum to its edge
LAGS = 16  # pixels each way that the autocorrelation is drawn for


def transforms(image: np.ndarray) -> np.ndarray:
    """uint8 (side, side, 3) -> float64 (2, side, side // 2 + 1): the power of the windowed grey picture, and of its residual."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    residual = grey - cv2.GaussianBlur(grey, (0, 0), 1.0)
    window = np.hanning(len(grey) + 2)[1:-1]  # without it the picture's edges would draw a cross over the spectrum
    pictures = np.stack([(grey - grey.mean()) * np.outer(window, window), residual - residual.mean()])
    return np.abs(np.fft.rfft2(pictures)) ** 2


def radial(power: np.ndarray) -> np.ndarray:
    """Power float64 (side, side // 2 + 1) -> float32 (RINGS,): log10 of the mean power in each ring; its first is the lowest frequency."""
    side = len(power)
    distance = np.hypot(np.minimum(np.arange(side), side - np.arange(side))[:, None], np.arange(power.shape[1])[None]) / (side / 2)
    ring = np.minimum((distance * RINGS).astype(int), RINGS)  # the corners lie beyond the last ring
    sums, counts = (np.bincount(ring.ravel(), weights, RINGS + 1)[:RINGS] for weights in (power.ravel(), None))
    return np.log10(sums / np.maximum(counts, 1) + 1e-3).astype(np.float32)


def autocorrelation(power: np.ndarray) -> np.ndarray:
    """Power of the residual float64 (side, side // 2 + 1) -> float64 (side, side), 1 at the centre (Wiener and Khinchin); zeros for no residual."""
    side = len(power)
    found = np.fft.fftshift(np.fft.irfft2(power, s=(side, side)))
    return found / found[side // 2, side // 2] if found[side // 2, side // 2] > 0 else np.zeros_like(found)


def draw(real: np.ndarray, synthetic: np.ndarray) -> bytes:
    """A PNG of two mean transforms, each float64 (2, side, side // 2 + 1)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, (title, shape) in enumerate((("power spectrum, log10", _whole), ("autocorrelation of the residual", _middle))):
        pictures = [shape(mean[row]) for mean in (real, synthetic)]
        if row:
            pictures = [np.clip(p, -0.1, 0.1) for p in pictures]  # all but the centre are small
        low, high = min(p.min() for p in pictures), max(p.max() for p in pictures)
        for axis, picture, name in zip(axes[row], pictures, ("real", "synthetic"), strict=False):
            shown = axis.imshow(picture, cmap="viridis", vmin=low, vmax=high)
            axis.set_title(f"{title}: {name}", fontsize=9)
            axis.set_axis_off()
        figure.colorbar(shown, ax=axes[row][1], shrink=0.8)
    _curves(axes[0][2], "log10 of the mean power by frequency", "of half the sampling rate", (np.arange(RINGS) + 0.5) / RINGS,
            radial(real[0]), radial(synthetic[0]))
    lines = [autocorrelation(mean[1])[len(mean[1]) // 2] for mean in (real, synthetic)]
    reach = min(LAGS, len(lines[0]) // 2 - 1)
    _curves(axes[1][2], "autocorrelation of the residual, along a row", "pixels", np.arange(reach + 1), *(
        line[len(line) // 2:len(line) // 2 + reach + 1] for line in lines))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
    return file.getvalue()


def _curves(axis: Any, title: str, label: str, x: np.ndarray, real: np.ndarray, synthetic: np.ndarray) -> None:
    axis.plot(x, real, label="real", color="#1b6ca8")
    axis.plot(x, synthetic, label="synthetic", color="#d1495b", linestyle="--")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label)
    axis.legend()


def _whole(power: np.ndarray) -> np.ndarray:
    """The full plane, zero frequency in the middle, log10."""
    side = len(power)
    mirrored = np.roll(power[::-1, ::-1], 1, axis=0)[:, :side - power.shape[1]] if side % 2 else np.roll(power[::-1, ::-1], 1, axis=0)[:, 1:-1]
    return np.log10(np.fft.fftshift(np.concatenate([power, mirrored], 1)) + 1e-3)


def _middle(power: np.ndarray) -> np.ndarray:
    """The autocorrelation of the residual around its centre."""
    found, centre = autocorrelation(power), len(power) // 2
    reach = min(LAGS, centre - 1)
    return found[centre - reach:centre + reach + 1, centre - reach:centre + reach + 1]
