"""A folder of drawn lesions in the layout of an ISIC download, with the flaws of one: exact duplicates under other ids
(some under another patient), near duplicates, patients with several lesions, missing fields.

    images/ISIC_0012345.jpg   metadata.csv   the columns of SIIM-ISIC 2020, written last
    duplicates.csv            the near duplicates, as ISIC 2020 lists them; exact ones are to be found by their bytes
    truth.csv                 every parameter that was drawn, and the log likelihood ratio of malignant to benign
    request.json              the arguments: the same request again does nothing, another one is refused
"""
import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from skinsynth.data.phantom.draw import draw
from skinsynth.data.phantom.lesion import Lesion, log_likelihood_ratio, sample_lesion

SITES = ("torso", "lower extremity", "upper extremity", "head/neck", "palms/soles", "oral/genital")
SITE_WEIGHTS = (0.51, 0.25, 0.16, 0.06, 0.01, 0.01)  # as in ISIC 2020
BENIGN = {"nevus": 0.72, "seborrheic keratosis": 0.13, "unknown": 0.15}
COLUMNS = ("image_name", "patient_id", "lesion_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis",
           "benign_malignant", "target")
EXACT, NEAR, MISSING = 0.02, 0.03, 0.03  # shares of the images; of the values of each column that may be empty


@dataclass(frozen=True)
class Picture:
    """One row: its metadata, what to draw, and of which other picture (by index) it is an exact or a near copy."""
    row: dict[str, str]
    lesion: Lesion
    copy_of: int | None = None
    exact: bool = False


def write_dataset(folder: Path, images: int, malignant: float = 0.25, seed: int = 0, height: int = 144, width: int = 192) -> None:
    """Draws `images` pictures, copies included, of which the share `malignant` is; the same bytes for the same arguments."""
    if images < 1 or not 0 <= malignant <= 1 or min(height, width) < 16:
        raise ValueError(f"images={images} must be >= 1, malignant={malignant} in 0..1, height={height} and width={width} >= 16")
    request = {"images": images, "malignant": malignant, "seed": seed, "height": height, "width": width, "version": 1}
    if _is_done(folder, request):
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write(folder / "request.json", json.dumps(request).encode())
    pictures = _plan(np.random.default_rng(seed), images, malignant)
    for index in range(images):
        _write(folder / "images" / f"{pictures[index].row['image_name']}.jpg", _jpeg(pictures, index, seed, height, width))
    names = [picture.row["image_name"] for picture in pictures]
    near = [{"image_name_1": names[p.copy_of], "image_name_2": p.row["image_name"]}
            for p in pictures if p.copy_of is not None and not p.exact]
    _write_csv(folder / "duplicates.csv", ("image_name_1", "image_name_2"), near)
    truth = [_truth(picture, names) for picture in pictures]
    _write_csv(folder / "truth.csv", tuple(truth[0]), truth)
    os.sync()  # once for all, since once a file costs more than the drawing; then metadata.csv vouches for the rest
    _write_csv(folder / "metadata.csv", COLUMNS, [picture.row for picture in pictures])


def _is_done(folder: Path, request: dict[str, Any]) -> bool:
    path = folder / "request.json"
    if not path.exists():
        if (folder / "metadata.csv").exists():
            raise FileExistsError(f"{folder / 'metadata.csv'} was not drawn by phantom: choose another folder")
        return False
    before = json.loads(path.read_text())
    if before != request:
        raise FileExistsError(f"{folder} holds drawings of another request, {before} instead of {request}: "
                              "choose another folder or remove this one")
    return (folder / "metadata.csv").exists()


def _plan(rng: Generator, images: int, malignant: float) -> list[Picture]:
    """Who has which lesion, and which pictures are copies; nothing is drawn yet."""
    names = iter(rng.permutation(rng.choice(9_999_999, images, replace=False)).tolist())
    exact, near = round(EXACT * images), round(NEAR * images)
    originals = max(images - exact - near, 1)
    targets = (rng.permutation(originals) < round(malignant * originals)).astype(int).tolist()
    pictures: list[Picture] = []
    while len(pictures) < originals:
        group = targets[len(pictures):len(pictures) + int(rng.choice(4, p=(0.45, 0.25, 0.18, 0.12))) + 1]
        pictures += _patient(rng, group, names)
    for number in range(images - originals):
        origin = int(rng.integers(originals))
        row = pictures[origin].row | {"image_name": f"ISIC_{next(names):07d}"}
        if number < exact and number % 2:  # every other exact copy stands under a patient and lesion of its own
            row |= {"patient_id": _new_id(rng, "IP"), "lesion_id": _new_id(rng, "IL")}
        pictures.append(Picture(row, pictures[origin].lesion, origin, exact=number < exact))
    return [replace(picture, row=_with_gaps(rng, picture.row)) for picture in pictures]


def _patient(rng: Generator, targets: list[int], names: Iterator[int]) -> list[Picture]:
    """The lesions of one patient: one skin, one sex, one age."""
    patient, sex = _new_id(rng, "IP"), str(rng.choice(("female", "male")))
    age = str(int(np.clip(round(rng.normal(50, 15) / 5) * 5, 10, 90)))
    skin, redness = rng.beta(1.1, 2.4), rng.beta(1.3, 2)
    pictures = []
    for target in targets:
        lesion = replace(sample_lesion(rng, target), skin=skin, redness=redness)
        diagnosis = "melanoma" if target else str(rng.choice(list(BENIGN), p=list(BENIGN.values())))
        values = (f"ISIC_{next(names):07d}", patient, _new_id(rng, "IL"), sex, age, str(rng.choice(SITES, p=SITE_WEIGHTS)),
                  diagnosis, "malignant" if target else "benign", str(target))
        pictures.append(Picture(dict(zip(COLUMNS, values, strict=True)), lesion))
    return pictures


def _new_id(rng: Generator, prefix: str) -> str:
    return f"{prefix}_{rng.integers(10_000_000):07d}"


def _with_gaps(rng: Generator, row: dict[str, str]) -> dict[str, str]:
    gaps = [column for column in COLUMNS[1:6] if rng.random() < MISSING]
    return row | dict.fromkeys(gaps, "")


def _jpeg(pictures: list[Picture], index: int, seed: int, height: int, width: int) -> bytes:
    """The file's bytes; a copy's are made from its original's, so they need no file to be there."""
    picture = pictures[index]
    source = index if picture.copy_of is None else picture.copy_of
    image = draw(picture.lesion, np.random.default_rng((seed, source)), height, width)
    if source == index or picture.exact:
        return _encode(image, 92)
    rng = np.random.default_rng((seed, index))
    shift = np.array([[1, 0, rng.uniform(-0.03, 0.03) * width], [0, 1, rng.uniform(-0.03, 0.03) * height]], np.float32)
    moved = cv2.warpAffine(image, shift, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return _encode(np.asarray(cv2.convertScaleAbs(moved, alpha=rng.uniform(0.93, 1.07)), np.uint8), int(rng.integers(75, 90)))


def _encode(image: NDArray[np.uint8], quality: int) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()


def _truth(picture: Picture, names: list[str]) -> dict[str, Any]:
    return {"image_name": picture.row["image_name"], "target": picture.row["target"],
            "log_likelihood_ratio": round(log_likelihood_ratio(picture.lesion), 6),
            "copy_of": "" if picture.copy_of is None else names[picture.copy_of],
            "copy": "" if picture.copy_of is None else "exact" if picture.exact else "near",
            "colour_count": len(picture.lesion.colours)} | asdict(picture.lesion) | {"colours": "+".join(picture.lesion.colours)}


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def _write(path: Path, content: bytes) -> None:
    """All or nothing: a crash leaves the old file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
