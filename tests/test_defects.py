"""defects: what is damaged on purpose lies beyond the limits that real or drawn images set, and those themselves hardly do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.knobs import Screen
from skinsynth.quality import defects


def blurred(x: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(x, (0, 0), 4)


def framed(x: np.ndarray) -> np.ndarray:
    found = np.zeros_like(x)
    cv2.circle(mask := np.zeros(x.shape[:2], np.uint8), (len(x) // 2, len(x) // 2), round(0.42 * len(x)), 1, -1)
    return np.where(mask[..., None] > 0, x, found)


def clipped(x: np.ndarray) -> np.ndarray:
    return np.clip((x.astype(float) - 128) * 8 + 128, 0, 255).astype(np.uint8)


def garish(x: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.maximum(hsv[..., 1], 235)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def faint(x: np.ndarray) -> np.ndarray:
    return (120 + (x.astype(float) - x.mean()) * 0.02).astype(np.uint8)


DAMAGE = {"blank": faint, "blur": blurred, "frame": framed, "clipped": clipped, "saturated": garish}


def measures(images: np.ndarray) -> np.ndarray:
    return np.stack([defects.measure(image) for image in images])


@pytest.fixture(scope="module")
def isic(real: Path) -> np.ndarray:
    files = sorted((real / "isic2017/images").glob("*.jpg"))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:1400]]
    return np.stack([cv2.resize(cv2.imread(str(f)), (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1] for f in files])


@pytest.mark.real
def test_real_held_out_images_are_hardly_ever_set_aside_and_damaged_ones_are(isic: np.ndarray) -> None:
    limits = defects.Limits.of(measures(isic[:900]), Screen())
    held_out = limits.beyond(measures(isic[900:]))
    assert held_out.keys() == DAMAGE.keys()
    assert {reason: float(found.mean()) for reason, found in held_out.items() if found.mean() > 0.0125} == {}
    for reason, damage in DAMAGE.items():
        damaged = measures(np.stack([damage(x) for x in isic[900:1000]]))
        assert limits.beyond(damaged)[reason].mean() >= {"blur": 0.6, "frame": 0.3}.get(reason, 0.9), reason


def test_measures_by_hand() -> None:
    image = np.full((20, 20, 3), 100, np.uint8)
    image[:2] = 0  # the ring is two pixels wide: 144 of its pixels, of which the 40 of these rows are dark
    image[10, 10] = (255, 100, 100)
    std, sharp, frame, ends, saturation = defects.measure(image)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert std == pytest.approx(grey.std(), rel=1e-5)
    assert frame == pytest.approx(40 / 144)
    assert ends == pytest.approx(41 / 400)
    assert saturation == pytest.approx(155 / 255 * 255 / 400, rel=0.01)
    assert np.exp(sharp) == pytest.approx(cv2.Laplacian(grey.astype(np.float32), cv2.CV_32F).var() + 1e-3, rel=1e-4)


def test_a_limit_is_the_quantile_and_wider_where_there_are_too_few_images() -> None:
    many = np.zeros((1001, 5), np.float32)
    many[:, 1] = many[:, 4] = np.arange(1001)
    found = defects.Limits.of(many, Screen(blur=0.01, saturation=0.01)).values
    assert (found["blur"], found["saturated"]) == (10, 990)
    few = defects.Limits.of(many[::100], Screen(blur=0.01, saturation=0.01)).values
    assert few["blur"] == pytest.approx(10 - defects.MARGIN * 490, abs=0.01)
    assert few["saturated"] == pytest.approx(990 + defects.MARGIN * 490, abs=0.01)


def test_no_frames_among_the_real_images_make_no_limit_of_zero_and_none_is_off() -> None:
    found = defects.Limits.of(np.zeros((50, 5), np.float32), Screen(blur=None, saturation=None)).values
    assert found == {"blank": 5.0, "frame": 0.1, "clipped": 0.1}
    assert not defects.Limits(found).beyond(np.array([[9, 0, 0.1, 0.1, 255]], np.float32))["frame"].any()


@pytest.mark.parametrize("damage", [blurred, framed, clipped, garish, faint])
def test_damage_moves_its_own_measure(damage: Callable[[np.ndarray], np.ndarray], drawn: Path) -> None:
    picture = next(x for path in sorted((drawn / "images").glob("*.jpg")) if (x := cv2.imread(str(path))) is not None)
    before = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1].copy()
    reason = next(name for name, how in DAMAGE.items() if how is damage)
    own = defects.MEASURES.index(defects.REASONS[reason])
    change = defects.measure(damage(before))[own] - defects.measure(before)[own]
    assert (change < -1) if reason in ("blank", "blur") else (change > 0.1)
