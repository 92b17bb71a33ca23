"""Drawn lesions: what is asked for is seen, the truth is the truth, and a dataset is written whole or not at all."""
import csv
import dataclasses
import hashlib
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from skinsynth.data.phantom import (
    Lesion,
    caption,
    dataset,
    draw,
    log_likelihood_ratio,
    sample_broad,
    sample_lesion,
    write_dataset,
)

PLAIN = Lesion(
    asymmetry=0.1, irregularity=0.1, colours=("dark brown",), diameter=6.0, field=14.0, x=0.0, y=0.0, aspect=0.9, angle=0.5,
    sharpness=0.7, density=1.0, network=0.1, globules=0.1, streaks=0.1, skin=0.2, redness=0.3, warmth=0.0, shade=0.2, hairs=0,
    vignette=0.0, ruler=False, bubbles=0)


def plain(seed: int = 0, height: int = 96, width: int = 128, **changes: object) -> np.ndarray:
    return draw(dataclasses.replace(PLAIN, **changes), np.random.default_rng(seed), height, width)


def dark_area(image: np.ndarray) -> int:
    """Pixels that are nearer to the middle's brightness than to the left edge's."""
    grey = image.mean(2)
    height = len(grey)
    middle = grey[height // 2 - 5:height // 2 + 5, grey.shape[1] // 2 - 5:grey.shape[1] // 2 + 5].mean()
    return int((grey < (middle + grey[:, :6].mean()) / 2).sum())


@pytest.mark.parametrize(("height", "width"), [(144, 192), (64, 64), (17, 33)])
def test_draw_is_a_function_of_lesion_and_seed(height: int, width: int) -> None:
    image = plain(3, height, width)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, plain(3, height, width))
    assert not np.array_equal(image, plain(4, height, width))


def test_a_lesion_is_darker_than_the_skin_around_it() -> None:
    differences = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        lesion = dataclasses.replace(sample_broad(rng), hairs=0, vignette=0.0)
        grey = draw(lesion, rng, 64, 64).mean(2)
        rim = np.concatenate([grey[:4].ravel(), grey[-4:].ravel(), grey[:, :4].ravel(), grey[:, -4:].ravel()])
        differences.append(np.median(rim) - np.median(grey[24:40, 24:40]))
    assert np.mean(np.array(differences) > 4) > 0.9
    assert np.median(differences) > 30


def test_diameter_is_the_size_that_is_drawn() -> None:
    for diameter in (4.0, 8.0):
        expected = math.pi / 4 * (diameter / PLAIN.field * 96) ** 2
        assert np.mean([dark_area(plain(seed, diameter=diameter)) for seed in range(6)]) == pytest.approx(expected, rel=0.25)


def test_irregular_borders_are_longer() -> None:
    def roughness(irregularity: float) -> float:
        values = []
        for seed in range(8):
            grey = cv2.GaussianBlur(plain(seed, 144, 192, irregularity=irregularity, sharpness=0.9).mean(2), (0, 0), 1)
            mask = (grey < (grey[66:78, 90:102].mean() + grey[:, :8].mean()) / 2).astype(np.uint8)
            contour = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=cv2.contourArea)
            values.append(cv2.arcLength(contour, True) ** 2 / cv2.contourArea(contour))
        return float(np.mean(values))
    assert roughness(0.95) > 1.4 * roughness(0.05)


def test_asymmetric_lesions_differ_from_their_mirror_image() -> None:
    def difference(asymmetry: float) -> float:
        images = [plain(seed, asymmetry=asymmetry, colours=("tan", "black")).mean(2) for seed in range(10)]
        return float(np.mean([np.abs(image - image[::-1, ::-1]).mean() for image in images]))
    assert difference(0.95) > 1.25 * difference(0.05)


def test_each_colour_changes_the_picture_its_way() -> None:
    def middle(*colours: str) -> np.ndarray:
        return np.mean([plain(seed, colours=colours)[40:56, 56:72].mean((0, 1)) for seed in range(6)], 0)
    brown = middle("dark brown")
    assert middle("black").mean() < brown.mean() - 15
    assert (middle("tan") > brown + 40).all()
    red, grey, white = middle("red"), middle("dark brown", "blue-grey"), middle("dark brown", "white")
    assert red[0] - red[1] > 60
    assert grey[2] - grey[0] > brown[2] - brown[0] + 8
    assert (white > brown + 8).all()


def test_extras_are_seen() -> None:
    bare = plain(1).astype(int)
    assert (plain(1, vignette=1.0)[:6, :6] < 12).all()
    assert (bare[:6, :6] > 100).all()
    assert (plain(1, hairs=25).mean(2) < 70).sum() > (bare.mean(2) < 70).sum() + 150
    ruled = plain(1, ruler=True).astype(int)
    assert (bare[85:92].mean(2) - ruled[85:92].mean(2) > 40).sum() > 30
    assert (np.abs(plain(1, bubbles=8).astype(int) - bare).max(2) > 40).sum() > 20
    assert plain(1, skin=1.0)[:, :10].mean() < bare[:, :10].mean() - 80
    assert np.abs(plain(1, network=1.0).astype(int) - plain(1, network=0.0)).max() > 25
    assert dark_area(plain(1, globules=1.0)) != dark_area(plain(1))


def test_likelihood_ratio_is_that_of_the_sampler() -> None:
    target = np.arange(6000) % 2
    lesions = [sample_lesion(np.random.default_rng((1, i)), int(t)) for i, t in enumerate(target)]
    score = np.array([log_likelihood_ratio(lesion) for lesion in lesions])
    ranks = np.empty(len(score))
    ranks[score.argsort()] = np.arange(len(score))
    auroc = (ranks[target == 1].mean() - ranks[target == 0].mean()) / len(score) + 0.5
    assert 0.93 < auroc < 0.955
    assert 0.85 < ((score > 0) == target).mean() < 0.885
    for low, high in ((-3, -1), (-1, 0), (0, 1), (1, 3)):  # a calibrated score: what it says is how often it happens
        inside = (score > low) & (score < high)
        assert target[inside].mean() == pytest.approx((1 / (1 + np.exp(-score[inside]))).mean(), abs=0.06)


def test_only_abcd_depend_on_the_class() -> None:
    rows = {target: [sample_lesion(np.random.default_rng((target, i)), target) for i in range(1500)] for target in (0, 1)}

    def gap(name: str) -> float:
        """Difference of the classes' means in standard errors."""
        a, b = (np.array([float(getattr(lesion, name)) for lesion in rows[target]]) for target in (0, 1))
        return abs(a.mean() - b.mean()) / max(math.hypot(a.std(), b.std()) / math.sqrt(len(a)), 1e-9)
    abcd = {"asymmetry", "irregularity", "diameter"}
    names = {field.name for field in dataclasses.fields(Lesion)} - {"colours"}
    assert {name for name in names if gap(name) > 5} == abcd
    counts = [np.mean([len(lesion.colours) for lesion in rows[target]]) for target in (0, 1)]
    assert counts[1] > counts[0] + 0.7


def test_sampled_values_stay_in_their_ranges() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        for lesion in (sample_broad(rng), sample_lesion(rng, seed % 2)):
            for name in ("asymmetry", "irregularity", "sharpness", "network", "globules", "streaks", "skin", "vignette"):
                assert 0 <= getattr(lesion, name) <= 1
            assert 0.55 <= lesion.aspect <= 1
            assert 1 <= len(set(lesion.colours)) == len(lesion.colours) <= 6


def test_broad_lesions_fill_the_picture_like_a_crop() -> None:
    share = np.array([lesion.diameter / lesion.field for lesion in (sample_broad(np.random.default_rng(i)) for i in range(300))])
    assert share.min() >= 0.3
    assert share.max() <= 0.85
    assert share.std() > 0.1


def test_caption_says_what_is_drawn() -> None:
    assert caption(PLAIN) == ("a dermoscopy image of a medium-sized dark brown skin lesion with regular border and "
                              "symmetric shape on light skin")
    other = dataclasses.replace(PLAIN, diameter=11.0, irregularity=0.9, asymmetry=0.8, colours=("tan", "red", "black"), hairs=9,
                                skin=1.0, network=0.9, sharpness=0.1)
    assert caption(other) == ("a dermoscopy image of a large tan and red and black skin lesion with irregular border, asymmetric "
                              "shape, fading edge, 3 colours, pigment network and hair on dark skin")
    assert len({caption(sample_broad(np.random.default_rng(i))) for i in range(200)}) > 190


# --- the dataset

def tree(folder: Path) -> dict[str, str]:
    """Each file's path and content hash."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "set"
    write_dataset(folder, 200, malignant=0.3, seed=5, height=48, width=64)
    return folder


def test_dataset_has_the_layout_of_isic(drawn: Path) -> None:
    rows = read(drawn / "metadata.csv")
    assert tuple(rows[0]) == ("image_name", "patient_id", "lesion_id", "sex", "age_approx", "anatom_site_general_challenge",
                              "diagnosis", "benign_malignant", "target")
    assert sorted(f"{row['image_name']}.jpg" for row in rows) == sorted(path.name for path in (drawn / "images").iterdir())
    assert len(rows) == 200
    assert cv2.imread(str(drawn / "images" / f"{rows[0]['image_name']}.jpg")).shape == (48, 64, 3)
    assert sum(row["target"] == "1" for row in rows) == pytest.approx(60, abs=6)
    assert {(row["target"], row["benign_malignant"]) for row in rows} == {("0", "benign"), ("1", "malignant")}
    assert {row["diagnosis"] for row in rows if row["target"] == "1"} == {"melanoma"}
    benign = Counter(row["diagnosis"] for row in rows if row["target"] == "0")
    assert set(benign) == {"nevus", "seborrheic keratosis", "unknown"}
    assert benign["nevus"] > sum(benign.values()) / 2
    for column in ("patient_id", "lesion_id", "sex", "age_approx", "anatom_site_general_challenge"):
        assert 0 < sum(row[column] == "" for row in rows) < 25


def test_patients_share_their_skin_and_have_up_to_four_lesions(drawn: Path) -> None:
    truth = {row["image_name"]: row for row in read(drawn / "truth.csv")}
    groups = defaultdict(list)
    for row in read(drawn / "metadata.csv"):
        if row["patient_id"] and not truth[row["image_name"]]["copy"]:
            groups[row["patient_id"]].append(row)
    assert {len(group) for group in groups.values()} == {1, 2, 3, 4}
    for group in groups.values():
        assert len({truth[row["image_name"]]["skin"] for row in group}) == 1
        lesions = [row["lesion_id"] for row in group if row["lesion_id"]]
        assert len(set(lesions)) == len(lesions)


def test_copies_are_what_truth_says(drawn: Path) -> None:
    truth = {row["image_name"]: row for row in read(drawn / "truth.csv")}
    meta = {row["image_name"]: row for row in read(drawn / "metadata.csv")}
    files = {name: (drawn / "images" / f"{name}.jpg").read_bytes() for name in truth}
    exact = {(row["copy_of"], name) for name, row in truth.items() if row["copy"] == "exact"}
    same = defaultdict(set)
    for name, content in files.items():
        same[content].add(name)
    assert {frozenset(pair) for pair in exact} <= {frozenset((a, b)) for group in same.values() for a in group for b in group}
    assert len(files) - len(same) == len(exact) == 4
    patients = [(meta[a]["patient_id"], meta[b]["patient_id"]) for a, b in exact]
    assert any(a and b and a != b for a, b in patients)
    near = {(row["copy_of"], name) for name, row in truth.items() if row["copy"] == "near"}
    assert near == {(row["image_name_1"], row["image_name_2"]) for row in read(drawn / "duplicates.csv")}
    assert len(near) == 6
    for a, b in near:
        one, two = (cv2.resize(cv2.imdecode(np.frombuffer(files[name], np.uint8), 1), (8, 6), interpolation=cv2.INTER_AREA)
                    for name in (a, b))
        assert files[a] != files[b]
        assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.8


def test_same_request_gives_the_same_bytes_and_does_nothing_twice(
        drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "again", 200, malignant=0.3, seed=5, height=48, width=64)
    assert tree(tmp_path / "again") == tree(drawn)
    monkeypatch.setattr(dataset, "_write", lambda *_: pytest.fail("wrote again"))
    write_dataset(drawn, 200, malignant=0.3, seed=5, height=48, width=64)


def test_another_request_or_a_foreign_folder_is_refused(drawn: Path, tmp_path: Path) -> None:
    before = tree(drawn)
    with pytest.raises(FileExistsError, match="another request"):
        write_dataset(drawn, 200, malignant=0.3, seed=6, height=48, width=64)
    assert tree(drawn) == before
    (tmp_path / "metadata.csv").write_text("image_name,target\n")
    with pytest.raises(FileExistsError, match="not drawn by phantom"):
        write_dataset(tmp_path, 3)
    for bad in ({"images": 0}, {"images": 3, "malignant": 1.5}, {"images": 3, "height": 4}):
        with pytest.raises(ValueError, match="must be"):
            write_dataset(tmp_path / "bad", **bad)
    assert not (tmp_path / "bad").exists()


def test_a_crash_leaves_no_metadata_and_the_next_call_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"images": 30, "seed": 2, "height": 32, "width": 40}
    write_dataset(tmp_path / "clean", **request)
    replace, calls = Path.replace, []

    def dies(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return replace(self, target)
    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", **request)
    monkeypatch.undo()
    assert not (tmp_path / "set" / "metadata.csv").exists()
    complete = tree(tmp_path / "clean")
    written = {name: digest for name, digest in tree(tmp_path / "set").items() if not name.endswith(".part")}
    assert len(written) == 11
    assert written.items() <= complete.items()
    write_dataset(tmp_path / "set", **request)
    assert {name: digest for name, digest in tree(tmp_path / "set").items() if not name.endswith(".part")} == complete


@pytest.mark.parametrize("images", [1, 2, 7])
def test_small_datasets(images: int, tmp_path: Path) -> None:
    write_dataset(tmp_path, images, height=16, width=16)
    assert len(read(tmp_path / "metadata.csv")) == images == len(list((tmp_path / "images").glob("*.jpg")))


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skinsynth.data.phantom", str(tmp_path / "set"), "--images", "4", "--seed", "1"]
    assert "4 images" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    other = subprocess.run([*command, "--malignant", "2"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "malignant=2.0" in other.stderr
    assert "Traceback" not in other.stderr
