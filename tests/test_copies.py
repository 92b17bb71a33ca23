"""copies: planted copies are found and other real images are left alone, on drawn lesions and on real ones."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.data.codec import decode, encode_jpeg
from skinsynth.errors import UserError
from skinsynth.knobs import Screen
from skinsynth.quality import copies


def load(files: list[Path], side: int = 64) -> np.ndarray:
    return np.stack([cv2.resize(cv2.imread(str(f)), (side, side), interpolation=cv2.INTER_AREA)[..., ::-1] for f in files])


def thumbs(images: np.ndarray) -> np.ndarray:
    return np.stack([copies.thumbnail(image) for image in images])


def crop(image: np.ndarray) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(image[3:, 3:]), (len(image), len(image)))


DISGUISES = {"none": lambda x: x, "mirror": lambda x: x[:, ::-1], "turn": lambda x: np.rot90(x), "jpeg": lambda x: decode(encode_jpeg(x, 50)),
             "tint": lambda x: np.clip(x * np.array([1.05, 0.97, 1.0]) + 6, 0, 255).astype(np.uint8), "crop": crop,
             "blur": lambda x: cv2.GaussianBlur(x, (0, 0), 1.0), "all": lambda x: copies.plant(x, 5)}


@pytest.fixture(scope="module")
def isic(real: Path) -> np.ndarray:
    """900 real images at 64 pixels in random order, exact duplicates left out."""
    images = load(sorted((real / "isic2017/images").glob("*.jpg"))[:900])
    first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1]
    return images[np.random.default_rng(0).permutation(first)]


@pytest.mark.real
def test_real_planted_copies_are_found_and_other_images_are_not(isic: np.ndarray) -> None:
    train, val, test = isic[:500], isic[500:700], isic[700:]
    gallery = copies.Gallery(thumbs(train))
    limit = copies.limit(gallery.search(thumbs(val), 2), Screen())
    assert gallery.search(thumbs(test), 2).copies(limit).mean() < 0.03
    for name, disguise in DISGUISES.items():
        found = gallery.search(thumbs(np.stack([np.ascontiguousarray(disguise(x)) for x in train[:40]])), 2)
        hit = found.copies(limit) & (found.index == np.arange(40))
        assert hit.mean() >= 0.9, f"{name}: {hit.mean():.2f} of the copies found at {limit}"


def test_drawn_planted_copies_are_found_and_attributed(drawn: Path) -> None:
    with open(drawn / "duplicates.csv") as f:
        doubled = {name for row in csv.reader(f) for name in row[1:]}
    with open(drawn / "metadata.csv") as f:
        lesions = {row["lesion_id"] or row["image_name"]: row["image_name"] for row in csv.DictReader(f) if row["image_name"] not in doubled}
    files = [drawn / "images" / f"{name}.jpg" for name in sorted(lesions.values())]
    images = load([f for f in files if cv2.imread(str(f)) is not None])
    gallery = copies.Gallery(thumbs(images[:70]))
    limit = copies.limit(gallery.search(thumbs(images[70:95])), Screen(copy_quantile=1.0))
    found = gallery.search(thumbs(np.stack([copies.plant(x, i) for i, x in enumerate(images[:40])])))
    assert (found.copies(limit) & (found.index == np.arange(40))).mean() >= 0.85
    assert gallery.search(thumbs(images[95:])).copies(limit).mean() <= 0.2


def test_the_result_depends_neither_on_threads_nor_on_company(drawn: Path) -> None:
    t = thumbs(load(sorted((drawn / "images").glob("*.jpg"))[:60]))
    gallery = copies.Gallery(t[:30])
    one, two = gallery.search(t[30:], 1), gallery.search(t[30:], 2)
    alone = [gallery.search(t[i:i + 1]) for i in range(30, 60)]
    for name in ("index", "similarity", "nearness"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
        assert np.array_equal(getattr(one, name), np.concatenate([getattr(a, name) for a in alone]))


def test_duplicates_in_training_do_not_hide_a_copy(drawn: Path) -> None:
    t = thumbs(load(sorted((drawn / "images").glob("*.jpg"))[:40]))
    gallery = copies.Gallery(np.concatenate([t[:30], t[:1], t[:1], t[:1], t[:1], t[:1]]))
    assert gallery.search(t[:1]).copies(1.0).all()


def test_other_photographs_of_the_lesion_do_not_hide_a_copy(drawn: Path) -> None:
    """Five of them among the training images, each with its own crop and light: as near to the copy as its original, all but."""
    images = load(sorted((drawn / "images").glob("*.jpg"))[:50])
    t, found = thumbs(images), []
    for i in range(12):
        views = thumbs(np.stack([copies.plant(copies.plant(images[i], n, "crop"), n, "colour") for n in range(5)]))
        groups = [*map(str, range(40)), *[str(i)] * 5]
        gallery = copies.Gallery(np.concatenate([t[:40], views]), groups)
        found.append(gallery.search(thumbs(copies.plant(images[i], 7 * i + 3)[None])).nearness[0])
    assert np.mean(np.array(found) > Screen().copy_most) >= 0.9
    strangers = copies.Gallery(t[:40], [*map(str, range(40))]).search(t[40:])
    assert np.array_equal(strangers.nearness, copies.Gallery(t[:40]).search(t[40:]).nearness), "groups of one change nothing"


def blurred(rng: np.random.Generator, sigma: float) -> np.ndarray:
    picture = cv2.GaussianBlur(rng.normal(size=(64, 64, 3)).astype(np.float32), (0, 0), sigma)
    return picture / picture.std()


def test_a_new_picture_of_a_patient_with_many_images_is_no_copy() -> None:
    """A picture that has a patient's skin and its own detail is judged by other patients', also where the nearest ten are all this patient's."""
    nearness = {}
    for images in (3, 16):
        rng = np.random.default_rng(0)
        skins = [128 + 40 * blurred(rng, 10) + 27 * blurred(rng, 2.5) for _ in range(30)]
        pictures = [np.clip(skin + 18 * blurred(rng, 2), 0, 255).astype(np.uint8) for skin in skins for _ in range(images + 1)]
        patients = [str(number // (images + 1)) for number in range(len(pictures))]
        t, new = thumbs(np.stack(pictures)), np.arange(len(pictures)) % (images + 1) == 0
        gallery = copies.Gallery(t[~new], [patient for patient, is_new in zip(patients, new, strict=True) if not is_new])
        nearness[images] = gallery.search(t[new]).nearness
    assert nearness[16].mean() == pytest.approx(nearness[3].mean(), abs=0.06)
    assert (nearness[16] > Screen().copy_most).mean() < 0.05


def test_a_handful_of_training_images_is_enough_and_none_is_refused(drawn: Path) -> None:
    t = thumbs(load(sorted((drawn / "images").glob("*.jpg"))[:5]))
    got = copies.Gallery(t[:2]).search(t[1:2])
    assert (got.index[0], got.similarity[0], got.nearness[0]) == (1, 1.0, 1.0)
    with pytest.raises(UserError, match="no training images"):
        copies.Gallery(t[:0])
    with pytest.raises(UserError, match="no held-out images"):
        copies.limit(copies.Gallery(t).search(t[:0]), Screen())


def test_a_flat_picture_resembles_nothing(drawn: Path) -> None:
    t = thumbs(load(sorted((drawn / "images").glob("*.jpg"))[:20]))
    got = copies.Gallery(t).search(np.full((1, 32, 32, 3), 128, np.uint8))
    assert np.isfinite(got.nearness).all()
    assert not got.copies(0.9).any()


def test_turns_are_eight_different_ones() -> None:
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3)
    assert len({t.tobytes() for t in copies.turns(image)}) == 8


def test_the_blocked_search_finds_the_candidates_of_the_loop(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks, since the products are of whole numbers; the loop is the definition."""
    monkeypatch.setattr(copies, "POOL", 10)
    t = thumbs(load(sorted((drawn / "images").glob("*.jpg"))[:60]))
    gallery, queries = copies.coarse(t[:45]), copies.coarse(t[40:])
    expected = []
    for query in queries.astype(float):
        poses = [turned[0] for turned in copies.turns(query[None])]
        likeness = np.array([[(pose * image).sum() / max(np.linalg.norm(image), 1) for pose in poses] for image in gallery.astype(float)])
        expected.append(np.argsort(-likeness.max(1), kind="stable")[:copies.POOL].tolist())
    for rows in (4096, 13, 10, 1):
        monkeypatch.setattr(copies, "ROWS", rows)
        index, pose = copies.candidates(queries, gallery)
        assert index.tolist() == expected
        assert pose[0, 0] == 0, "the picture itself, as it is"


def test_each_disguise_changes_the_picture_in_its_own_way(drawn: Path) -> None:
    image = load(sorted((drawn / "images").glob("*.jpg"))[:1])[0]
    changed = {kind: copies.plant(image, 3, kind) for kind in (*copies.DISGUISES, "all")}
    assert all(x.shape == image.shape and x.dtype == np.uint8 and not np.array_equal(x, image) for x in changed.values())
    assert any(np.array_equal(changed["flip"], turned[0]) for turned in copies.turns(image[None]))
    assert len({x.tobytes() for x in changed.values()}) == 5
    assert np.array_equal(copies.plant(image, 3), changed["all"])


@pytest.mark.parametrize(("quantile", "least", "most", "wanted"), [(0.5, 0, 1, 0.5), (0.5, 0.6, 0.75, 0.6), (1.0, 0.6, 0.75, 0.75), (0.9, 0, 1, 0.9)])
def test_the_limit_is_the_quantile_within_what_is_configured(quantile: float, least: float, most: float, wanted: float) -> None:
    held_out = copies.Matches(np.zeros(101, int), np.zeros(101), np.linspace(0, 1, 101))
    assert copies.limit(held_out, Screen(copy_quantile=quantile, copy_least=least, copy_most=most)) == pytest.approx(wanted)
