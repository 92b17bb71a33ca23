"""All of ISIC 2020 by its real metadata: 33,126 rows, 2,056 patients, 425 published duplicate pairs. The images are drawn: each file is one of some
hundred drawings of its class, with a comment that holds its id, so that no two files are equal."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REAL, ROOT

from skinsynth import config
from skinsynth.data.dataset import Dataset
from skinsynth.data.phantom import draw, sample_lesion
from skinsynth.files import read_json, sha256_folder
from skinsynth.run import RunDir

GROUND_TRUTH, PAIRS = REAL / "isic2020_groundtruth.csv", REAL / "isic2020_duplicates.csv"
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
DRAWINGS = 60  # of each class

pytestmark = pytest.mark.skipif(not GROUND_TRUTH.is_file(), reason=f"no ISIC 2020 ground truth at {REAL}: it is not part of the repository")


def drawings(target: int) -> list[bytes]:
    """JPEGs of drawn lesions."""
    found = []
    for number in range(DRAWINGS):
        rng = np.random.default_rng((target, number))
        image = draw(sample_lesion(rng, target), rng, 72, 96)
        found.append(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
    return found


def commented(jpeg: bytes, text: str) -> bytes:
    """The same picture in a file of its own: a JPEG comment after the start marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text.encode() + jpeg[2:]


def rows() -> list[dict[str, str]]:
    with open(GROUND_TRUTH, newline="") as f:
        return list(csv.DictReader(f))


def write_images(folder: Path, wanted: list[dict[str, str]]) -> None:
    folder.mkdir()
    pictures = {str(target): drawings(target) for target in (0, 1)}
    for number, row in enumerate(wanted):
        name = row["image_name"]
        (folder / f"{name}.jpg").write_bytes(commented(pictures[row["target"]][number % DRAWINGS], name))


def prepared(metadata: Path, images: Path, out: Path, tasks: int) -> RunDir:
    """``prepare`` in as many processes at once, as an array would run it."""
    cfg = config.load(ROOT / "configs/isic2020-sd15.yaml", [
        f"run={out / 'run'}", f"data.shards={out / 'shards'}", "data.name=isic2020", f"data.metadata={metadata}", f"data.images={images}",
        f"data.duplicates={PAIRS}", "prepare.size=64", "prepare.shard_size=1000"])
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    array = [subprocess.Popen([sys.executable, "-m", "jobs.prepare", str(run.path), "--task", f"{i}/{tasks}"], cwd=ROOT, env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(tasks)]
    said = [task.communicate()[0] for task in array]
    assert [task.returncode for task in array] == [0] * tasks, "\n".join(said)
    return run


def manifests(run: RunDir) -> dict[str, dict]:
    return {split: read_json(run.dataset(run.config(), split) / "manifest.json") for split in SHARES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("isic2020")
    write_images(folder / "images", rows())
    return prepared(GROUND_TRUTH, folder / "images", folder, 2)


@pytest.mark.soak
def test_every_row_is_in_one_split_with_its_patient_and_its_duplicates(whole: RunDir) -> None:
    place = {key: split for split in SHARES for key in Dataset.open(whole.dataset(whole.config(), split)).keys}
    content = rows()
    assert sorted(place) == sorted(row["image_name"] for row in content)
    assert len(content) == 33_126
    homes = {(row["patient_id"], place[row["image_name"]]) for row in content}
    assert len(homes) == len({patient for patient, _ in homes}) == 2_056
    with open(PAIRS, newline="") as f:
        pairs = [(row["image_name_1"], row["image_name_2"]) for row in csv.DictReader(f)]
    assert len(pairs) == 425
    assert [pair for pair in pairs if place[pair[0]] != place[pair[1]]] == []
    metrics = whole.metrics("prepare")
    assert metrics["duplicates"] == {"pairs_listed": 425, "pairs_applied": 425, "equal_files": 0}
    assert (metrics["rows"], metrics["set_aside"]["total"]) == (33_126, 0)
    assert sum(metrics[split]["patients"] for split in SHARES) == 2_056


@pytest.mark.soak
def test_each_class_has_its_share_of_each_split_within_half_a_percent(whole: RunDir) -> None:
    """Of all 584 malignant and 32,542 benign images."""
    found = {split: manifest["classes"] for split, manifest in manifests(whole).items()}
    total = {label: sum(classes[label] for classes in found.values()) for label in "01"}
    assert total == {"0": 32_542, "1": 584}
    assert max(abs(found[split][label] / total[label] - share) for split, share in SHARES.items() for label in "01") < 0.005


@pytest.mark.soak
def test_the_table_says_what_the_samples_are(whole: RunDir) -> None:
    """Counted again from the metadata and the place of each image, not from the manifests that the table was made of."""
    text = (whole.dataset(whole.config(), "train") / "split.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    table = {(line[0], line[1]): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert len(table) == 6
    known = {row["image_name"]: row for row in rows()}
    for (split, name), told in table.items():
        mine = [known[key] for key in Dataset.open(whole.dataset(whole.config(), split)).keys if known[key]["benign_malignant"] == name]
        ages = [int(float(row["age_approx"])) for row in mine if row["age_approx"]]
        assert told["images"] == f"{len(mine):,}"
        assert told["share"] == f"{100 * len(mine) / sum(row['benign_malignant'] == name for row in known.values()):.1f} %"
        assert told["patients"] == f"{len({row['patient_id'] for row in mine}):,}"
        assert told["age"] == f"{np.round(np.mean(ages), 2):.1f} ({min(ages)}-{max(ages)})"
        assert told["female"] == f"{100 * sum(row['sex'] == 'female' for row in mine) / len(mine):.1f} %"
        site, count = Counter(row["anatom_site_general_challenge"] for row in mine).most_common(1)[0]
        assert told["sites"].split(", ")[0] == f"{site} {100 * count / len(mine):.1f} %"
        diagnosis, count = Counter(row["diagnosis"] for row in mine).most_common(1)[0]
        assert told["diagnoses"].split(", ")[0] == f"{diagnosis} {100 * count / len(mine):.1f} %"
    assert "33,126 rows, 0 set aside" in text
    assert "425 of 425 listed pairs applied" in text
    for split, manifest in manifests(whole).items():
        assert f"- {split}: {manifest['count']:,} images, {manifest['groups']:,} groups, {manifest['patients']:,} patients" in text


@pytest.mark.soak
def test_three_tasks_give_the_bytes_of_one(tmp_path: Path) -> None:
    """The first 2,000 rows of the patients that have a malignant image and of others, in two folders."""
    some = sorted(rows(), key=lambda row: (row["target"] == "0", row["image_name"]))[:2000]
    write_images(tmp_path / "images", some)
    with open(tmp_path / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(some[0]))
        writer.writeheader()
        writer.writerows(some)
    one, three = (prepared(tmp_path / "metadata.csv", tmp_path / "images", tmp_path / str(tasks), tasks) for tasks in (1, 3))
    assert sum(m["count"] for m in manifests(one).values()) == 2000
    for split in SHARES:
        mine, theirs = (run.dataset(run.config(), split) for run in (one, three))
        assert sha256_folder(mine) == sha256_folder(theirs)
        assert len(list(mine.glob("*.tar"))) == -(-manifests(one)[split]["count"] // 1000)
