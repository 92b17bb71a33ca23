"""Lesion box, hair removal and the square picture, on drawn and on real images."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.data import lesion
from skinsynth.data.images import read_image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "isic"
SKIN, MOLE = (222, 176, 152), (105, 62, 45)


def skin(height: int = 240, width: int = 320, centre: tuple[int, int] = (160, 120), axes: tuple[int, int] = (40, 28)) -> np.ndarray:
    """Noisy skin with one dark ellipse; uint8 (height, width, 3)."""
    image = np.full((height, width, 3), SKIN, np.uint8)
    cv2.ellipse(image, centre, axes, 20, 0, 360, MOLE, -1, cv2.LINE_AA)
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 1.5) + noise, 0, 255).astype(np.uint8)


def middle(box: tuple[int, int, int]) -> tuple[float, float]:
    return box[0] + box[2] / 2, box[1] + box[2] / 2


@pytest.mark.parametrize("centre", [(160, 120), (100, 90), (230, 150)])
def test_the_box_is_centred_on_the_lesion_with_a_margin(centre: tuple[int, int]) -> None:
    box = lesion.lesion_box(skin(centre=centre))
    assert np.allclose(middle(box), centre, atol=5)
    assert 80 * 1.2 < box[2] < 80 * 1.6


def test_the_box_scales_with_the_image() -> None:
    image = skin(centre=(110, 100))
    large = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    assert np.allclose(np.array(lesion.lesion_box(large)) / 4, lesion.lesion_box(image), atol=5)


def test_a_lesion_at_the_edge_still_gives_a_square_inside_the_image() -> None:
    x, y, side = lesion.lesion_box(skin(centre=(260, 52), axes=(36, 30)))
    assert y == 0
    assert x + side <= 320
    assert side < 120
    x, y, side = lesion.lesion_box(skin(centre=(260, 60), axes=(80, 60)))
    assert x + side == 320
    assert y == 0
    assert 150 < side <= 240


def test_vignette_and_stickers_do_not_count_as_lesion() -> None:
    plain = lesion.lesion_box(skin())
    y, x = np.mgrid[:240, :320]
    dark, blue, white = skin(), skin(), skin()
    dark[np.hypot(x - 160, y - 120) > 150] = 8
    cv2.circle(blue, (310, 40), 70, (20, 120, 190), -1)
    cv2.circle(white, (10, 220), 60, (250, 250, 250), -1)
    for image in (dark, blue, white):
        assert np.allclose(lesion.lesion_box(image), plain, atol=8)


def test_without_a_lesion_the_centre_square_is_taken() -> None:
    assert lesion.lesion_box(np.full((200, 300, 3), SKIN, np.uint8)) == (50, 0, 200)
    assert lesion.lesion_box(np.zeros((200, 300, 3), np.uint8)) == (50, 0, 200)
    assert lesion.lesion_box(skin(axes=(0, 0), centre=(-9, -9))) == (40, 0, 240)  # noise alone


def test_hair_goes_and_the_rest_stays() -> None:
    clean = skin()
    hairy, where = clean.copy(), np.zeros(clean.shape[:2], np.uint8)
    for start, end in (((20, 10), (300, 200)), ((10, 150), (310, 60)), ((90, 5), (60, 235))):
        cv2.line(hairy, start, end, (45, 35, 30), 2, cv2.LINE_AA)
        cv2.line(where, start, end, 1, 6)
    done = lesion.remove_hair(hairy)
    on_hair, off_hair = where > 0, cv2.dilate(where, np.ones((5, 5), np.uint8)) == 0

    def error(image: np.ndarray) -> np.ndarray:
        return np.abs(image.astype(float) - clean).mean(axis=2)

    assert error(done)[on_hair].mean() < 0.35 * error(hairy)[on_hair].mean()
    assert (done != hairy).any(axis=2)[off_hair].mean() < 0.005


def test_a_mole_globules_and_a_fur_are_left_alone() -> None:
    mole = skin(axes=(14, 8))
    cobbles = skin(axes=(3, 3))
    for i in range(60, 260, 12):
        for j in range(50, 190, 12):
            cv2.circle(cobbles, (i + j % 5, j), 3, (90, 60, 40), -1, cv2.LINE_AA)
    fur = skin()
    for i in range(-240, 320, 10):
        cv2.line(fur, (i, 0), (i + 240, 240), (40, 30, 30), 2)
    assert lesion.remove_hair(mole) is mole
    assert lesion.remove_hair(cobbles) is cobbles
    assert lesion.hair_mask(fur, 240).mean() > lesion.HAIR_MAX
    assert lesion.remove_hair(fur) is fur


@pytest.mark.parametrize("crop", ["lesion", "centre", "none"])
@pytest.mark.parametrize(("height", "width"), [(240, 320), (700, 520), (16, 16), (20, 300)])
def test_the_square_has_its_size_for_any_image(crop: str, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    for hair in (True, False):
        made = lesion.square(image, 64, crop, hair)
        assert made.shape == (64, 64, 3)
        assert made.dtype == np.uint8


def test_the_crops_differ_as_they_should() -> None:
    image = skin(centre=(90, 80))
    dark = {crop: (lesion.square(image, 64, crop, False).mean(axis=2) < 120) for crop in ("lesion", "centre", "none")}
    assert dark["lesion"][28:36, 28:36].all()
    assert dark["lesion"].mean() > 2 * dark["none"].mean()
    assert not dark["centre"][28:36, 28:36].any()


@pytest.mark.skipif(not (SHARED / "isic2017").is_dir(), reason=f"{SHARED}/isic2017 with real images is not here")
def test_real_lesions_come_to_the_middle() -> None:
    """On real images the middle of the crop is darker than its rim, and more clearly so than without cropping."""
    files = sorted((SHARED / "isic2017" / "images").glob("*.jpg"))[::72]
    assert len(files) >= 25

    def contrast(crop: str) -> np.ndarray:
        made = [lesion.square(read_image(f), 64, crop, True).astype(float).mean(axis=2) for f in files]
        return np.array([np.r_[m[:6].ravel(), m[-6:].ravel()].mean() - m[24:40, 24:40].mean() for m in made])

    cropped = contrast("lesion")
    assert (cropped > 10).mean() > 0.75
    assert np.median(cropped) > np.median(contrast("none")) + 2
