"""spectrum: known pictures have the spectra and correlations that theory gives them, and a planted trace shows."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from skinsynth.quality import spectrum


def wave(side: int, frequency: int, axis: int = 1) -> np.ndarray:
    line = 128 + 100 * np.sin(2 * np.pi * frequency * np.arange(side) / side)
    grey = np.broadcast_to(line if axis else line[:, None], (side, side))
    return np.repeat(np.round(grey)[..., None], 3, 2).astype(np.uint8)


def noise(side: int, seed: int) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).integers(0, 256, (side, side, 1)), 3, 2).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_wave_is_a_peak_at_its_frequency(axis: int) -> None:
    power = spectrum.transforms(wave(64, 20, axis))[0]
    assert np.unravel_index(power.argmax(), power.shape) in ((0, 20), (20, 0), (44, 0))
    assert spectrum.radial(power).argmax() == 20 / 32 * spectrum.RINGS


def test_white_noise_is_flat_and_a_slope_is_a_slope() -> None:
    mean = np.mean([spectrum.transforms(noise(64, seed)) for seed in range(40)], 0)
    rings = spectrum.radial(mean[0])
    assert np.ptp(rings[2:]) < 0.1
    soft = spectrum.radial(spectrum.transforms(cv2.GaussianBlur(noise(64, 0), (0, 0), 2))[0])
    assert soft[1] - soft[-1] > 2


@pytest.mark.parametrize("side", [32, 33])
def test_the_residuals_autocorrelation_is_that_of_the_definition(side: int) -> None:
    image = noise(side, 3)
    found = spectrum.autocorrelation(spectrum.transforms(image)[1])
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
    residual = grey - cv2.GaussianBlur(grey, (0, 0), 1.0)
    residual -= residual.mean()
    for down, right in ((0, 0), (0, 1), (2, 3), (-1, 4)):
        expected = (residual * np.roll(residual, (-down, -right), (0, 1))).sum() / (residual**2).sum()
        assert found[side // 2 + down, side // 2 + right] == pytest.approx(expected, abs=1e-9)


def test_a_grid_of_four_pixels_shows_at_lag_four() -> None:
    """As upsampling leaves one, which is what Corvi et al. look for."""
    total = np.zeros((2, 64, 33))
    for seed in range(20):
        image = noise(64, seed).astype(int) // 8 + 100
        image[::4, ::4] += 40
        total += spectrum.transforms(image.astype(np.uint8))
    line = spectrum.autocorrelation(total[1])[32, 32:48]
    assert min(line[4], line[8], line[12]) > max(0.2, *line[[5, 6, 7]])


@pytest.mark.parametrize("side", [16, 17, 64])
def test_the_whole_plane_is_that_of_the_full_transform(side: int) -> None:
    x = np.random.default_rng(0).normal(size=(side, side))
    full = np.log10(np.fft.fftshift(np.abs(np.fft.fft2(x)) ** 2) + 1e-3)
    assert np.allclose(spectrum._whole(np.abs(np.fft.rfft2(x)) ** 2), full)


def test_the_picture_is_a_png_and_the_same_twice_also_of_nothing() -> None:
    real, none = spectrum.transforms(noise(16, 0)), np.zeros((2, 16, 9))
    once, again = spectrum.draw(real, none), spectrum.draw(real, none)
    assert once == again
    shown = cv2.imdecode(np.frombuffer(once, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[0] > 400
    assert shown.shape[1] > 700
