"""screen: every reason is found, any number of tasks decides the same, and leakage stops the run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from skinsynth.data.shards import Dataset, ShardWriter, encode_jpeg, write_manifest
from skinsynth.errors import UserError
from skinsynth.knobs import Config, GeneratedClass
from skinsynth.quality import copies
from skinsynth.run import RunDir, Task, read_json, sha256_file
from skinsynth.stages.screen import screen

SIZE = 64


def write(folder: Path, rows: list[dict[str, Any]], shard_size: int, **facts: Any) -> None:
    """A dataset from rows of ``key``, ``jpg`` (bytes) and columns."""
    shards = [rows[i:i + shard_size] for i in range(0, len(rows), shard_size)]
    for number, shard_rows in enumerate(shards):
        with ShardWriter(folder, number) as shard:
            for row in shard_rows:
                shard.add(row["key"], {"jpg": row["jpg"], "json": b"{}"}, **{k: v for k, v in row.items() if k not in ("key", "jpg")})
    write_manifest(folder, len(shards), **facts)


def real(images: np.ndarray, split: str) -> list[dict[str, Any]]:
    return [{"key": f"{split}-{i:03d}", "jpg": encode_jpeg(image, 95), "target": i % 2, "group": f"{split}-group-{i}"}
            for i, image in enumerate(images)]


def synthetic(images: list[bytes]) -> list[dict[str, Any]]:
    return [{"key": f"syn-{i:08d}", "jpg": jpg, "target": i % 2, "class": ("benign", "malignant")[i % 2], "seed": i} for i, jpg in enumerate(images)]


@pytest.fixture(scope="module")
def images(drawn: Path) -> np.ndarray:
    """uint8 (n, SIZE, SIZE, 3): one image of each lesion that has no known double."""
    with open(drawn / "metadata.csv") as f:
        lesions = {row["lesion_id"] or row["image_name"]: row["image_name"] for row in csv.DictReader(f)}
    doubled = (drawn / "duplicates.csv").read_text()
    read = [cv2.imread(str(drawn / "images" / f"{name}.jpg")) for name in sorted(lesions.values()) if name not in doubled]
    found = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)[..., ::-1] for image in read if image is not None])
    return found[np.random.default_rng(1).permutation(len(found))]


@pytest.fixture(scope="module")
def fresh(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets with one synthetic image of every kind: 4 copies, blank, broken, of another size, and duplicates over a shard's border."""
    folder = tmp_path_factory.mktemp("screen")
    train, val, test, new = images[:40], images[40:56], images[56:66], images[66:90]
    for split, part in (("train", train), ("val", val), ("test", test)):
        write(folder / f"shards/isic-{split}", real(part, split), 16, kind="real")
    drawings = [encode_jpeg(image, 95) for image in new]
    copied = [encode_jpeg(np.ascontiguousarray(train[5][:, ::-1]), 50), encode_jpeg(np.ascontiguousarray(np.rot90(train[7])), 60),
              encode_jpeg(train[9], 50), encode_jpeg(copies.plant(train[11], 3), 95)]
    others = [encode_jpeg(np.full((SIZE, SIZE, 3), 120, np.uint8), 95), b"\xff\xd8 no picture", encode_jpeg(images[0][:32], 95)]
    rows = synthetic([*drawings, *copied, *others, drawings[2], drawings[3]])
    write(folder / "shards/run-synthetic", rows, 7, kind="synthetic", lineage={"group_ids": ["train-group-1"]})
    return folder


def settings(folder: Path) -> tuple[Config, RunDir]:
    cfg = Config(run=str(folder / "run"))
    cfg.data.shards, cfg.prepare.size, cfg.screen.batch, cfg.screen.copy_quantile = str(folder / "shards"), SIZE, 8, 1.0
    cfg.screen.kid_subset_size, cfg.screen.kid_subsets = 20, 10
    cfg.generate.classes = {"benign": GeneratedClass(0, ["x"], 16), "malignant": GeneratedClass(1, ["x"], 17)}
    return cfg, RunDir(folder / "run")


@pytest.fixture(scope="module")
def screened(fresh: Path) -> Path:
    cfg, run = settings(fresh)
    screen(cfg, run, Task())
    return fresh


def test_every_reason_is_found_and_told(screened: Path) -> None:
    rejected = read_json(screened / "run/screen/rejected.json")
    told = {sample["key"]: sample for sample in rejected["samples"]}
    reasons = {int(key[4:]): sample["reason"] for key, sample in told.items()}
    assert {n: r for n, r in reasons.items() if n >= 24} == {24: "copy", 25: "copy", 26: "copy", 27: "copy", 28: "blank", 29: "broken", 30: "broken",
                                                             31: "duplicate", 32: "duplicate"}
    assert [told[f"syn-{n:08d}"]["train_key"] for n in (24, 25, 26, 27)] == ["train-005", "train-007", "train-009", "train-011"]
    assert all(0.8 < told[f"syn-{n:08d}"]["similarity"] <= 1 for n in (24, 25, 26, 27))
    assert told["syn-00000030"]["value"] == "is 64 x 32 pixels, not 64 x 64"
    assert (told["syn-00000031"]["value"], told["syn-00000032"]["value"]) == ("syn-00000002", "syn-00000003")
    assert rejected["count"] == len(told) == sum(rejected["reasons"].values())
    assert len(told) <= 11, "drawings that are new were set aside"


def test_accepted_is_the_rest_and_names_its_dataset(screened: Path) -> None:
    accepted, rejected = (read_json(screened / f"run/screen/{name}.json") for name in ("accepted", "rejected"))
    dataset = Dataset.open(screened / "shards/run-synthetic")
    gone = {sample["key"] for sample in rejected["samples"]}
    assert accepted["keys"] == [key for key in dataset.keys if key not in gone]
    assert accepted["count"] == len(accepted["keys"]) == sum(accepted["classes"].values())
    assert accepted["manifest_sha256"] == sha256_file(dataset.folder / "manifest.json")
    metrics = RunDir(screened / "run").metrics("screen")
    assert (metrics["generated"], metrics["accepted"]) == (33, accepted["count"])
    assert metrics["features"] == "builtin-vae"
    assert metrics["copy_recall"] >= 0.8
    assert set(metrics["kid_per_class"]) == {"benign", "malignant"}
    assert metrics["kid"] < 1
    assert abs(metrics["kid_real"]) < 1


def test_the_nearest_pairs_begin_with_the_copies(screened: Path) -> None:
    pairs = read_json(screened / "run/screen/pairs.json")
    assert {pair["rejected"] for pair in pairs[:4]} == {"copy"}
    assert [p["nearness"] for p in pairs] == sorted((p["nearness"] for p in pairs), reverse=True)
    sheet = cv2.imread(str(screened / "run/screen/worst-pairs.png"))
    assert sheet is not None
    assert sheet.shape == (5 * 160, 4 * 264, 3)


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "run/screen" / name).read_bytes().replace(str(folder).encode(), b"")
            for name in ("accepted.json", "rejected.json", "pairs.json", "worst-pairs.png", "done.json")}


def test_three_tasks_in_any_order_decide_the_same_to_the_byte(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened / "shards", tmp_path / "shards")
    cfg, run = settings(tmp_path)
    for index in (2, 0):
        screen(cfg, run, Task(index, 3))
        assert not run.is_done("screen")
    screen(cfg, run, Task(1, 3))
    assert outcome(tmp_path) == outcome(screened)


def test_it_goes_on_where_it_was_cut_off_and_leaves_a_finished_one_alone(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    (tmp_path / "run/screen/done.json").unlink()
    (tmp_path / "run/screen/parts/00003.json").unlink()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/screen/parts").glob("*.np*")}
    screen(cfg, run, Task())
    assert outcome(tmp_path) == outcome(screened)
    rewritten = {p.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert rewritten == {"00003.npz"}
    done = run.done_path("screen").stat().st_mtime_ns
    screen(cfg, run, Task())
    assert run.done_path("screen").stat().st_mtime_ns == done


def test_a_synthetic_set_made_anew_is_screened_anew(screened: Path, tmp_path: Path, images: np.ndarray) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    write(tmp_path / "shards/run-synthetic", synthetic([encode_jpeg(image, 95) for image in images[66:74]]), 8, kind="synthetic")
    screen(cfg, run, Task())
    assert run.metrics("screen")["generated"] == 8
    old, new = ((folder / "run/screen/parts/00000.npz").stat().st_mtime_ns for folder in (screened, tmp_path))
    assert old == new, "the parts of the real images were made anew"


def test_a_generator_that_saw_held_out_groups_is_refused(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened / "shards", tmp_path / "shards")
    manifest = tmp_path / "shards/run-synthetic/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"lineage": {"group_ids": ["train-group-1", "test-group-4"]}}))
    cfg, run = settings(tmp_path)
    with pytest.raises(UserError, match=r"leakage.*1 groups of the test split \(test-group-4\)"):
        screen(cfg, run, Task())


def test_too_few_accepted_stops_with_the_counts_and_leaves_no_list(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    for name in ("done", "accepted"):
        (tmp_path / f"run/screen/{name}.json").unlink()
    cfg.screen.min_accepted = 0.9
    with pytest.raises(UserError, match=r"of 33 synthetic images were accepted \(2 broken, 1 blank, \d copy, 2 duplicate\)"):
        screen(cfg, run, Task())
    assert not (tmp_path / "run/screen/accepted.json").exists()
    assert (tmp_path / "run/screen/rejected.json").exists()


def test_a_damaged_real_image_is_named(screened: Path, tmp_path: Path, images: np.ndarray) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/screen/done.json").unlink()
    shutil.rmtree(tmp_path / "shards/isic-val")
    rows = real(images[40:44], "val")
    rows[2]["jpg"] = b"nothing"
    write(tmp_path / "shards/isic-val", rows, 4, kind="real")
    cfg, run = settings(tmp_path)
    with pytest.raises(UserError, match="isic-val: val-002 cannot be decoded"):
        screen(cfg, run, Task())


def test_a_set_of_which_nothing_is_left_is_told_not_crashed_on(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    write(tmp_path / "shards/run-synthetic", synthetic([b"", b"x"]), 2, kind="synthetic")
    cfg, run = settings(tmp_path)
    with pytest.raises(UserError, match="only 0 of 2 synthetic images"):
        screen(cfg, run, Task())
    cfg.screen.min_accepted = 0
    screen(cfg, run, Task())
    assert run.metrics("screen")["kid"] is None
