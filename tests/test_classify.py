from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import overrides

from skinsynth import config, knobs
from skinsynth.data.order import sample_rng
from skinsynth.data.shards import Dataset
from skinsynth.errors import UserError
from skinsynth.models import vit
from skinsynth.quality.metrics import binary_metrics
from skinsynth.run import RunDir
from skinsynth.stages.classify import METRICS, Data, augment, check_held_out
from skinsynth.train.log import read_lines


@pytest.fixture
def setup(chain: Path, drawn: Path, tmp_path: Path) -> tuple[knobs.Config, RunDir]:
    """A run folder with the datasets and the screening of the shared chain; safe to change."""
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path))
    run = RunDir(tmp_path / "run")
    run.create(cfg)
    shutil.copytree(chain / "shards", tmp_path / "shards")
    shutil.copytree(chain / "run/screen", run.node("screen"))
    return cfg, run


def test_weights_load_with_plain_transformers_and_give_the_predictions(chain: Path) -> None:
    from transformers import AutoModelForImageClassification

    arm = chain / "run/classify/hybrid"
    model = AutoModelForImageClassification.from_pretrained(arm / "weights").eval()
    assert model.config.id2label == {0: "benign", 1: "malignant"}
    test = Dataset.open(chain / "shards/small-test")
    rows = list(csv.DictReader((arm / "predictions.csv").open()))
    assert [r["key"] for r in rows] == test.keys
    images = torch.from_numpy(np.stack([test.image(i).transpose(2, 0, 1) for i in range(4)]))
    with torch.inference_mode():
        scores = vit.logits(model, images, 64).softmax(1)[:, 1]
    assert scores.tolist() == pytest.approx([float(r["score"]) for r in rows[:4]], abs=1e-4)


def test_the_result_is_that_of_the_checkpoint_chosen_on_validation(chain: Path) -> None:
    for arm in ("baseline", "hybrid"):
        folder = chain / "run/classify" / arm
        epochs, done = read_lines(folder / "epochs.jsonl"), json.loads((folder / "done.json").read_text())["metrics"]
        assert [row["step"] for row in epochs] == [4, 8, 12]
        best = max(epochs, key=lambda row: row["val"]["auroc"])
        assert done["chosen_step"] == best["step"]
        assert {m: done[m] for m in METRICS} == {m: best["test"][m] for m in METRICS}
        rows = list(csv.DictReader((folder / "predictions.csv").open()))
        again = binary_metrics(np.array([int(r["target"]) for r in rows]), np.array([float(r["score"]) for r in rows]))
        assert again["auroc"] == pytest.approx(done["auroc"])


def test_arms_differ_in_their_sources_alone(setup: tuple[knobs.Config, RunDir]) -> None:
    cfg, run = setup
    real, hybrid = (Data(cfg, run, arm) for arm in ("baseline", "hybrid"))
    assert (real.names, hybrid.names) == (["real"], ["real", "synthetic"])
    assert [hybrid.mixture.at(k)[0] for k in range(8)] == [0, 1] * 4
    batch = hybrid.batch(range(4))
    assert (batch["images"].shape, batch["images"].dtype) == ((4, 3, 64, 64), torch.uint8)
    assert torch.equal(batch["images"], Data(cfg, run, "hybrid").batch(range(4))["images"])


def test_augmentation_is_the_samples_own() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    assert np.array_equal(augment(image, sample_rng(0, 3)), augment(image, sample_rng(0, 3)))
    assert len({augment(image, sample_rng(0, k)).tobytes() for k in range(20)}) == 20
    rng = sample_rng(0, 5)
    turned = np.rot90(image, int(rng.integers(4)))
    turned = turned[:, ::-1] if rng.random() < 0.5 else turned
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
    assert np.array_equal(augment(image, sample_rng(0, 5)), np.clip(turned * gain + offset, 0, 255).astype(np.uint8))


def test_synthetic_images_in_the_test_split_are_an_error(setup: tuple[knobs.Config, RunDir], chain: Path) -> None:
    cfg, run = setup
    test = run.dataset(cfg, "test")
    shutil.rmtree(test)
    shutil.copytree(run.dataset(cfg, "synthetic"), test)
    with pytest.raises(UserError, match="small-test is of kind 'synthetic': only real images may be in the test split"):
        Data(cfg, run, "baseline")


def test_a_group_in_two_splits_is_an_error(setup: tuple[knobs.Config, RunDir]) -> None:
    cfg, run = setup
    splits = {name: Dataset.open(run.dataset(cfg, name)) for name in ("train", "val", "test")}
    leaked = splits["train"].columns["group"][0]
    splits["val"].columns["group"][1] = leaked
    with pytest.raises(UserError, match=f"leakage: 1 groups of the val split were trained on .*{leaked}"):
        check_held_out(splits, {})


def test_a_test_group_that_trained_the_generator_is_an_error(setup: tuple[knobs.Config, RunDir]) -> None:
    cfg, run = setup
    path = run.dataset(cfg, "synthetic") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["lineage"]["group_ids"].append(Dataset.open(run.dataset(cfg, "test")).columns["group"][0])
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leakage: 1 groups of the test split"):
        Data(cfg, run, "hybrid")


def test_what_is_missing_is_named(setup: tuple[knobs.Config, RunDir]) -> None:
    cfg, run = setup
    os.unlink(run.node("screen") / "accepted.json")
    with pytest.raises(UserError, match="were not screened"):
        Data(cfg, run, "hybrid")
    cfg.classify.model = "nobody/nothing"
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        vit.build(cfg.classify, 64, 0)
    cfg.classify.model, cfg.classify.patch = "small", 7
    with pytest.raises(UserError, match="patch=7 does not divide the image side of 64"):
        vit.build(cfg.classify, 64, 0)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_bad_training_image_stops_or_is_replaced(setup: tuple[knobs.Config, RunDir], on_error: str) -> None:
    cfg, run = setup
    folder = run.dataset(cfg, "train")
    os.truncate(folder / "00000.tar", 5000)
    cfg.data.on_error = on_error
    if on_error == "stop":
        with pytest.raises(UserError, match=r"00000.tar is missing or has not the"):
            Data(cfg, run, "baseline")
        return
    data = Data(cfg, run, "baseline")
    assert data.batch(range(len(data.sources["real"])))["images"].shape[1:] == (3, 64, 64)
    bad = data.sources["real"].bad
    assert {error.shard for error in bad} == {"00000.tar"}
    assert len(bad) > 10
    other = Data(cfg, run, "baseline")
    assert torch.equal(other.batch(range(7, 9))["images"], data.batch(range(7, 9))["images"]), "the same whatever was read before"
    os.truncate(run.dataset(cfg, "test") / "00000.tar", 5000)
    with pytest.raises(UserError, match=r"small-test/00000.tar is missing or has not the"):  # what is judged on must be whole
        Data(cfg, run, "baseline")
