"""Synthetic images that were made elsewhere: from each form of folder into a dataset, and through the chain."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import overrides, skinsynth
from PIL import Image
from rich.console import Console

from skinsynth import config
from skinsynth.chain import chain as nodes
from skinsynth.data import external
from skinsynth.data.dataset import Dataset
from skinsynth.data.export import export
from skinsynth.data.images import read_image
from skinsynth.data.shards import KEY
from skinsynth.data.verify import verify
from skinsynth.data.withdrawn import mark
from skinsynth.doctor import check
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.reuse import take_over
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


FORMS = {  # files, table, keys
    "split and labels": (["train/benign/1.png", "train/malignant/1.png"], {}, ["benign_1", "malignant_1"]),
    "upper case": (["Train/Benign/1.PNG", "Train/MALIGNANT/1.jpg"], {}, ["Benign_1", "MALIGNANT_1"]),
    "numbers": (["0/a.png", "1/a.png"], {}, ["0_a", "1_a"]),
    "webp": (["benign/1.webp", "malignant/1.WebP"], {}, ["benign_1", "malignant_1"]),
    "paths in the table": (["train/benign/1.png", "train/malignant/1.png"],
                           {"train/metadata.csv": "file_name,label\nbenign/1.png,benign\nmalignant/1.png,malignant\n"}, ["benign_1", "malignant_1"]),
    "labels by folder": (["benign/1.png", "malignant/1.png"], {"Metadata.CSV": "file_name,text\nbenign/1.png,a mole\nmalignant\\1.png,a melanoma\n"},
                         ["benign_1", "malignant_1"]),
    "lines of JSON": (["train/a.png", "train/b.png"], {"train/metadata.jsonl": '{"file_name": "a.png", "label": 0, "more": [1]}\n\n'
                                                                              '{"file_name": "b.png", "label": true}\n'}, ["a", "b"]),
    "spaces and dots": (["a 1.png", "b.2.png", "\u00e4.png"], {"metadata.csv": "file_name,label\na 1.png,0\nb.2.png,1\n\u00e4.png,1\n"},
                        ["_", "a_1", "b_2"]),
    "below images": (["images/x.webp", "images/y.jpg"], {"metadata.csv": "isic_id,benign_malignant\nx,benign\ny,malignant\n"}, ["x", "y"]),
}


def write_files(root: Path, files: list[str], tables: dict[str, str]) -> None:
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        written, data = cv2.imencode(Path(name).suffix.lower(), np.full((32, 32, 3), 90 + number, np.uint8))
        assert written
        (root / name).write_bytes(data.tobytes())
    for name, text in tables.items():
        (root / name).write_text(text)


@pytest.mark.parametrize("form", FORMS)
def test_folders_as_the_hub_has_them_are_read(form: str, tmp_path: Path) -> None:
    files, tables, keys = FORMS[form]
    write_files(tmp_path, files, tables)
    rows, aside = external.read(tmp_path)
    assert aside == []
    assert sorted(row.image_name for row in rows) == keys
    assert {0, 1} == {row.target for row in rows}
    assert {str(Path(str(row.file)).relative_to(tmp_path)) for row in rows} == set(files)
    assert all(read_image(Path(str(row.file))).shape == (32, 32, 3) for row in rows)


def test_names_that_give_the_same_key_stay_two_images(tmp_path: Path) -> None:
    long = "x" * 130
    files = ["a 1.png", "a_1.png", "a_1.jpg", f"{long}1.png", f"{long}2.png"]
    lines = [f"{name},{n % 2}" for n, name in enumerate(files)]
    write_files(tmp_path, files, {"metadata.csv": "\n".join(["file_name,label", *lines, lines[0]])})
    rows, aside = external.read(tmp_path)
    assert [item["reason"] for item in aside] == ["duplicated id (the same row again; kept once)"]
    assert len({row.image_name for row in rows}) == 5
    assert all(KEY.fullmatch(row.image_name) for row in rows)
    assert [Path(str(row.file)).name for row in rows] == files


def test_no_path_leaves_the_folder(tmp_path: Path) -> None:
    write_files(tmp_path, ["secret.png", "set/a.png", "set/b.png"], {})
    outside = ["../secret.png", str(tmp_path / "secret.png"), "b/../../secret.png", "..\\secret.png"]
    lines = [json.dumps({"file_name": name, "label": n % 2}) for n, name in enumerate(["a.png", "b.png", *outside, "none.png"])]
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(lines))
    rows, aside = external.read(tmp_path / "set")
    assert [row.image_name for row in rows] == ["a", "b"]
    assert [item["reason"] for item in aside] == ["the image's path leaves the folder"] * 4 + ["image file is missing"]


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


@pytest.mark.timeout(600)
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
    cfg = config.load("configs/demo.yaml", [*items, f"run={tmp_path / 'again'}"])
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    take_over(cfg, run, RunDir(tmp_path / "run"), Console(quiet=True))
    assert [node.name for node in nodes(cfg) if not run.is_done(node.name)] == ["report"]
    assert (tmp_path / "shards/again-synthetic/manifest.json").exists()


@pytest.mark.parametrize("root", ["", "train/"])
def test_a_folder_of_one_class_is_read_and_the_other_one_said_to_be_missing(root: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                            ) -> None:
    source = tmp_path / "source"
    write_files(source, [f"{root}malignant/1.png", f"{root}malignant/2.png"], {})
    (source / root / "notes").mkdir()
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.synthetic": source}))
    told = next(one for one in check.data(cfg) if one.name == "data.synthetic")
    assert (told.state, told.found) == ("ok", f"{source}: 2 images, no benign one")
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    external.make_units(cfg, run, Task())
    assert external.finish(cfg, run)
    assert f"synthetic images from {source}: 2 (no benign one), of unknown lineage; 0 could not be used" in capsys.readouterr().out
    assert Dataset.open(run.dataset(cfg, "synthetic")).manifest["classes"] == {"1": 2}
    write_files(source, [f"{root}nevus/1.png"], {})
    with pytest.raises(UserError, match=r"nor folders benign and malignant \(or one of them and no other\)"):
        external.read(source)


def test_a_folder_that_cannot_be_used_is_told(drawn: Path, tmp_path: Path) -> None:
    write_files(tmp_path, ["half/benign/1.png", "lines/a.png"], {"lines/metadata.jsonl": '{"file_name": "a.png"}\nno JSON'})
    (tmp_path / "half/malignant").mkdir()
    for path, message in ((tmp_path / "no", "is not a folder"), (tmp_path, "has neither metadata.csv .* it has: half, lines.* another form"),
                          (tmp_path / "half", "the folder malignant in .*half holds no image"),
                          (tmp_path / "lines", "line 2 of .* is no JSON object")):
        with pytest.raises(UserError, match=message):
            external.read(path)
    (tmp_path / "metadata.csv").write_text("file_name,label\na.jpg,benign\n")
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.synthetic": tmp_path}))
    with pytest.raises(UserError, match=r"holds no image that can be used \(image file is missing\)"):
        external.make_units(cfg, RunDir(Path(cfg.run)), Task())


@pytest.mark.parametrize("when", ["planned", "read"])
def test_too_many_bad_images_stop_it(when: str, drawn: Path, tmp_path: Path) -> None:
    """Those that a table does not list are left out on purpose."""
    write_files(tmp_path / "source", [f"{n}.png" for n in range(10)], {})
    bad = ["8", "9"]
    for name in bad:
        if when == "read":
            (tmp_path / f"source/{name}.png").write_bytes(b"no image")
        else:
            (tmp_path / f"source/{name}.png").unlink()
    (tmp_path / "source/metadata.csv").write_text("\n".join(["file_name,label", *(f"{n}.png,{n % 2}" for n in range(4, 10))]))
    items = {"data.synthetic": tmp_path / "source", "prepare.max_bad": 0.3}
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **items))
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    folder = run.dataset(cfg, "synthetic")

    def make() -> bool:
        external.make_units(cfg, run, Task())
        return external.finish(cfg, run)

    with pytest.raises(UserError, match=rf"^2 of 6 images cannot be used, more than prepare.max_bad=0.3 .* delete {folder} and prepare again"):
        make()
    assert all(name in (folder / "set_aside.csv").read_text() for name in bad)
    cfg.prepare.max_bad = 0.4  # the same folder goes on
    assert make()
    assert Dataset.open(folder).manifest["count"] == 4


def test_an_image_that_changes_after_the_plan_stops_the_task(drawn: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_files(source, ["benign/1.png", "malignant/1.png"], {})
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.synthetic": source}))
    run = RunDir(tmp_path / "run")
    external._plan(cfg, run.dataset(cfg, "synthetic"))
    image = source / "benign/1.png"
    image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(UserError, match=f"{image.name} has changed since prepare looked at the images"):
        external.make_units(cfg, run, Task())
    image.unlink()
    with pytest.raises(UserError, match=f"{image.name} is gone since prepare looked at the images"):
        external.make_units(cfg, run, Task())


def test_images_in_folders_within_a_class_are_told(tmp_path: Path) -> None:
    for name in ("benign/a.tif", "malignant/b.JPG", "malignant/more/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 150, 120)).save(tmp_path / name)
    rows, aside = external.read(tmp_path)
    assert {Path(row.file or "").name for row in rows} == {"a.tif", "b.JPG"}
    assert aside == [{"key": "malignant/more/c.jpg", "reason": "in a folder within its class's folder: put it beside the others"}]


def test_real_images_are_no_synthetic_ones(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png", "b.png"], {"metadata.csv": "file_name,label,origin\na.png,0,synthetic\nb.png,1,real\n"})
    rows, aside = external.read(tmp_path)
    assert [row.image_name for row in rows] == ["a"]
    assert aside == [{"key": "b", "reason": "not synthetic: origin is 'real'"}]
    (tmp_path / "metadata.csv").write_text("file_name,label,origin\nb.png,1,real\n")
    with pytest.raises(UserError, match=r"data\.synthetic: by the column origin of .* no image is synthetic \(real\): give them as data\.metadata"):
        external.read(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label,image_type\nb.png,1,clinical\n")
    with pytest.raises(UserError, match=r"data\.synthetic: by the column image_type"):
        external.read(tmp_path)


def test_who_withdrew_does_not_come_back_as_synthetic(drawn: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "source", ["benign/ISIC_7.png", "benign/x.png", "malignant/y.png"], {})
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.synthetic": tmp_path / "source"}))
    mark(Path(cfg.data.shards), "IP_1", ["ISIC_7"], "withdrew", kind="patient")
    plan = external._plan(cfg, RunDir(tmp_path / "run").dataset(cfg, "synthetic"))
    assert sorted(row["image_name"] for row in plan["rows"]) == ["benign_x", "malignant_y"]
    assert plan["aside"] == [{"key": "benign_ISIC_7", "reason": "withdrawn: see withdrawn.json beside the datasets"}]


def test_images_that_a_table_does_not_list_are_told(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.png", "b.png", "images/c.jpg", "more/d.png"], {"metadata.csv": "file_name,label\na.png,0\nc,1\nlinked/d.png,1\n"})
    (tmp_path / "linked").symlink_to(tmp_path / "more")
    rows, aside = external.read(tmp_path)
    assert [row.image_name for row in rows] == ["a", "c", "linked_d"]
    assert aside == [{"key": "b.png", "reason": "not listed in metadata.csv"}]
