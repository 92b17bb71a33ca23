"""Leakage that was planted: each kind is an error that names the samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Setup, plant, take_as_screened

from skinsynth.data.dataset import Dataset
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.stages.classify import classify
from skinsynth.stages.screen import check_lineage
from skinsynth.train.arms import Data
from skinsynth.world import World


def test_synthetic_images_in_the_test_split_are_an_error(make: Setup) -> None:
    cfg, run = make()
    test = run.dataset(cfg, "test")
    shutil.rmtree(test)
    shutil.copytree(run.dataset(cfg, "synthetic"), test)
    with pytest.raises(UserError, match="small-test is of kind 'synthetic': only real images may be in the test split"):
        Data(cfg, run, "baseline", 0)


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_a_patient_in_two_splits_is_an_error(make: Setup, one: str, other: str) -> None:
    cfg, run = make()
    there = Dataset.open(run.dataset(cfg, one))
    leaked, key = there.columns["group"][0], Dataset.open(run.dataset(cfg, other)).keys[1]
    plant(run, cfg, other, lambda part: part["columns"]["group"].__setitem__(1, leaked))
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 groups .* are in both .*{leaked}: {there.keys[0]}.*\({one}\) and {key} \({other}\)"):
        Data(cfg, run, "baseline", 0)


@pytest.mark.parametrize(("kind", "other"), [("patient", "test"), ("lesion", "val"), ("patient", "val")])
def test_a_patient_or_lesion_in_two_splits_is_an_error_whatever_the_groups_are_called(make: Setup, kind: str, other: str) -> None:
    """As after a split was prepared apart, or with another list of duplicates."""
    cfg, run = make()
    keys = {split: Dataset.open(run.dataset(cfg, split)).keys[2] for split in ("train", other)}
    for split in ("train", other):
        plant(run, cfg, split, lambda part: part["columns"][kind].__setitem__(2, "IX_same"))
    said = rf"(?s)leakage: 1 {kind}s are in both .*IX_same: {keys['train']} \(train\) and {keys[other]} \({other}\)"
    with pytest.raises(UserError, match=said):
        Data(cfg, run, "baseline", 0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_group_that_trained_the_generator_is_an_error(make: Setup, split: str) -> None:
    cfg, run = make()
    held_out = Dataset.open(run.dataset(cfg, split))
    group = held_out.columns["group"][0]
    plant(run, cfg, "synthetic", lambda manifest: manifest["lineage"]["group_ids"].append(group), manifest=True)
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 groups of the {split} split .* generator .*{group}: {held_out.keys[0]}"):
        Data(cfg, run, "hybrid", 0)
    assert Data(cfg, run, "baseline", 0).lineage is None, "an arm of real images has nothing to do with it"


@pytest.mark.parametrize("kind", ["images", "patients", "lesions"])
def test_what_trained_the_generator_is_found_under_another_group_name(make: Setup, kind: str) -> None:
    """Data that are prepared anew may name a group after another member, or lose it from the list of duplicates."""
    cfg, run = make()
    held_out = Dataset.open(run.dataset(cfg, "test"))
    names = {"images": held_out.keys[2], "patients": "IP_other", "lesions": "IL_other"}
    if kind != "images":
        plant(run, cfg, "test", lambda part: part["columns"][kind[:-1]].__setitem__(2, names[kind]))
    plant(run, cfg, "synthetic", lambda manifest: manifest["lineage"]["trained_on"][kind].append(names[kind]), manifest=True)
    said = rf"1 groups of the test split .* generator .*{held_out.columns['group'][2]}: {held_out.keys[2]}"
    with pytest.raises(UserError, match="(?s)leakage: " + said):
        Data(cfg, run, "hybrid", 0)
    with pytest.raises(UserError, match=rf"leakage: the generator .* 1 groups of the test split \(.*{held_out.keys[2]}"):
        check_lineage({kind: Dataset.open(run.dataset(cfg, kind)) for kind in ("synthetic", "val", "test")})


def test_an_older_lineage_is_compared_by_group_and_by_the_patients_of_the_plan(make: Setup) -> None:
    cfg, run = make()

    def older(part: dict[str, Any]) -> None:
        del part["columns"]["patient"], part["columns"]["lesion"]

    for kind in ("train", "val", "test"):
        for path in (run.dataset(cfg, kind) / "parts").glob("*.json"):
            change(path, older)
    held_out = Dataset.open(run.dataset(cfg, "test"))
    plan = run.dataset(cfg, "train") / "plan.json"
    change(plan, lambda plan: plan["samples"][held_out.keys[1]].update(patient_id="IP_then"))
    plant(run, cfg, "synthetic", lambda manifest: manifest["lineage"].pop("trained_on"), manifest=True)
    assert Data(cfg, run, "hybrid", 0).lineage == "known"
    plant(run, cfg, "synthetic", lambda manifest: manifest["lineage"]["group_ids"].append("IP_then"), manifest=True)
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 groups of the test split .*{held_out.columns['group'][1]}: {held_out.keys[1]}"):
        Data(cfg, run, "hybrid", 0)


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    found = read_json(path)
    how(found)
    path.write_text(json.dumps(found))


def test_a_child_of_a_test_image_is_an_error_whatever_its_group_was_called(make: Setup) -> None:
    cfg, run = make()
    keys, test = read_json(run.node("screen") / "accepted.json")["keys"], Dataset.open(run.dataset(cfg, "test"))
    for path in (run.dataset(cfg, "synthetic") / "parts").glob("*.json"):
        change(path, lambda part: part["columns"].update(source=[test.keys[2] if key == keys[0] else "none" for key in part["keys"]],
                                                         source_group=["then"] * len(part["keys"])))
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 synthetic images .*{keys[0]} from group {test.columns['group'][2]} \(.*{test.keys[2]}"):
        Data(cfg, run, "hybrid", 0)


def test_a_synthetic_child_of_a_test_patient_is_an_error(make: Setup) -> None:
    cfg, run = make()
    test, keys = Dataset.open(run.dataset(cfg, "test")), read_json(run.node("screen") / "accepted.json")["keys"]
    part = json.loads((run.dataset(cfg, "synthetic") / "parts/00000.json").read_text())
    child = next(key for key in part["keys"] if key in keys)
    parents = [test.columns["group"][2] if key == child else "nobody" for key in part["keys"]]
    for path in sorted((run.dataset(cfg, "synthetic") / "parts").glob("*.json")):
        found = json.loads(path.read_text())
        found["columns"]["source_group"] = parents if path.stem == "00000" else ["nobody"] * len(found["keys"])
        path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 synthetic images .*{child} from group {test.columns['group'][2]} \(.*{test.keys[2]}"):
        Data(cfg, run, "hybrid", 0)


@pytest.mark.parametrize("kind", ["synthetic", "train", "val"])
def test_a_test_image_among_those_that_are_trained_on_is_an_error(make: Setup, kind: str) -> None:
    """Its very bytes, under another name and in another group."""
    cfg, run = make()
    test, folder = Dataset.open(run.dataset(cfg, "test")), run.dataset(cfg, kind)
    there, manifest = Dataset.open(folder), read_json(folder / "manifest.json")
    files = [there.read(i, "jpg") for i in range(len(there))]
    planted = there.keys.index(read_json(run.node("screen") / "accepted.json")["keys"][3]) if kind == "synthetic" else 3
    files[planted] = test.read(1, "jpg")
    shutil.rmtree(folder)
    with ShardWriter(folder, 0) as shard:
        for i, (key, data) in enumerate(zip(there.keys, files, strict=True)):
            shard.add(key, {"jpg": data}, **{name: values[i] for name, values in there.columns.items()})
    write_manifest(folder, 1, **{k: v for k, v in manifest.items() if k in ("kind", "lineage")})
    take_as_screened(run, cfg)
    with pytest.raises(UserError, match=rf"(?s)leakage: 1 images of the test split lie, byte for byte, in .*{test.keys[1]} as {there.keys[planted]}"):
        Data(cfg, run, "hybrid", 0)


def test_weights_of_unknown_descent_are_allowed_and_told(make: Setup, caplog: pytest.LogCaptureFixture) -> None:
    cfg, run = make(steps=2)
    plant(run, cfg, "synthetic", lambda manifest: manifest["lineage"].update(group_ids=None), manifest=True)
    with caplog.at_level("WARNING"):
        classify(cfg, run, World(), "hybrid")
    assert caplog.text.count("unknown training data") == 1
    assert read_json(run.node("classify/hybrid") / "seed-0/metrics.json")["lineage"] == "unknown"
    assert run.metrics("classify/hybrid")["lineage"] == "unknown"
