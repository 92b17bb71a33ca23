from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import overrides

from skinsynth import config, knobs
from skinsynth.data.shards import Dataset
from skinsynth.errors import UserError
from skinsynth.run import RunDir, Task, read_json
from skinsynth.stages.generate import generate, plan


def begin(chain: Path, drawn: Path, folder: Path, **more: object) -> tuple[knobs.Config, RunDir]:
    """A run folder with the shared chain's weights and nothing generated."""
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **more))
    run = RunDir(folder / "run")
    run.create(cfg)
    shutil.copytree(chain / "run/finetune/weights", run.weights, copy_function=os.link)
    return cfg, run


def tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.tar"))}


def test_one_and_three_tasks_and_a_restart_give_the_same_bytes(chain: Path, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(chain, drawn, tmp_path)
    folder, reference = tmp_path / "shards/run-synthetic", chain / "shards/run-synthetic"
    for index in (2, 0):
        generate(cfg, run, Task(index, 3))
    assert not (folder / "manifest.json").exists()  # shard 1 is not there yet
    generate(cfg, run, Task(1, 3))
    assert tars(folder) == tars(reference)
    assert len(tars(folder)) == 3
    assert (folder / "manifest.json").read_bytes() == (reference / "manifest.json").read_bytes()
    for name in ("00001.tar", "parts/00001.json", "manifest.json"):
        (folder / name).unlink()
    generate(cfg, run, Task())
    assert tars(folder) == tars(reference)


def test_each_image_says_where_it_comes_from(chain: Path) -> None:
    data = Dataset.open(chain / "shards/run-synthetic")
    lineage = read_json(chain / "run/finetune/weights/lineage.json")
    assert data.manifest["lineage"] == lineage
    assert data.manifest["classes"] == {"0": 13, "1": 14}
    assert len(set(data.columns["seed"])) == len(data) == 27
    record = data.json(5)
    assert record["weights_sha256"] == lineage["weights_sha256"]
    assert (record["origin"], record["steps"], record["seed"]) == ("synthetic", 4, data.columns["seed"][5])
    wanted = config.load("configs/demo.yaml").generate.classes[record["class"]]
    assert (record["prompt"], record["target"]) == (wanted.prompts[0], wanted.target)
    assert ("melanoma" if record["target"] else "nevus") in record["prompt"]
    assert data.image(5).shape == (64, 64, 3)


def test_the_plan_mixes_classes_and_uses_prompts_in_turn() -> None:
    cfg = knobs.Config()
    cfg.generate.classes = {"a": config.GeneratedClass(0, ["p", "q"], 6), "b": config.GeneratedClass(1, ["r"], 3),
                            "none": config.GeneratedClass(1, [], 0)}
    images = plan(cfg)
    assert [i.name for i in images] == ["a", "b", "a"] * 3
    assert [i.prompt for i in images if i.name == "a"] == ["p", "q"] * 3
    assert plan(cfg) == images
    cfg.seed = 1
    assert not {i.seed for i in plan(cfg)} & {i.seed for i in images}
    cfg.generate.classes = {}
    with pytest.raises(UserError, match="asks for no image"):
        plan(cfg)


def test_changed_weights_are_refused(chain: Path, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(chain, drawn, tmp_path)
    path = run.weights / "unet/config.json"
    text = path.read_text()
    path.unlink()  # it is a hard link: the shared one must stay
    path.write_text(text + " ")
    with pytest.raises(UserError, match="is not what finetune wrote"):
        generate(cfg, run, Task())


def test_a_dataset_begun_with_other_settings_is_refused(chain: Path, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(chain, drawn, tmp_path)
    generate(cfg, run, Task(0, 3))
    cfg.generate.guidance = 9.0
    with pytest.raises(UserError, match="made from another request"):
        generate(cfg, run, Task(1, 3))
