"""screen: every reason is found, any number of tasks decides the same, and leakage stops the run."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from skinsynth.data.codec import encode_jpeg
from skinsynth.data.dataset import Dataset
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file
from skinsynth.knobs import Config, GeneratedClass
from skinsynth.quality import copies, gate, spectrum
from skinsynth.quality.evidence import choose
from skinsynth.quality.gate import REASONS
from skinsynth.quality.parts import Parts
from skinsynth.run import RunDir, Task
from skinsynth.stages.screen import ADVICE, advice, copies_searched, screen

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
    files = [drawn / "images" / f"{name}.jpg" for name in sorted(lesions.values()) if name not in doubled]
    once = {path.read_bytes(): path for path in reversed(files) if path.exists()}  # two are there under two names, in no list
    read = [cv2.imread(str(path)) for path in sorted(once.values())]
    found = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)[..., ::-1] for image in read if image is not None])
    return found[np.random.default_rng(1).permutation(len(found))]


@pytest.fixture(scope="module")
def fresh(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets with one synthetic image of every kind: 4 copies, blank, broken, of another size, duplicates and near-duplicates over a shard's
    border, a blurred one."""
    folder = tmp_path_factory.mktemp("screen")
    train, val, test, new = images[:40], images[40:56], images[56:66], images[66:90]
    for split, part in (("train", train), ("val", val), ("test", test)):
        write(folder / f"shards/isic-{split}", real(part, split), 16, kind="real")
    drawings = [encode_jpeg(image, 95) for image in new]
    copied = [encode_jpeg(np.ascontiguousarray(train[5][:, ::-1]), 50), encode_jpeg(np.ascontiguousarray(np.rot90(train[7])), 60),
              encode_jpeg(train[9], 50), encode_jpeg(copies.plant(train[11], 3), 95)]
    others = [encode_jpeg(np.full((SIZE, SIZE, 3), 120, np.uint8), 95), b"\xff\xd8 no picture", encode_jpeg(images[0][:32], 95)]
    near = [encode_jpeg(cv2.GaussianBlur(new[4], (0, 0), 0.4), 60), encode_jpeg(np.ascontiguousarray(new[5][:, ::-1]), 70)]
    rows = synthetic([*drawings, *copied, *others, drawings[2], drawings[3], *near, encode_jpeg(cv2.GaussianBlur(new[6], (0, 0), 5), 95)])
    write(folder / "shards/run-synthetic", rows, 7, kind="synthetic", lineage={"group_ids": ["train-group-1"]})
    return folder


def settings(folder: Path) -> tuple[Config, RunDir]:
    cfg = Config(run=str(folder / "run"))
    cfg.data.shards, cfg.prepare.size, cfg.screen.batch, cfg.screen.copy_quantile = str(folder / "shards"), SIZE, 8, 1.0
    cfg.screen.kid_subset_size, cfg.screen.kid_subsets = 20, 10
    cfg.generate.classes = {"benign": GeneratedClass(0, ["x"], 18), "malignant": GeneratedClass(1, ["x"], 18)}
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
                                                             31: "duplicate", 32: "duplicate", 33: "duplicate", 34: "duplicate", 35: "blur"}
    assert [told[f"syn-{n:08d}"]["train_key"] for n in (24, 25, 26, 27)] == ["train-005", "train-007", "train-009", "train-011"]
    assert all(0.8 < told[f"syn-{n:08d}"]["similarity"] <= 1 for n in (24, 25, 26, 27))
    assert told["syn-00000030"]["value"] == "is 64 x 32 pixels, not 64 x 64"
    assert [told[f"syn-{n:08d}"]["value"] for n in (31, 32, 33, 34)] == [f"syn-{n:08d}" for n in (2, 3, 4, 5)]
    assert rejected["count"] == len(told) == sum(rejected["reasons"].values())
    assert len(told) <= 14, "drawings that are new were set aside"


def test_accepted_is_the_rest_and_names_its_dataset(screened: Path) -> None:
    accepted, rejected = (read_json(screened / f"run/screen/{name}.json") for name in ("accepted", "rejected"))
    dataset = Dataset.open(screened / "shards/run-synthetic")
    gone = {sample["key"] for sample in rejected["samples"]}
    assert accepted["keys"] == [key for key in dataset.keys if key not in gone]
    assert accepted["count"] == len(accepted["keys"]) == sum(accepted["classes"].values())
    assert accepted["manifest_sha256"] == sha256_file(dataset.folder / "manifest.json")
    metrics = RunDir(screened / "run").metrics("screen")
    assert (metrics["generated"], metrics["accepted"]) == (36, accepted["count"])
    assert metrics["features"] == "builtin-vae"
    assert metrics["copy_recall"] >= 0.8
    assert set(metrics["kid_per_class"]) == {"benign", "malignant"}
    assert metrics["kid"] < 1
    assert abs(metrics["kid_real"]) < 1


def test_the_metrics_hold_the_evidence_with_its_sizes(screened: Path) -> None:
    metrics = RunDir(screened / "run").metrics("screen")
    distances = metrics["distances"]
    assert (distances["all"]["images"], distances["all"]["real_images"], distances["real"]["images"]) == (metrics["accepted"], 40, 26)
    assert set(distances["per_class"]) == set(distances["real_per_class"]) == {"benign", "malignant"}
    assert [(row["images"], row["real_images"]) for row in distances["real_per_class"].values()] == [(13, 20), (13, 20)]
    assert metrics["kid"] == distances["all"]["kid"]
    assert all(0 <= distances["all"][name] <= 1 for name in ("precision", "recall", "coverage"))
    assert "too small for FID" in distances["all"]["fid_warning"]
    assert set(metrics["copy_recall_per_disguise"]) == {"flip", "crop", "colour", "jpeg", "all"}
    assert metrics["copied_share"] == 4 / 40
    assert set(metrics["limits"]) == set(metrics["real_rejected"]) == {"blank", "blur", "frame", "clipped", "saturated"}
    assert set(metrics["agreement"]["per_class"]) == {"benign", "malignant"}
    assert 0 <= metrics["agreement"]["auroc_val"] <= 1
    assert 0 < metrics["detector"]["tested"] < 40 + 26 + 36
    assert metrics["lineage"] == "known"
    assert metrics["copies_searched"]["images"] == 40
    assert metrics["gate"] == {"passed": True, "failures": []}
    assert {name: row["generated"] for name, row in metrics["classes"].items()} == {"benign": 18, "malignant": 18}
    assert sum(row["accepted"] for row in metrics["classes"].values()) == metrics["accepted"]
    assert metrics == read_json(screened / "run/screen/metrics.json")


def test_the_mean_spectra_are_those_of_all_whole_images(screened: Path, images: np.ndarray) -> None:
    cfg, run = settings(screened)
    sets = sets_of(screened)
    parts = Parts(cfg, run.node("screen") / "parts", sets, "")
    real_mean = np.mean([spectrum.transforms(sets[kind].image(i)) for kind in ("train", "val", "test") for i in range(len(sets[kind]))], 0)
    assert np.allclose(parts.spectra(("train", "val", "test")), real_mean)
    whole = [i for i in range(36) if i not in parts.broken("synthetic")]
    assert len(whole) == 34
    assert np.allclose(parts.spectra(("synthetic",)), np.mean([spectrum.transforms(sets["synthetic"].image(i)) for i in whole], 0))


def test_the_nearest_pairs_begin_with_the_copies(screened: Path) -> None:
    pairs = read_json(screened / "run/screen/pairs.json")
    assert {pair["rejected"] for pair in pairs[:4]} == {"copy"}
    assert [p["nearness"] for p in pairs] == sorted((p["nearness"] for p in pairs), reverse=True)
    sheet = cv2.imread(str(screened / "run/screen/worst-pairs.png"))
    assert sheet is not None
    assert sheet.shape == (5 * 160, 4 * 264, 3)


def sets_of(folder: Path) -> dict[str, Dataset]:
    names = {"train": "isic-train", "val": "isic-val", "test": "isic-test", "synthetic": "run-synthetic"}
    return {kind: Dataset.open(folder / "shards" / name) for kind, name in names.items()}


def outcome(folder: Path) -> dict[str, bytes]:
    """But for the folder's name and hashes of what holds it, and whether the folder has a configuration."""
    done = {name: value for name, value in read_json(folder / "run/screen/done.json").items() if name not in ("made", "needs")}
    return {"done.json": json.dumps(done).encode()} | {
        name: (folder / "run/screen" / name).read_bytes().replace(str(folder).encode(), b"")
        for name in ("accepted.json", "rejected.json", "metrics.json", "pairs.json", "worst-pairs.png", "spectrum.png")}


def test_three_tasks_in_any_order_decide_the_same_to_the_byte(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened / "shards", tmp_path / "shards")
    cfg, run = settings(tmp_path)
    for index in (2, 0):
        screen(cfg, run, Task(index, 3))
        assert not run.is_done("screen")
    screen(cfg, run, Task(1, 3))
    assert outcome(tmp_path) == outcome(screened)


def test_two_tasks_at_once_decide_the_same_to_the_byte(screened: Path, tmp_path: Path) -> None:
    """As an array runs them: each a process, all making thumbnails and comparing shards while the others write theirs."""
    shutil.copytree(screened / "shards", tmp_path / "shards")
    cfg, run = settings(tmp_path)
    run.create(cfg)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    tasks = [subprocess.Popen([sys.executable, "-m", "jobs.screen", str(run.path), "--task", f"{i}/2"], cwd=ROOT, env=env)
             for i in range(2)]
    assert [task.wait(timeout=150) for task in tasks] == [0, 0]
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


def test_a_task_makes_the_training_thumbnails_that_it_misses_and_a_pair_of_shards_that_none_compared_is_made_good(
        screened: Path, tmp_path: Path) -> None:
    """The first task of many begins with the search; and what two tasks did not see of each other is compared in the end."""
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    (tmp_path / "run/screen/done.json").unlink()
    folder = tmp_path / "run/screen/parts"
    for path in [*folder.glob("train-*.npy"), *folder.glob("*.near.json"), folder / "00004.json"]:
        path.unlink()
    units = Parts(cfg, folder, sets_of(tmp_path), "").units
    assert units[4].kind == "test"
    screen(cfg, run, Task(4, 5))
    assert outcome(tmp_path) == outcome(screened)
    assert len(list(folder.glob("train-*.npy"))) == 3


def test_features_are_kept_of_so_many_images_and_the_same_ones(screened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    (tmp_path / "run/screen/done.json").unlink()
    cfg.screen.max_features = 8  # below what the configuration allows, for the test
    screen(cfg, run, Task())
    distances = run.metrics("screen")["distances"]
    assert {row["images"] for row in (distances["all"], *distances["per_class"].values())} == {8}
    assert distances["real"]["images"] == 16
    assert len(read_json(tmp_path / "run/screen/accepted.json")["keys"]) == RunDir(screened / "run").metrics("screen")["accepted"]


def test_which_features_are_kept_depends_on_the_keys_alone() -> None:
    keys, targets = [f"k{i}" for i in range(300)], np.arange(300) % 3
    numbers, over_all = choose(keys, targets, np.arange(300), 20)
    assert over_all.sum() == 20
    assert all((targets[numbers] == t).sum() >= 20 for t in range(3))
    fewer, _ = choose(keys, targets, np.array(sorted(numbers)), 20)
    assert np.array_equal(fewer, numbers), "those chosen are chosen again from among themselves"
    assert len(choose(keys, targets, np.arange(0), 20)[0]) == 0


def test_a_synthetic_set_made_anew_is_screened_anew(screened: Path, tmp_path: Path, images: np.ndarray) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    write(tmp_path / "shards/run-synthetic", synthetic([encode_jpeg(image, 95) for image in images[66:74]]), 8, kind="synthetic")
    assert not run.is_done("screen"), "so that a launch, and a job, have it screened"
    screen(cfg, run, Task())
    assert run.is_done("screen")
    assert run.metrics("screen")["generated"] == 8
    old, new = ((folder / "run/screen/parts/00000.npz").stat().st_mtime_ns for folder in (screened, tmp_path))
    assert old == new, "the parts of the real images were made anew"


def test_a_generator_that_saw_held_out_groups_is_refused(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened / "shards", tmp_path / "shards")
    manifest = tmp_path / "shards/run-synthetic/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"lineage": {"group_ids": ["train-group-1", "test-group-4"]}}))
    cfg, run = settings(tmp_path)
    with pytest.raises(UserError, match=r"leakage.*1 groups of the test split \(test-group-4: test-004\)"):
        screen(cfg, run, Task())


@pytest.mark.parametrize("lineage", [{}, {"lineage": None}, {"lineage": {"group_ids": None}}])
def test_a_generator_of_unknown_origin_is_said_to_be_one(screened: Path, tmp_path: Path, lineage: dict[str, Any]) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "shards/run-synthetic/manifest.json"
    known = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "lineage"}
    manifest.write_text(json.dumps(known | lineage))
    cfg, run = settings(tmp_path)
    screen(cfg, run, Task())
    assert run.metrics("screen")["lineage"] == "unknown"


@pytest.mark.parametrize(("lineage", "missing", "told"), [
    ({"group_ids": []}, 0, "the run's 40 training images; the generator is a general model that was fine-tuned on none of these"),
    ({"group_ids": ["g"], "trained_on": {"images": ["train-001"], "groups": ["g"]}}, 0, "among them all"),
    ({"group_ids": ["g"], "trained_on": {"images": ["train-001", "a", "b"], "groups": ["g"]}}, 2, "2 other images that trained the generator"),
    ({"group_ids": ["g"]}, None, "which images trained the generator is not known"),
    ({"group_ids": None, "trained_on": {"images": ["train-001"]}}, None, "which images trained the generator is not known"),
    (None, None, "which images trained the generator is not known")])
def test_it_is_told_among_which_images_copies_were_looked_for(screened: Path, lineage: Any, missing: int | None, told: str) -> None:
    sets = sets_of(screened)
    sets["synthetic"].manifest["lineage"] = lineage
    found = copies_searched(sets)
    assert (found["images"], found["not_searched"]) == (40, missing)
    assert told in found["told"]


def again(screened: Path, folder: Path) -> tuple[Config, RunDir]:
    """The same parts, not decided yet."""
    shutil.copytree(screened, folder, dirs_exist_ok=True)
    for name in ("done", "accepted"):
        (folder / f"run/screen/{name}.json").unlink()
    return settings(folder)


def test_a_set_that_fails_goes_on_where_it_is_told_to(screened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, run = again(screened, tmp_path)
    cfg.screen.max_copies, cfg.screen.min_accepted = 0.1, 0.9
    with pytest.raises(UserError, match=r"only \d\d of 36 .*; 4 of 36 .* are copies .* more than screen.max_copies=0.1.*on_fail=warn"):
        screen(cfg, run, Task())
    assert not run.is_done("screen")
    assert not read_json(tmp_path / "run/screen/metrics.json")["gate"]["passed"]
    cfg.screen.on_fail = "warn"
    screen(cfg, run, Task())
    assert "are copies of training images" in capsys.readouterr().err
    assert len(run.metrics("screen")["gate"]["failures"]) == 4, "of all, of each class, and of copies"
    assert read_json(tmp_path / "run/screen/accepted.json")["count"] == RunDir(screened / "run").metrics("screen")["accepted"]


def test_images_that_do_not_show_their_class_are_set_aside_only_when_asked_to(screened: Path, tmp_path: Path) -> None:
    cfg, run = again(screened, tmp_path)
    cfg.screen.agreement = 0.5
    screen(cfg, run, Task())
    metrics = run.metrics("screen")
    assert metrics["rejected"]["class"] > 0
    assert {row["synthetic"] for row in metrics["agreement"]["per_class"].values()} == {1.0}
    told = [s["value"] for s in read_json(tmp_path / "run/screen/rejected.json")["samples"] if s["reason"] == "class"]
    assert max(told) < 0.5
    assert RunDir(screened / "run").metrics("screen")["rejected"]["class"] == 0


def test_training_images_of_one_class_give_no_classifier_and_no_distance_to_the_other(screened: Path, tmp_path: Path) -> None:
    cfg, run = again(screened, tmp_path)
    for path in (tmp_path / "shards/isic-train/parts").glob("*.json"):
        part = json.loads(path.read_text())
        part["columns"]["target"] = [0] * part["count"]
        path.write_text(json.dumps(part))
    cfg.screen.agreement = 0.9
    screen(cfg, run, Task())
    metrics = run.metrics("screen")
    assert metrics["agreement"] == {"auroc_val": None, "per_class": {}}
    assert metrics["rejected"]["class"] == 0
    assert metrics["distances"]["per_class"]["malignant"]["kid"] is None
    assert metrics["distances"]["per_class"]["benign"]["real_images"] == 40


def test_what_is_switched_off_sets_nothing_aside(screened: Path, tmp_path: Path) -> None:
    cfg, run = again(screened, tmp_path)
    cfg.screen.blur = cfg.screen.frame = cfg.screen.clipped = cfg.screen.saturation = cfg.screen.duplicate = cfg.screen.held_out = None
    cfg.screen.blank_std = 0
    screen(cfg, run, Task())
    assert {reason for reason, n in run.metrics("screen")["rejected"].items() if n} == {"broken", "copy"}


def test_another_feature_space_is_measured_anew_and_named(screened: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    cfg, run = again(screened, tmp_path)
    torch.manual_seed(0)
    small = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(small).save_pretrained(tmp_path / "dinov2-small")
    (tmp_path / "dinov2-small/preprocessor_config.json").write_text('{"size": 28}')
    cfg.screen.features = str(tmp_path / "dinov2-small")
    screen(cfg, run, Task())
    metrics = run.metrics("screen")
    assert metrics["features"] == "dinov2-small"
    assert metrics["kid"] != RunDir(screened / "run").metrics("screen")["kid"]
    assert metrics["rejected"] == RunDir(screened / "run").metrics("screen")["rejected"]
    torch.manual_seed(1)
    Dinov2Model(small).save_pretrained(tmp_path / "dinov2-small")  # other weights in the same folder
    (tmp_path / "run/screen/done.json").unlink()
    screen(cfg, run, Task())
    assert run.metrics("screen")["kid"] != metrics["kid"], "the features of the old weights were taken"


def test_too_few_accepted_stops_with_the_counts_and_leaves_no_list(screened: Path, tmp_path: Path) -> None:
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    for name in ("done", "accepted"):
        (tmp_path / f"run/screen/{name}.json").unlink()
    cfg.screen.min_accepted = 0.9
    with pytest.raises(UserError, match=r"of 36 synthetic images were accepted \(2 broken, 1 blank, \d copy, (\d [\w-]+, )*4 duplicate\)"):
        screen(cfg, run, Task())
    assert not (tmp_path / "run/screen/accepted.json").exists()
    assert (tmp_path / "run/screen/rejected.json").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_is_told(screened: Path, tmp_path: Path, split: str) -> None:
    cfg, run = again(screened, tmp_path)
    shutil.rmtree(tmp_path / f"shards/isic-{split}")
    write_manifest(tmp_path / f"shards/isic-{split}", 0)
    manifest = tmp_path / f"shards/isic-{split}/manifest.json"
    assert json.loads(manifest.read_text())["count"] == 0
    with pytest.raises(UserError, match=f"isic-{split} holds no images"):
        screen(cfg, run, Task())


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
    with pytest.raises(UserError, match=r"none of 1 benign images was accepted \(1 broken\); none of 1 malignant"):
        screen(cfg, run, Task())
    cfg.screen.on_fail = "warn"
    screen(cfg, run, Task())
    assert run.metrics("screen")["kid"] is None


def test_what_to_do_depends_on_what_failed(tmp_path: Path) -> None:
    cfg, run = settings(tmp_path / "a b")
    assert set(ADVICE) == {*REASONS, "kid", "kid unknown"}
    copied = advice(cfg, run, [gate.Failure("...", "copy")])
    assert "against copy: fewer finetune.steps" in copied
    assert "precision" not in copied
    both = advice(cfg, run, [gate.Failure("...", reason) for reason in ("blank", "kid", "blank")])
    assert "finetune.lr" not in both
    assert both.count("against blank: more generate.steps") == both.count("against kid: more finetune.steps") == 1
    command = re.search("'skinsynth (launch .*) KEY=VALUE' makes a new run", both)
    assert command
    assert shlex.split(command[1]) == ["launch", f"{run.path}/config.yaml", f"run={run.path}-2", "--reuse", str(run.path)]
    cfg.generate.weights = "base"
    assert "take another model.base or other prompts" in advice(cfg, run, [gate.Failure("...", "copy")])
    cfg.data.synthetic = "theirs"
    assert "give others as data.synthetic" in advice(cfg, run, [gate.Failure("...", "copy")])


def test_a_class_of_which_nothing_is_left_keeps_the_set_from_passing(screened: Path, tmp_path: Path, images: np.ndarray) -> None:
    """Of all images half are accepted: a classifier would be trained on synthetic benign ones alone."""
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    rows = synthetic([b"x" if i % 2 else encode_jpeg(image, 95) for i, image in enumerate(images[66:90])])
    asked = {name: {"target": target, "count": 12, "prompts": ["x"]} for target, name in enumerate(("benign", "malignant"))}
    write(tmp_path / "shards/run-synthetic", rows, 12, kind="synthetic", class_names=asked)
    cfg, run = settings(tmp_path)
    with pytest.raises(UserError, match=r"^only 0 of 12 malignant images were accepted \(12 broken\), less than .* of this class"):
        screen(cfg, run, Task())
    assert not (tmp_path / "run/screen/accepted.json").exists()
    metrics = read_json(tmp_path / "run/screen/metrics.json")
    assert metrics["accepted"] >= 0.2 * metrics["generated"]
    assert metrics["classes"]["malignant"] == {"generated": 12, "accepted": 0, "rejected": {**dict.fromkeys(REASONS, 0), "broken": 12}}
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    write(tmp_path / "shards/run-synthetic", rows[::2], 6, kind="synthetic", class_names=asked)
    screen(cfg, run, Task(0, 2))
    assert not (tmp_path / "run/screen/metrics.json").exists(), "a report would tell of the earlier set that it did not pass"
    with pytest.raises(UserError, match=r"^there is no malignant image, though some were asked for"):
        screen(cfg, run, Task(1, 2))
    asked["malignant"]["count"] = 0
    write_manifest(tmp_path / "shards/run-synthetic", 2, kind="synthetic", class_names=asked)
    screen(cfg, run, Task())


def test_test_images_among_the_synthetic_ones_are_found_whatever_was_done_to_them(screened: Path, tmp_path: Path, images: np.ndarray) -> None:
    """As in a set from elsewhere: mirrored, turned, as JPEG of low quality, cropped, tinted, all of these. None is near any training image."""
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    poses = [np.ascontiguousarray(turned[0]) for turned in copies.turns(images[60][None])]
    disguised = [copies.plant(images[45], 3, kind) for kind in ("crop", "colour", "jpeg", "all")]
    files = [*(encode_jpeg(image, 95) for image in images[66:80]), *(encode_jpeg(image, 80) for image in [*poses, *disguised])]
    write(tmp_path / "shards/run-synthetic", synthetic(files), 7, kind="synthetic", lineage={"group_ids": None})
    cfg, run = settings(tmp_path)
    screen(cfg, run, Task())
    told = {sample["key"]: (sample["reason"], sample["value"]) for sample in read_json(run.node("screen") / "rejected.json")["samples"]}
    assert [told.get(f"syn-{n:08d}") for n in range(14, 26)] == [("held-out", "test-004")] * 8 + [("held-out", "val-005")] * 4
    assert [told.get(f"syn-{n:08d}", ("", ""))[0] for n in range(14)].count("held-out") <= 1


def test_what_is_searched_knows_its_groups(screened: Path) -> None:
    """In the order of the images, over shards and splits; another group is another search."""
    cfg, run = settings(screened)
    sets = sets_of(screened)
    parts = Parts(cfg, run.node("screen") / "parts", sets, "")
    for kinds in (("train",), ("val", "test")):
        gallery = parts._gallery(kinds)
        assert gallery.groups == [group for kind in kinds for group in sets[kind].columns["group"]]
        pictures = [sets[kind].image(i) for kind in kinds for i in range(len(sets[kind]))]
        assert np.array_equal(gallery.thumbnails, np.stack([copies.thumbnail(picture) for picture in pictures]))
    before = {unit.kind: parts.made(unit) for unit in parts.units}
    sets["test"].columns["group"][3] = "another"
    after = {unit.kind: made for parts in [Parts(cfg, parts.folder, sets, "")] for unit in parts.units for made in [parts.made(unit)]}
    assert {kind for kind in before if before[kind] != after[kind]} == {"synthetic"}


def test_parts_of_an_older_version_are_made_anew(screened: Path, tmp_path: Path) -> None:
    """They say neither what was searched nor in how many turns."""
    cfg, run = again(screened, tmp_path)
    for path in (tmp_path / "run/screen/parts").glob("*.json"):
        part = read_json(path)
        for name in ("turns", "against", "network"):
            part["made"].pop(name, None)
        path.write_text(json.dumps(part))
    for path in (tmp_path / "run/screen/parts").glob("*.np[yz]"):
        if not path.name.startswith(("train", "val", "test")):
            path.write_bytes(b"of another form")
    screen(cfg, run, Task())
    assert outcome(tmp_path) == outcome(screened)


def test_withdrawn_images_are_screened_no_more(screened: Path, tmp_path: Path) -> None:
    """A real and a synthetic one are marked after the screening: the next one knows neither, and shards that hold none are not looked at again."""
    shutil.copytree(screened, tmp_path, dirs_exist_ok=True)
    cfg, run = settings(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/screen/parts").glob("*.json")}
    mark(tmp_path / "shards/run-synthetic", "P", ["syn-00000024", "syn-00000001"], "a test")
    assert not run.is_done("screen")
    screen(cfg, run, Task())
    told = [sample["key"] for sample in read_json(run.node("screen") / "rejected.json")["samples"]]
    kept = read_json(run.node("screen") / "accepted.json")["keys"]
    assert not {"syn-00000024", "syn-00000001"} & {*told, *kept}
    assert "syn-00000025" in told, "the others keep their reasons"
    assert run.metrics("screen")["generated"] == 34
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/screen/parts").glob("*.json")}
    changed = {name.split(".")[0] for name in before if after[name] != before[name]}
    assert len(changed) == 2, "only the two shards of the withdrawn images were looked at again"
    mark(tmp_path / "shards/isic-train", "P", ["train-005"], "a test")
    screen(cfg, run, Task())
    pairs = read_json(run.node("screen") / "pairs.json")
    assert "train-005" not in {pair["train_key"] for pair in pairs}
