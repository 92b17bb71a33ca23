"""Synthetic images that were made elsewhere: from each form of folder into a dataset, and through the chain."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import overrides, skinsynth

from skinsynth import config
from skinsynth.chain import chain as nodes
from skinsynth.data import external
from skinsynth.data.export import export
from skinsynth.data.shards import Dataset
from skinsynth.data.verify import verify
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.run import RunDir, Task
from skinsynth.stages.prepare import prepare


@pytest.fixture(scope="module")
def folders(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The chain's own synthetic images as other people's folders."""
    root = tmp_path_factory.mktemp("elsewhere")
    dataset = chain / "shards/run-synthetic"
    export(dataset, root / "siim", "siim", None)
    export(dataset, root / "imagefolder", "imagefolder", None)
    target = dict(zip((data := Dataset.open(dataset)).keys, data.columns["target"], strict=True))
    for name in ("benign", "malignant"):
        (root / "two" / name).mkdir(parents=True)
    for key, number in target.items():
        shutil.copy(root / f"siim/images/{key}.jpg", root / "two" / external.CLASSES[number])
    labels = root / "labels"
    shutil.copytree(root / "imagefolder/train", labels)
    lines = ["file_name,label", *(f"{key}.jpg,{external.CLASSES[number]}" for key, number in target.items())]
    (labels / "metadata.csv").write_text("\n".join(lines))
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("form", ["siim", "imagefolder", "two", "labels"])
def test_every_form_of_folder_is_read(folders: dict[str, Path], form: str) -> None:
    rows, aside = external.read(folders[form])
    assert aside == []
    assert sorted(row.target for row in rows) == [0] * 13 + [1] * 14
    assert all(Path(str(row.file)).is_file() for row in rows)


def test_they_become_a_dataset_whatever_the_number_of_tasks(folders: dict[str, Path], drawn: Path, chain: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(folders["siim"], images)
    (images / "images/syn-00000005.jpg").write_bytes(b"no image")
    (images / "images/syn-00000006.jpg").unlink()
    tars = []
    for name, tasks in (("one", 1), ("three", 3)):
        cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path / name, **{"data.synthetic": images, "prepare.shard_size": 10}))
        run = RunDir(Path(cfg.run))
        run.create(cfg)
        for index in reversed(range(tasks)):
            assert not run.is_done("prepare")
            prepare(cfg, run, Task(index, tasks))
        assert run.is_done("prepare")
        folder = run.dataset(cfg, "synthetic")
        tars.append([path.read_bytes() for path in sorted(folder.glob("*.tar"))])
        assert verify(folder).problems == []
    assert len(tars[0]) == 3
    assert tars[0] == tars[1]
    data = Dataset.open(folder)
    assert len(data) == 25
    assert [item["reason"] for item in data.manifest["set_aside"]] == ["not an image"]
    assert [item["reason"] for item in data.manifest["not_used"]] == ["image file is missing"]
    assert data.manifest["lineage"]["group_ids"] is None
    assert data.json(0)["made"] == "elsewhere"
    assert data.image(0).shape == (64, 64, 3)
    (images / "images/syn-00000007.jpg").write_bytes((images / "images/syn-00000008.jpg").read_bytes())
    (folder / "plan.json").unlink()
    with pytest.raises(UserError, match="made from another request"):
        external.make_units(cfg, run, Task())


@pytest.mark.timeout(300)
def test_through_the_chain_without_finetuning(folders: dict[str, Path], drawn: Path, chain: Path, tmp_path: Path) -> None:
    """Screened and trained on like our own; their unknown lineage is said."""
    for split in ("train", "val", "test"):
        shutil.copytree(chain / f"shards/small-{split}", tmp_path / f"shards/small-{split}", copy_function=os.link)
    items = overrides(drawn, tmp_path, **{"data.synthetic": folders["two"], "cluster": "debug"})
    assert [n.name for n in nodes(config.load("configs/demo.yaml", items))] == ["prepare", "screen", "classify/baseline", "classify/hybrid", "report"]
    done = skinsynth("launch", "configs/demo.yaml", *items)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "27, of unknown lineage" in done.stdout
    report = read_json(tmp_path / "run/report/report.json")
    assert report["synthetic"]["generated"] == 27
    page = " ".join((tmp_path / "run/report/index.html").read_text().split())
    said = "nobody can tell whether test images were among what it saw"
    assert page.count(said) == 3, "in the verdict, beside the pictures, and where their screening is told"
    assert f"{said}. If they were, the figures of hybrid may be too good" in page
    assert re.search(r"\d+ synthetic of unknown lineage", page)
    assert "not up to date" not in page
    sheet = (tmp_path / "shards/run-synthetic/DATASHEET.md").read_text()
    assert said in sheet
    assert "| images made elsewhere | 27 |" in sheet
    assert "starts from no photograph" not in sheet
    plan = json.loads(skinsynth("estimate", "configs/demo.yaml", *items, "--json").stdout)["plan"]
    assert plan["classes"] == {"benign": {"images": 13}, "malignant": {"images": 14}}


def test_a_folder_that_cannot_be_used_is_told(drawn: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "is not a folder"), (tmp_path, "has neither metadata.csv")):
        with pytest.raises(UserError, match=message):
            external.read(path)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.jpg,benign\n")
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.synthetic": tmp_path}))
    with pytest.raises(UserError, match=r"holds no image that can be used \(image file is missing\)"):
        external.make_units(cfg, RunDir(Path(cfg.run)), Task())
