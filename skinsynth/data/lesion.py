"""Dermoscopy image -> square picture of its lesion: hair removed, centred, resized. Classical image processing, no weights.

All lengths scale with the image, so that a 256 px copy and a 4,000 px original are treated alike.
"""

from __future__ import annotations

import cv2
import numpy as np

WORK = 256  # pixels, the longer side at which the lesion is looked for
MARGIN = 1.35  # the box's side over the lesion's longer side
MIN_SIDE = 0.45  # the smallest box, as a share of the image's shorter side: a tiny mole keeps some skin and its sharpness
CONTRAST = 5  # grey levels (0-255) that a lesion is darker than the skin in the mean; less is noise
GREEN = 0.3  # weight of green against blue; ink from a pen is dark in green only
LOOKS = 5  # things at the rim that may be put aside, one after the other, before the lesion is given up
HAIR_WORK = 512  # pixels: hair is removed at this size, or at the wanted one where that is larger
HAIR_CONTRAST = 14  # grey levels (0-255) that a hair is darker than what lies beside it
HAIR_MAX = 0.35  # share of the image; more than that is no hair but texture (pigment network, a hairy cap, ink)


def square(rgb: np.ndarray, size: int, crop: str, hair_removal: bool) -> np.ndarray:
    """Args:
        rgb: uint8 (height, width, 3).
        size: pixels.
        crop: "lesion", "centre" or "none" (the whole image, squeezed into a square).

    Returns:
        uint8 (size, size, 3).
    """
    height, width = rgb.shape[:2]
    if crop != "none":
        x, y, side = lesion_box(rgb) if crop == "lesion" else centre_box(height, width)
        rgb = rgb[y : y + side, x : x + side]
    if hair_removal:
        scale = min(1.0, max(size, HAIR_WORK) / max(rgb.shape[:2]))
        rgb = remove_hair(_shrink(rgb, scale), round(min(height, width) * scale))
    smaller = size <= min(rgb.shape[:2])
    return cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def _shrink(rgb: np.ndarray, scale: float) -> np.ndarray:
    return rgb if scale >= 1 else cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def centre_box(height: int, width: int) -> tuple[int, int, int]:
    """(x, y, side) of the largest square in the middle, in pixels."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def lesion_box(rgb: np.ndarray) -> tuple[int, int, int]:
    """(x, y, side) in pixels of a square round the lesion with some skin, inside the image; the centre square where none is found.

    Otsu's threshold (Otsu 1979) on a smoothed darkness, hair closed, the vignette and coloured stickers left out;
    of the components, the big and central one.
    """
    height, width = rgb.shape[:2]
    scale = min(1.0, WORK / max(height, width))
    mask = lesion_mask(remove_hair(_shrink(rgb, scale)))
    if not mask.any():
        return centre_box(height, width)
    x, y, w, h = (value / scale for value in cv2.boundingRect(mask))
    short = min(height, width)
    side = round(min(short, max(MARGIN * max(w, h), MIN_SIDE * short)))
    left, top = round(x + w / 2 - side / 2), round(y + h / 2 - side / 2)
    return int(np.clip(left, 0, width - side)), int(np.clip(top, 0, height - side)), side


def lesion_mask(rgb: np.ndarray) -> np.ndarray:
    """uint8 (height, width), 1 on the lesion; all 0 where nothing stands out. ``rgb`` should have no hair and about 256 px."""
    short = min(rgb.shape[:2])
    valid, dark = _skin(rgb), _darkness(rgb)
    for _ in range(LOOKS):
        if not valid.any():
            break
        level, _ = cv2.threshold(dark[valid].reshape(-1, 1), 0, 255, cv2.THRESH_OTSU)
        found = cv2.morphologyEx(((dark > level) & valid).astype(np.uint8), cv2.MORPH_OPEN, _disc(0.012 * short))
        found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, _disc(0.02 * short)) * valid
        best = _best_component(found)
        rim = (_edge(best) > 0)[_edge(valid)].mean() if _edge(valid).any() else 0.0
        if rim > 0.6:  # all the skin, and something brighter was split off: a white sticker, glare
            valid &= cv2.erode(best, _disc(0.03 * short)) > 0
        elif rim > 0 and not _middle(best, 1 / 3).any():  # a sticker, ink, shade
            valid &= cv2.dilate(best, _disc(0.03 * short)) == 0
        else:
            rest = valid & (best == 0)
            stands_out = best.any() and rest.any() and dark[best > 0].mean() - dark[rest].mean() > CONTRAST
            return best if stands_out else np.zeros_like(best)
    return np.zeros(rgb.shape[:2], np.uint8)


def _edge(values: np.ndarray) -> np.ndarray:
    """The values along the edge of the image."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _middle(values: np.ndarray, share: float) -> np.ndarray:
    """The central part, that share of each side."""
    (top, bottom), (left, right) = ((round(n * (1 - share) / 2), round(n * (1 + share) / 2)) for n in values.shape)
    return values[top:bottom, left:right]


def _darkness(rgb: np.ndarray) -> np.ndarray:
    """uint8 (height, width): how dark in green and blue, where melanin and blood absorb; thin dark hair is closed first."""
    short = min(rgb.shape[:2])
    grey = cv2.addWeighted(rgb[:, :, 1], GREEN, rgb[:, :, 2], 1 - GREEN, 0)
    grey = cv2.morphologyEx(grey, cv2.MORPH_CLOSE, _disc(0.0175 * short))
    return 255 - cv2.GaussianBlur(grey, (0, 0), 0.012 * short + 0.5)


def _skin(rgb: np.ndarray) -> np.ndarray:
    """bool (height, width): neither the black round the lens nor a blue or green sticker (both touch the edge), nor violet
    ink off the middle (in the middle it may be a blue nevus)."""
    hue, saturation, _ = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    red, green, blue = cv2.split(rgb.astype(np.int16))
    black, sticker = rgb.max(axis=2) < 70, (hue > 40) & (hue < 125) & (saturation > 90)
    ink = (blue - red > 12) & (red - green > 12)
    out = np.zeros(rgb.shape[:2], np.uint8)
    for mask, at_edge in ((black, True), (sticker, True), (ink, False)):
        if not mask.any():
            continue
        count, labels = cv2.connectedComponents(mask.astype(np.uint8))
        chosen = np.full(count, not at_edge, np.uint8)
        chosen[_edge(labels) if at_edge else _middle(labels, 0.2)] = at_edge
        chosen[0] = 0
        if (found := chosen[labels]).mean() < 0.5:  # else the whole picture is dark, or has a blue cast
            out |= found
    return cv2.dilate(out, _disc(0.03 * min(out.shape))) == 0


def _best_component(found: np.ndarray) -> np.ndarray:
    """The component with the most area near the middle; none where all are specks."""
    height, width = found.shape
    count, labels, stats, _ = cv2.connectedComponentsWithStats(found)
    x, y = (np.exp(-(((np.arange(n) - n / 2) / (0.3 * n)) ** 2)) for n in (width, height))
    near = np.outer(y, x)
    weight = np.bincount(labels.ravel(), weights=near.ravel(), minlength=count)
    weight[0] = 0
    best = int(np.argmax(weight))
    if best == 0 or stats[best, cv2.CC_STAT_AREA] < 0.002 * found.size:
        return np.zeros_like(found)
    return (labels == best).astype(np.uint8)


def _disc(radius: float) -> np.ndarray:
    r = max(1, round(radius))
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1))


def remove_hair(rgb: np.ndarray, span: int | None = None) -> np.ndarray:
    """Paints over dark hair, after DullRazor (Lee et al. 1997): black-hat along lines of several directions, thin long shapes
    kept, inpainted from the sides (Telea 2004).

    Args:
        rgb: uint8 (height, width, 3).
        span: the shorter side in pixels that the whole image would have at this scale, where ``rgb`` is a part of it.

    Returns:
        uint8 of the same shape; ``rgb`` itself where there is no hair, or so much that it can be none.
    """
    span = span or min(rgb.shape[:2])
    mask = hair_mask(rgb, span)
    share = mask.mean()
    if share == 0 or share > HAIR_MAX:
        return rgb
    return cv2.inpaint(rgb, mask, max(2, round(0.012 * span)), cv2.INPAINT_TELEA)


def hair_mask(rgb: np.ndarray, span: int) -> np.ndarray:
    """uint8 (height, width), 1 on hair and one pixel round it.

    A pixel is hair where it is darker than its sides and lies on a straight run that the meshes of a pigment network are
    too short for; and the whole thing is long and thin.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    across = max(5, round(0.03 * span) | 1)
    hat = np.max([cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, _line(across, angle)) for angle in range(0, 180, 30)], axis=0)
    thin = (hat > HAIR_CONTRAST).astype(np.uint8)
    along = max(7, round(0.075 * span) | 1)
    runs = np.max([cv2.morphologyEx(thin, cv2.MORPH_OPEN, _line(along, angle)) for angle in range(0, 180, 15)], axis=0)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(runs, connectivity=8)
    keep = np.zeros(count, np.uint8)
    for i in range(1, count):
        extent = float(np.hypot(stats[i, cv2.CC_STAT_WIDTH], stats[i, cv2.CC_STAT_HEIGHT]))
        keep[i] = extent > 0.1 * span and _width(labels, i, stats[i]) < min(0.018 * span + 1, extent / 6)
    near = cv2.dilate(keep[labels], np.ones((3, 3), np.uint8))
    return cv2.dilate(near & thin, np.ones((3, 3), np.uint8))


def _width(labels: np.ndarray, i: int, stat: np.ndarray) -> float:
    """Mean width in pixels: twice the area over the length of the outline, holes included."""
    x, y, w, h = stat[:4]
    part = (labels[y : y + h, x : x + w] == i).astype(np.uint8)
    outlines, _ = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return 2 * int(stat[4]) / max(1.0, sum(cv2.arcLength(o, True) for o in outlines))


def _line(length: int, angle: int) -> np.ndarray:
    kernel = np.zeros((length, length), np.uint8)
    middle = length // 2
    dx, dy = np.cos(np.radians(angle)) * middle, np.sin(np.radians(angle)) * middle
    cv2.line(kernel, (round(middle - dx), round(middle - dy)), (round(middle + dx), round(middle + dy)), 1)
    return kernel
