"""From a lesion's parameters to a picture. Skin is a colour; pigment and blood are absorbance on it (Beer-Lambert), so one
lesion looks right on any skin. All textures are smooth random noise, so a picture takes about 9 ms at 192x144.
"""
import math
from collections.abc import Iterable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from skinsynth.data.phantom.lesion import COLOURS, Lesion

Field = NDArray[np.float32]  # (height, width), one value a pixel

SKIN_TONES = np.array([  # RGB at skin = 0, 0.2, ... 1
    (238, 214, 204), (230, 194, 176), (211, 168, 143), (180, 134, 105), (139, 97, 73), (96, 64, 50)], np.float32) / 255


def draw(lesion: Lesion, rng: Generator, height: int, width: int) -> NDArray[np.uint8]:
    """The lesion as RGB, (height, width, 3). What `lesion` leaves open (textures, courses of hairs) comes from `rng`."""
    light = _skin(lesion, rng, height, width)
    r, theta, inside = _outline(lesion, rng, height, width)
    light *= np.exp(-_absorbance(lesion, rng, r, theta, inside))
    light = _blur(np.ascontiguousarray(light.transpose(1, 2, 0)), 0.004 * height)  # the optics
    _draw_hairs(light, lesion, rng)
    _draw_bubbles(light, lesion, rng)
    if lesion.ruler:
        _draw_ruler(light, lesion, rng)
    light *= _illumination(lesion, rng, height, width)[..., None]
    light += 0.008 * rng.standard_normal(light.shape, np.float32)  # the sensor
    return (light.clip(0, 1) * 255).round().astype(np.uint8)


def _noise(rng: Generator, height: int, width: int, cells: float, octaves: int = 1) -> Field:
    """Smooth noise, mean 0 and std about 1, with `cells` bumps over the height; each octave twice as fine and half as strong."""
    total = np.zeros((1, 1), np.float32)
    for octave in range(octaves):
        rows = min(max(int(cells * 2**octave), 1) + 3, height)
        columns = min(max(rows * width // height, 4), width)
        grid = rng.standard_normal((rows, columns), np.float32) * (1.35 * 0.5**octave)
        # Summed on the finest grid, which is small, so that only one resize is of full size.
        total = grid + _resize(total, rows, columns)
    return _resize(total, height, width)


def _resize(field: Field, height: int, width: int) -> Field:
    return np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _blur(image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _band(rng: Generator, height: int, width: int, period: float) -> Field:
    """Noise of one grain size, `period` pixels; mean 0, std about 1."""
    white, sigma = rng.standard_normal((height, width), np.float32), max(period / 5, 0.6)
    return (_blur(white, sigma) - _blur(white, 1.6 * sigma)) * (5.6 * sigma)


def _plane(rgb: Iterable[float]) -> NDArray[np.float32]:
    """(3, 1, 1): a colour that broadcasts over planes, which is several times faster than over (..., 3)."""
    return np.array(tuple(rgb), np.float32).reshape(3, 1, 1)


def _skin(lesion: Lesion, rng: Generator, height: int, width: int) -> NDArray[np.float32]:
    """Skin without the lesion, (3, height, width) in 0..1: tone, blotches, furrows, small vessels."""
    at = lesion.skin * (len(SKIN_TONES) - 1)
    tone = np.array([np.interp(at, range(len(SKIN_TONES)), SKIN_TONES[:, c]) for c in range(3)], np.float32)
    tone *= (1, 1 - 0.2 * lesion.redness, 1 - 0.16 * lesion.redness)
    tone *= (1 + 0.05 * lesion.warmth, 1, 1 - 0.16 * lesion.warmth)
    pixels_per_mm = height / lesion.field
    melanin = 0.022 * _noise(rng, height, width, lesion.field / 4, 3) + 0.022 * _band(rng, height, width, 0.35 * pixels_per_mm)
    blood = 0.018 * _noise(rng, height, width, lesion.field / 3, 3)
    vessels = np.exp(-(_noise(rng, height, width, lesion.field / 1.5, 2) / 0.08) ** 2)  # thin lines where the noise crosses zero
    blood += 0.16 * lesion.redness * vessels * _noise(rng, height, width, 4).clip(0, 1)
    absorbed = melanin * _plane((0.5, 1, 1.5)) + blood * _plane((0.3, 1.3, 1))
    return _plane(tone) * np.exp(-absorbed)


def _outline(lesion: Lesion, rng: Generator, height: int, width: int) -> tuple[Field, Field, Field]:
    """Radius (1 on the outline), angle, and how much of a pixel is lesion (0..1)."""
    radius = lesion.diameter / lesion.field * height / 2
    v, u = np.mgrid[:height, :width].astype(np.float32)
    u, v = u - width / 2 - lesion.x * height, v - height / 2 - lesion.y * height
    cos, sin = math.cos(lesion.angle), math.sin(lesion.angle)
    stretch = math.sqrt(lesion.aspect)  # so that the area does not depend on the aspect
    u, v = (cos * u + sin * v) / radius * stretch, (cos * v - sin * u) / radius / stretch
    cells = 2 * lesion.field / lesion.diameter
    u, v = (c + (0.03 + 0.13 * lesion.irregularity) * _noise(rng, height, width, cells, 3) / 1.6 for c in (u, v))
    theta = np.arctan2(v, u)
    r = np.hypot(u, v) / _rim(lesion, rng, theta)
    softness = (0.2 - 0.16 * lesion.sharpness) * np.exp(0.45 * _noise(rng, height, width, cells / 2))
    patchy = (0.03 + 0.06 * lesion.irregularity) * _noise(rng, height, width, 3 * cells, 2)
    return r, theta, 1 / (1 + np.exp(((r - 1 + patchy) / (0.45 * softness)).clip(-30, 30)))


def _rim(lesion: Lesion, rng: Generator, theta: Field) -> Field:
    """The outline's radius at each angle: few lobes make asymmetry, many notches make irregularity."""
    angles = np.linspace(-math.pi, math.pi, 256, dtype=np.float32)
    rim = np.ones_like(angles)
    for k, amplitude in ((1, 0.16), (2, 0.06), (3, 0.15)):
        rim += lesion.asymmetry * amplitude * np.cos(k * angles + rng.uniform(0, 2 * math.pi))
    for _ in range(2):  # a lobe that sticks out or is missing on one side
        distance = (angles - rng.uniform(-math.pi, math.pi) + math.pi) % (2 * math.pi) - math.pi
        rim += lesion.asymmetry * rng.choice((-0.3, 0.3)) * np.exp(-(distance / rng.uniform(0.3, 0.6)) ** 2)
    for k in range(4, 15):
        rim += lesion.irregularity * 0.11 / math.sqrt(k) * rng.normal() * np.cos(k * angles + rng.uniform(0, 2 * math.pi))
    rim = rim.clip(0.4, 1.9) / np.sqrt(np.mean(rim.clip(0.4, 1.9) ** 2))  # the area stays that of the diameter
    return np.interp(theta, angles, rim).astype(np.float32)


def _absorbance(lesion: Lesion, rng: Generator, r: Field, theta: Field, inside: Field) -> NDArray[np.float32]:
    """-log of the light that the lesion lets through, (3, height, width)."""
    height, width = r.shape
    cells = 2 * lesion.field / lesion.diameter
    fall = rng.uniform(0.1, 0.9)  # how much paler the rim is than the middle
    body = 1 + 0.16 * _noise(rng, height, width, 1.5 * cells, 3) - fall * (r - 0.5).clip(-0.5, 0.8)
    ground, *others = (-np.log(_plane(COLOURS[name])) for name in lesion.colours)
    absorbance = np.repeat(ground, height * width).reshape(3, height, width)
    for other in others:
        absorbance += _patch(lesion, rng, r, theta) * (other - absorbance)
    absorbance *= body
    absorbance += _structures(lesion, rng, r, theta) * _plane((0.55, 0.75, 0.8))
    absorbance *= lesion.density * inside
    return absorbance - _streaks(lesion, rng, r, theta) * np.log(_plane(COLOURS["dark brown"]))


def _patch(lesion: Lesion, rng: Generator, r: Field, theta: Field) -> Field:
    """Where another colour lies, 0..1: concentric in a symmetric lesion, to one side in an asymmetric one."""
    height, width = r.shape
    cells = 2 * lesion.field / lesion.diameter
    away, towards = lesion.asymmetry * rng.uniform(0.5, 0.9), rng.uniform(0, 2 * math.pi)
    distance = np.sqrt((r * r + away * away - 2 * r * away * np.cos(theta - towards)).clip(0))
    if away < 0.35 and rng.random() < 0.5:  # a ring instead of a disc
        distance = np.abs(r - rng.uniform(0.6, 0.9)) + 0.2
    size = rng.uniform(0.3, 0.6)
    edge = rng.uniform(0.05, 0.25)
    field = (size - distance + 0.12 * _noise(rng, height, width, 2 * cells, 3)) / edge
    return (0.9 / (1 + np.exp(-field.clip(-30, 30)))).astype(np.float32)


def _structures(lesion: Lesion, rng: Generator, r: Field, theta: Field) -> Field:
    """Extra density of the network and the globules, mean near 0."""
    height, width = r.shape
    period = height / lesion.field * max(0.4, 0.06 * lesion.diameter)
    mesh = np.exp(-(_band(rng, height, width, 1.7 * period) / 0.6) ** 2) - 0.5  # lines where the noise crosses zero
    mesh *= (0.6 + 0.4 * _noise(rng, height, width, lesion.field / lesion.diameter * 3)).clip(0, 1)  # never everywhere alike
    density = 0.75 * lesion.network * mesh + 0.12 * _band(rng, height, width, 2 * period)
    if lesion.globules > 0.3:
        clods, at = np.zeros((height, width), np.uint8), np.argwhere(r < 1.05)
        for y, x in at[rng.integers(0, len(at), int(20 + 50 * lesion.globules))] if len(at) else ():
            cv2.circle(clods, (int(x) * 16, int(y) * 16), int(16 * period * rng.uniform(0.25, 0.6)), 255, -1, cv2.LINE_AA, 4)
        density += lesion.globules * 0.8 * (_blur(clods.astype(np.float32) / np.float32(255), 0.15 * period) - 0.2)
    return density


def _streaks(lesion: Lesion, rng: Generator, r: Field, theta: Field) -> Field:
    """Radial lines across the border, 0..1."""
    if lesion.streaks < 0.35:
        return np.zeros_like(r)
    angles = np.linspace(-math.pi, math.pi, 512)
    rays = np.interp(angles, np.sort(rng.uniform(-math.pi, math.pi, 48)), rng.normal(size=48), period=2 * math.pi)
    if lesion.asymmetry > 0.4:  # on one side only
        rays = rays - 1.5 * (np.cos(angles - rng.uniform(0, 2 * math.pi)) < 0.2)
    ray = np.interp(theta, angles, rays).astype(np.float32)
    return 0.7 * lesion.streaks * (ray - 0.3).clip(0, 1) * np.exp(-((r - 1.05) / 0.14) ** 2)


def _draw_hairs(light: NDArray[np.float32], lesion: Lesion, rng: Generator) -> None:
    """Curved dark strokes, mostly in one direction."""
    height, width = light.shape[:2]
    main, colour = rng.uniform(0, math.pi), np.array((0.16, 0.11, 0.09)) * rng.uniform(0.6, 2.4)
    mask, t = np.zeros((height, width), np.uint8), np.linspace(0, 1, 16)[:, None]
    for _ in range(lesion.hairs):
        angle, length = main + rng.normal(0, 0.45), rng.uniform(0.4, 1.4) * height
        start = rng.uniform((-0.2, -0.2), (1.0, 1.0)) * (width, height)
        end = start + length * np.array((math.cos(angle), math.sin(angle)))
        bend = (start + end) / 2 + rng.normal(0, 0.14, 2) * length
        curve = ((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end) * 16
        cv2.polylines(mask, [curve.astype(np.int32)], False, int(rng.integers(170, 256)),
                      max(1, round(height / 144 * rng.uniform(0.4, 1.4))), cv2.LINE_AA, 4)
    if lesion.hairs:
        light += 0.92 * (mask[..., None] / np.float32(255)) * (colour.astype(np.float32) - light)


def _draw_bubbles(light: NDArray[np.float32], lesion: Lesion, rng: Generator) -> None:
    """Gel bubbles: a thin dark ring with a bright spot."""
    height, width = light.shape[:2]
    for _ in range(lesion.bubbles):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), height * rng.uniform(0.01, 0.05)
        centre, line = (int(x * 16), int(y * 16)), max(1, height // 140)
        cv2.circle(light, centre, int(16 * radius), tuple(0.75 * light[int(y), int(x)].astype(float)), line, cv2.LINE_AA, 4)
        shine = (int((x - 0.4 * radius) * 16), int((y - 0.4 * radius) * 16))
        cv2.circle(light, shine, int(16 * max(0.25 * radius, 0.6)), (0.97, 0.97, 0.98), -1, cv2.LINE_AA, 4)


def _draw_ruler(light: NDArray[np.float32], lesion: Lesion, rng: Generator) -> None:
    """Ten millimetres along the lower edge, true to `field`."""
    height, width = light.shape[:2]
    step, y, x = height / lesion.field, 0.94 * height, width * rng.uniform(0.05, 0.25)
    ink = tuple(0.35 * light.mean((0, 1)).astype(float))
    for tick in range(11):
        at, length = int((x + tick * step) * 16), height * (0.05 if tick % 5 == 0 else 0.025)
        cv2.line(light, (at, int(y * 16)), (at, int((y - length) * 16)), ink, 1, cv2.LINE_AA, 4)
    cv2.line(light, (int(x * 16), int(y * 16)), (int((x + 10 * step) * 16), int(y * 16)), ink, 1, cv2.LINE_AA, 4)


def _illumination(lesion: Lesion, rng: Generator, height: int, width: int) -> Field:
    """Brightness: slope, falling off to the corners, and the dark surround of a round view."""
    v, u = np.mgrid[:height, :width].astype(np.float32)
    u, v = (u - width / 2) / height, (v - height / 2) / height
    direction = rng.uniform(0, 2 * math.pi)
    slope = 0.2 * lesion.shade * (math.cos(direction) * u + math.sin(direction) * v)
    light = 1 + slope - 0.22 * lesion.shade * (u * u + v * v)
    if lesion.vignette > 0:
        radius = math.hypot(width / height, 1) / 2 * (1.02 - 0.36 * lesion.vignette)
        light *= 1 / (1 + np.exp(((np.hypot(u, v) - radius) / rng.uniform(0.006, 0.03)).clip(-30, 30)))
    return light
