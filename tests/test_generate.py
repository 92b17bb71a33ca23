from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, free_port, overrides, until

from skinsynth import config, knobs
from skinsynth.chain import chain as nodes
from skinsynth.data.codec import decode, encode_jpeg
from skinsynth.data.dataset import Dataset
from skinsynth.data.export import show
from skinsynth.data.plan import Plan, Planned
from skinsynth.data.verify import verify
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.models import hub
from skinsynth.models.diffusion import base_sha256, weights_sha256
from skinsynth.models.painter import Painter, Weights
from skinsynth.run import RunDir, Task
from skinsynth.stages.generate import _fault, generate, regenerate


def begin(chain: Path, drawn: Path, folder: Path, **more: object) -> tuple[knobs.Config, RunDir]:
    """A run folder with the shared chain's weights and nothing generated."""
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **more))
    run = RunDir(Path(cfg.run))
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


@pytest.mark.soak  # compiling takes a minute and more
@pytest.mark.timeout(600)
def test_compiled_the_tasks_give_the_same_bytes_and_nearly_the_same_images(chain: Path, drawn: Path, tmp_path: Path) -> None:
    _, run = begin(chain, drawn, tmp_path, **{"model.compile": True})
    for index in range(3):
        done = job(run, "--task", f"{index}/3")
        assert done.wait() == 0
    assert any(run.compiled.iterdir())
    mine, plain = Dataset.open(tmp_path / "shards/run-synthetic"), Dataset.open(chain / "shards/run-synthetic")
    assert mine.manifest["settings"]["compiled"]
    assert mine.keys == plain.keys
    assert max(np.abs(mine.image(n).astype(int) - plain.image(n)).mean() for n in range(len(mine))) < 1
    whole = tars(tmp_path / "shards/run-synthetic")
    shutil.rmtree(tmp_path / "shards/run-synthetic")
    assert job(run).wait() == 0
    assert tars(tmp_path / "shards/run-synthetic") == whole


def test_each_image_says_where_it_comes_from(chain: Path) -> None:
    data = Dataset.open(chain / "shards/run-synthetic")
    lineage = read_json(chain / "run/finetune/weights/lineage.json")
    assert data.manifest["lineage"] == {**lineage, "trained_group_ids": lineage["group_ids"]}
    assert data.manifest["classes"] == {"0": 13, "1": 14}
    assert len(set(data.columns["seed"])) == len(data) == 27
    record = data.json(5)
    assert record["weights_sha256"] == lineage["weights_sha256"]
    assert (record["origin"], record["steps"], record["seed"]) == ("synthetic", 4, data.columns["seed"][5])
    wanted = config.load("configs/demo.yaml").generate.classes[record["class"]]
    assert (record["prompt"], record["target"]) == (wanted.prompts[0], wanted.target)
    assert ("melanoma" if record["target"] else "nevus") in record["prompt"]
    assert data.image(5).shape == (64, 64, 3)


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


# ---- broken off, done twice, done by many ----

def job(run: RunDir, *more: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "jobs.generate", str(run.path), *more], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]


def test_killed_inside_a_unit_it_loses_one_batch_at_most(chain: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.commit_every": 1, "generate.batch": 2})
    folder = tmp_path / "shards/run-synthetic"
    process = job(run)
    until("four images are saved",
          lambda: [saved for path in folder.glob(".00000.json.*.tmp") if len((saved := json.loads(path.read_text()))["keys"]) >= 4])
    process.kill()
    process.wait()
    assert not (folder / "00000.tar").exists()
    saved = len(json.loads(next(folder.glob(".00000.json.*.tmp")).read_text())["keys"])
    batches, draw = [], Painter.draw
    monkeypatch.setattr(Painter, "draw", lambda self, batch: (batches.append([i.number for i in batch]), draw(self, batch))[1])
    generate(cfg, run, Task())
    assert batches[0] == [saved, saved + 1], "it goes on with the first image that was not saved"
    assert len(batches) == sum(-(-n // 2) for n in (9 - saved, 9, 9))
    told = read_json(run.progress_path("generate", 0))
    assert (told["begun_at"], told["done"]) == (saved, 27), "what was saved is no work of this turn"
    whole, other = begin(chain, drawn, tmp_path / "undisturbed", **{"generate.batch": 2})
    generate(whole, other, Task())
    assert tars(folder) == tars(tmp_path / "undisturbed/shards/run-synthetic")
    assert list(folder.glob(".*")) == []
    assert verify(folder).problems == []


def test_two_tasks_that_were_handed_the_same_units_do_no_harm(chain: Path, drawn: Path, tmp_path: Path) -> None:
    _, run = begin(chain, drawn, tmp_path)
    both = [job(run), job(run)]
    told = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    folder = tmp_path / "shards/run-synthetic"
    assert tars(folder) == tars(chain / "shards/run-synthetic")
    assert list(folder.rglob(".*")) == []
    assert verify(folder).problems == []


def test_the_ranks_of_a_gang_take_the_units_in_turn(chain: Path, drawn: Path, tmp_path: Path) -> None:
    _, run = begin(chain, drawn, tmp_path, **{"generate.mode": "gang", "cluster.stages.generate.tasks_per_node": 2})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
                           "-m", "jobs.generate", str(run.path)], cwd=ROOT, text=True, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tars(tmp_path / "shards/run-synthetic") == tars(chain / "shards/run-synthetic")
    shares = [read_json(run.progress_path("generate", rank)) for rank in (0, 1)]
    assert sum(share["done"] for share in shares) == 27
    assert min(share["done"] for share in shares) > 0, "both had a part in it"
    assert run.is_done("generate")
    assert run.unfinished("generate", 1) == []


def test_a_file_that_may_not_grow_is_told_and_gone_on_from(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """As on a full disk or above a quota: no shard of 27 images fits, all else does."""
    _, run = begin(chain, drawn, tmp_path, **{"generate.shard_size": 27})
    process = job(run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 1, told
    assert "no space left, or the quota or file limit is reached" in told
    assert "Traceback" not in told
    folder = tmp_path / "shards/run-synthetic"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["provenance.json", "request.json"]
    process = job(run)
    assert process.wait(200) == 0
    assert verify(folder).problems == []


# ---- faulty images, changed weights ----

def poison(monkeypatch: pytest.MonkeyPatch, bad: dict[int, int]) -> None:
    """Image -> in how many of its attempts the noise is no number, so that the network's output is none."""
    noise = Painter.noise

    def poisoned(self: Painter, image: Planned) -> np.ndarray:
        return noise(self, image) * (np.float32(np.nan) if image.attempt < bad.get(image.number, 0) else np.float32(1))

    monkeypatch.setattr(Painter, "noise", poisoned)


def test_faulty_images_are_drawn_from_their_next_seeds_and_then_left_out(chain: Path, drawn: Path, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.retries": 2, "generate.commit_every": 1})
    poison(monkeypatch, {3: 1, 7: 2, 8: 99, 20: 1})
    generate(cfg, run, Task())
    folder = tmp_path / "shards/run-synthetic"
    data, plan = Dataset.open(folder), Plan(cfg, None)
    assert len(data) == 26
    attempts = dict(zip(data.keys, data.columns["attempt"], strict=True))
    assert {key: attempt for key, attempt in attempts.items() if attempt} == {"syn-00000003": 1, "syn-00000007": 2, "syn-00000020": 1}
    place = data.keys.index("syn-00000007")
    assert data.json(place)["seed"] == data.columns["seed"][place] == plan.image(7, 2).seed
    assert data.manifest["set_aside"] == [{"key": "syn-00000008", "reason": "values that are not finite from each of 3 seeds"}]
    assert run.metrics("generate")["left_out"] == 1
    found = verify(folder)
    assert (found.problems, found.images, found.left_out, found.planned) == ([], 26, 1, 27)
    with pytest.raises(UserError, match=r"left out of .*: values that are not finite"):
        show(folder, "syn-00000008")
    again = regenerate(cfg, run, ["syn-00000007", "syn-00000003", "syn-00000004"])
    for key, pixels in again.items():
        assert encode_jpeg(pixels, cfg.generate.quality) == show(folder, key)[1], key


def test_where_no_image_can_be_made_it_says_so(chain: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.retries": 0, "generate.classes.benign.count": 2, "generate.classes.malignant.count": 2})
    poison(monkeypatch, dict.fromkeys(range(4), 1))
    with pytest.raises(UserError, match="none of the 4 planned images could be made; the first: values that are not finite"):
        generate(cfg, run, Task())
    assert not run.is_done("generate")


def test_a_picture_of_one_colour_is_a_fault() -> None:
    flat = np.full((8, 8, 3), 40, np.uint8)
    assert "one colour alone" in str(_fault(flat, True))
    flat[0, 0, 2] = 90
    assert _fault(flat, True) is None
    assert "not finite" in str(_fault(flat, False))


def test_weights_that_change_under_a_running_task_are_refused(chain: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = begin(chain, drawn, tmp_path)
    path, draw, before = run.weights / "unet/config.json", Painter.draw, read_json(run.weights / "lineage.json")["weights_sha256"]

    def change(self: Painter, batch: list[Planned]) -> object:
        text = path.read_text()
        path.unlink()  # it is a hard link: the shared one must stay
        path.write_text(text + " ")
        return draw(self, batch)

    monkeypatch.setattr(Painter, "draw", change)
    with pytest.raises(UserError, match=f"changed while they were used: {before} at the start, [0-9a-f]{{64}} now"):
        generate(cfg, run, Task())
    assert [p.name for p in (tmp_path / "shards/run-synthetic").glob("*.tar")] == ["00000.tar"]


def test_weights_that_changed_between_two_launches_are_refused_with_both_hashes(chain: Path, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(chain, drawn, tmp_path)
    generate(cfg, run, Task(0, 3))
    before = read_json(run.weights / "lineage.json")
    shutil.copytree(run.weights, tmp_path / "other")
    (tmp_path / "other/unet/config.json").write_text((run.weights / "unet/config.json").read_text() + " ")
    after = weights_sha256(tmp_path / "other")
    shutil.rmtree(run.weights)
    (tmp_path / "other").rename(run.weights)
    (run.weights / "lineage.json").unlink()
    (run.weights / "lineage.json").write_text(json.dumps({**before, "weights_sha256": after}))
    with pytest.raises(UserError, match=f"weights_sha256: {before['weights_sha256']} -> {after}"):
        generate(cfg, run, Task(1, 3))


# ---- from what, and how ----

@pytest.mark.parametrize(("method", "more"), [("image-to-image", {}), ("inpaint", {"generate.redraw": "lesion"}),
                                              ("inpaint", {"generate.redraw": "skin"})])
def test_from_training_images(chain: Path, drawn: Path, tmp_path: Path, method: str, more: dict[str, str]) -> None:
    """Each says which image, of which group, it was drawn over; and the bytes are the same with two tasks."""
    settings = {"generate.method": method, "generate.strength": 0.5, "generate.classes.benign.count": 5, "generate.classes.malignant.count": 5,
                "generate.shard_size": 5}
    shutil.copytree(chain / "shards/small-train", tmp_path / "shards/small-train", copy_function=os.link)
    found = []
    for name, tasks in (("one", 1), ("two", 2)):
        cfg, run = begin(chain, drawn, tmp_path, run=name, **settings, **more)
        for index in range(tasks):
            generate(cfg, run, Task(index, tasks))
        found.append(tars(run.dataset(cfg, "synthetic")))
    assert len(found[0]) == 2
    assert found[0] == found[1]
    data, train = Dataset.open(run.dataset(cfg, "synthetic")), Dataset.open(chain / "shards/small-train")
    group = dict(zip(train.keys, train.columns["group"], strict=True))
    target = dict(zip(train.keys, train.columns["target"], strict=True))
    for i in range(len(data)):
        record = data.json(i)
        assert (group[record["source"]], target[record["source"]]) == (record["source_group"], record["target"])
        assert record["source_group"] in data.manifest["lineage"]["group_ids"]
        assert record["source"] in data.manifest["lineage"]["drawn_over"]["images"]
        assert (record["method"], record["strength"]) == (method, 0.5)
        near, far = (np.abs(data.image(i).astype(int) - train.image(train.keys.index(key))).mean() for key in (record["source"], train.keys[0]))
        assert near > 0
        assert near < far or record["source"] == train.keys[0], "it looks more like its source than like another one"


def test_a_withdrawal_before_the_end_is_not_gone_on_over(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """The images that were drawn already may be over those that are withdrawn, and all others would be drawn over other ones."""
    shutil.copytree(chain / "shards/small-train", tmp_path / "shards/small-train", copy_function=os.link)
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.method": "image-to-image", "generate.weights": "base", "generate.shard_size": 5,
                                                "generate.classes.benign.count": 5, "generate.classes.malignant.count": 5})
    generate(cfg, run, Task(0, 2))
    train = Dataset.open(tmp_path / "shards/small-train")
    mark(train.folder, train.columns["group"][0], [train.keys[0]], "images of theirs")
    with pytest.raises(UserError, match=r"(?s)was made from another request.*train_withdrawn: None -> 1\n.*delete the folder"):
        generate(cfg, run, Task(1, 2))


def test_nothing_is_drawn_again_from_other_images_than_before(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """Since a withdrawal, or by a version that gave each prompt the same few sources."""
    shutil.copytree(chain / "shards/small-train", tmp_path / "shards/small-train", copy_function=os.link)
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.method": "image-to-image", "generate.weights": "base", "generate.shard_size": 5,
                                                "generate.classes.benign.count": 5, "generate.classes.malignant.count": 5})
    generate(cfg, run, Task())
    train, folder = Dataset.open(tmp_path / "shards/small-train"), run.dataset(cfg, "synthetic")
    assert encode_jpeg(regenerate(cfg, run, ["syn-00000003"])["syn-00000003"], cfg.generate.quality) == show(folder, "syn-00000003")[1]
    part = folder / "parts/00000.json"
    facts = read_json(part)
    made_from, other = facts["columns"]["source"][3], next(key for key in train.keys if key not in facts["columns"]["source"])
    facts["columns"]["source"][3] = other
    part.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=f"syn-00000003 of .* was made from {other} by another version of skinsynth, this one would take {made_from}"):
        regenerate(cfg, run, ["syn-00000003"])
    mark(train.folder, train.columns["group"][0], [train.keys[0]], "images of theirs")
    with pytest.raises(UserError, match=r"(?s)run-synthetic cannot be drawn again, since .* plans others .*:\n  train_withdrawn: None -> 1$"):
        regenerate(cfg, run, ["syn-00000003"])


def test_straight_from_a_published_model(drawn: Path, tmp_path: Path) -> None:
    """Without fine-tuning: the chain has neither encode nor finetune, and the descent of the images is said to be unknown."""
    shutil.copytree(hub.find_base(knobs.Model()).weights, tmp_path / "published")
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"generate.weights": "base", "model.base": tmp_path / "published"}))
    assert [n.name for n in nodes(cfg)][:3] == ["prepare", "generate", "screen"]
    run = RunDir(tmp_path / "run")
    run.create(cfg)
    generate(cfg, run, Task())
    data = Dataset.open(tmp_path / "shards/run-synthetic")
    assert data.manifest["lineage"]["group_ids"] is None
    assert data.json(0)["weights_sha256"] == base_sha256(cfg.model)
    assert show(data.folder, data.keys[0])[0]["trained_on_groups"] == "unknown"


def test_what_a_run_made_keeps_its_descent_as_another_runs_base(chain: Path, drawn: Path, tmp_path: Path) -> None:
    """Its groups are known, and once it is withdrawn nothing starts from it, nor from the LoRA beside it."""
    weights = tmp_path / "weights"
    shutil.copytree(chain / "run/finetune/weights", weights)
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"generate.weights": "base", "model.base": weights}))
    groups = read_json(weights / "lineage.json")["group_ids"]
    run = RunDir(Path(cfg.run))
    run.create(cfg)
    assert Weights(cfg, run).lineage["group_ids"] == groups
    (weights / "lora").mkdir()
    (weights / "lora/pytorch_lora_weights.safetensors").write_bytes(b"")
    beside = knobs.Model(lora=str(weights / "lora"))
    assert hub.descent_of(beside)["group_ids"] == groups
    mark(weights, groups[0], None, "trained on images of theirs")
    for model in (cfg.model, beside):
        with pytest.raises(UserError, match=f"weights is withdrawn: group {groups[0]}"):
            hub.find_base(model)


def test_prompts_speak_of_the_real_images_values(chain: Path, drawn: Path, tmp_path: Path) -> None:
    cfg, run = begin(chain, drawn, tmp_path, **{"generate.classes.benign.count": 4, "generate.classes.malignant.count": 4,
                                                "generate.classes.malignant.prompts": "['a photo of a {diagnosis} {site} {person}']"})
    shutil.copytree(chain / "shards/small-train", tmp_path / "shards/small-train", copy_function=os.link)
    generate(cfg, run, Task())
    data = Dataset.open(run.dataset(cfg, "synthetic"))
    for i in range(len(data)):
        record = data.json(i)
        if record["target"]:
            known = record["attributes"]
            assert record["prompt"].startswith(f"a photo of a {known['diagnosis']} ")
            assert str(known["site"]).split("/")[0] in record["prompt"]
        else:
            assert "attributes" not in record
    assert len(data.columns["sex"]) == len(data)


def test_a_contact_sheet_per_class_is_there(chain: Path) -> None:
    for name in ("benign", "malignant"):
        sheet = decode((chain / f"run/generate/sheets/{name}.jpg").read_bytes())
        assert sheet.shape == (64, 384, 3)
        assert sheet.std() > 20
