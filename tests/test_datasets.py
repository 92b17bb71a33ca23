"""verify, show, regenerate, export and withdraw, on the small chain's datasets as a user has them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT, skinsynth

from skinsynth.data import descent, isic
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.export import export, show
from skinsynth.data.shards import ShardWriter, claim, part_path, write_manifest
from skinsynth.data.split import groups
from skinsynth.data.verify import verify
from skinsynth.data.withdrawn import mark
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Arm, Config
from skinsynth.models.diffusion import read_lineage
from skinsynth.pages.cards import renew
from skinsynth.run import RunDir
from skinsynth.withdraw import find, withdraw


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Iterator[Path]:
    """The chain's folder, free to be damaged."""
    shutil.copytree(chain, tmp_path / "chain")
    yield tmp_path / "chain"
    shutil.rmtree(tmp_path / "chain")


# ---- verify ----

@pytest.mark.parametrize("name", ["small-train", "small-val", "run-latents", "run-synthetic"])
def test_what_the_chain_made_is_whole(chain: Path, name: str) -> None:
    found = verify(chain / "shards" / name)
    assert found.problems == found.notes == []
    assert found.images == read_json(chain / "shards" / name / "manifest.json")["count"] > 0
    assert (found.planned == found.images) is (name == "run-synthetic")


def damaged(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_kind_of_damage_is_found_and_named(copied: Path) -> None:
    folder = copied / "shards/run-synthetic"
    part = read_json(part_path(folder, 1))
    damaged(folder / "00001.tar", part["members"][4]["jpg"][0] + 100)
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:-3000])
    (folder / "00009.tar").write_bytes(b"stray")
    (folder / ".00003.tar.other-host-1-2.tmp").write_bytes(b"half")
    found = verify(folder)
    said = "\n".join(found.problems)
    assert "00001.tar has another sha256" in said
    assert f"00001.tar: {part['keys'][4]}.jpg is damaged" in said
    assert said.count("is damaged") == 1
    assert "00002.tar has" in said
    assert "00009.tar belongs to no part" in said
    assert "1 files of tasks that are at work, or died" in found.notes[0]
    done = skinsynth("verify", str(folder))
    assert done.returncode == 1
    assert "00001.tar has another sha256" in done.stdout


@pytest.mark.parametrize("name", ["parts/00000.json", "manifest.json", "request.json"])
def test_a_file_of_the_index_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    folder = small(tmp_path)
    path = folder / name
    path.write_text(path.read_text()[:-9])
    said = f"{path} is damaged or cut short"
    assert verify(folder).problems[0].startswith(said)
    if name != "request.json":
        with pytest.raises(UserError, match=f"^{said}"):
            Dataset.open(folder)


def test_a_part_without_all_of_its_fields_is_named(tmp_path: Path) -> None:
    folder = small(tmp_path)
    part_path(folder, 0).write_text('{"shard": "00000.tar"}')
    with pytest.raises(UserError, match=r"parts/00000.json is missing or does not belong to the manifest"):
        Dataset.open(folder)
    assert "parts/00000.json is missing or does not belong to the manifest" in verify(folder).problems[0]


@pytest.mark.parametrize(("name", "column"), [("run-synthetic", "seed"), ("small-train", "group"), ("small-train", "target")])
def test_an_index_that_is_not_as_the_samples_say_is_named(copied: Path, name: str, column: str) -> None:
    """Its tar is as it was written, and its counts are the manifest's: training would read it."""
    folder = copied / "shards" / name
    part = read_json(part_path(folder, 0))
    key, values = part["keys"][2], part["columns"][column]
    was, values[2] = values[2], 1 - values[2] if column == "target" else "another"
    part_path(folder, 0).write_text(json.dumps(part))
    first, *more = verify(folder).problems
    assert first == f"parts/00000.json: {column} of {key} is {values[2]!r}, in its own json {was!r}"
    assert [problem.startswith("manifest.json counts {'0': ") for problem in more] == [True] * (column == "target")
    values.pop()
    part_path(folder, 0).write_text(json.dumps(part))
    assert f"parts/00000.json has not one {column} for each of its {len(part['keys'])} samples" in verify(folder).problems


def test_images_that_lack_are_double_or_unplanned_are_named(copied: Path) -> None:
    """Parts that fit their tars, but not the plan."""
    folder = copied / "shards/run-synthetic"
    for unit, keys in ((0, ["syn-00000000", "syn-00000001", "syn-00000001"]), (1, ["syn-00000099"])):
        part_path(folder, unit).unlink()
        with ShardWriter(folder, unit) as shard:
            for key in keys:
                shard.add(key, {"jpg": b"x"}, target=0)
    write_manifest(folder, 3, kind="synthetic")
    said = "\n".join(verify(folder).problems)
    assert "00000.tar lacks 7 images: syn-00000002, syn-00000003" in said
    assert "00000.tar has twice 1 images: syn-00000001" in said
    assert "00001.tar has, beside its plan, 1 images: syn-00000099" in said


def test_an_unfinished_dataset_says_how_far_it_is(copied: Path) -> None:
    folder = copied / "shards/run-synthetic"
    (folder / "manifest.json").unlink()
    part_path(folder, 1).unlink()
    (folder / "00001.tar").unlink()
    assert verify(folder).problems == ["it is not finished: 2 of 3 shards are there"]
    done = skinsynth("verify", str(folder), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert "is no dataset" in skinsynth("verify", str(copied / "run")).stderr


# ---- one image ----

def test_an_image_is_shown_with_all_that_is_known_of_it(chain: Path, tmp_path: Path) -> None:
    folder, picture = chain / "shards/run-synthetic", tmp_path / "it.jpg"
    done = skinsynth("show", str(folder), "syn-00000011", "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    lineage = read_json(chain / "run/finetune/weights/lineage.json")
    for words in ("prompt ", lineage["weights_sha256"], lineage["code"], "small-train", "dpmsolver++", "builtin", str(folder / "00001.tar"),
                  f"{len(lineage['group_ids'])}, listed in"):
        assert words in done.stdout, words
    assert cv2.imread(str(picture)).shape == (64, 64, 3)
    facts = json.loads(skinsynth("show", str(folder), "syn-00000011", "--json").stdout)
    tar = Path(facts["shard"]).read_bytes()
    assert tar[facts["offset"]:][: facts["bytes"]] == picture.read_bytes()
    assert (facts["number"], facts["made_by"]["device"], facts["trained_on_sha256"]) == (11, "cpu", lineage["train_sha256"])
    assert "has no image syn-00000999 (yet): its keys are like syn-00000000" in skinsynth("show", str(folder), "syn-00000999").stderr
    real = Dataset.open(chain / "shards/small-train").keys[3]
    assert json.loads(skinsynth("show", str(chain / "shards/small-train"), real, "--json").stdout)["origin"] == "real"


def test_regenerated_images_have_the_same_pixels(chain: Path, tmp_path: Path) -> None:
    folder = chain / "shards/run-synthetic"
    done = skinsynth("regenerate", str(folder), "syn-00000026", "syn-00000004", "--to", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same as in the shard") == 2, done.stdout
    data = Dataset.open(folder)
    drawn = cv2.imread(str(tmp_path / "again/syn-00000004.png"))[..., ::-1].astype(int)
    assert np.abs(drawn - data.image(data.keys.index("syn-00000004"))).mean() < 3, "but for the JPEG's loss"
    assert "has no image syn-00000027" in skinsynth("regenerate", str(folder), "syn-00000027").stderr


def test_they_are_drawn_with_the_threads_that_the_stage_had(chain: Path) -> None:
    """Of what torch finds when it is imported. In a process that has it already nothing would be set."""
    code = f"""
import os, sys
class Told:
    def find_spec(self, name, *_):
        if name in ("torch", "numpy"):
            print(name, os.environ.get("OMP_NUM_THREADS"))
            sys.exit()
sys.meta_path.insert(0, Told())
sys.argv = ["skinsynth", "regenerate", {str(chain / "shards/run-synthetic")!r}, "syn-00000000"]
from skinsynth.cli import main
main()
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"numpy {RunDir(chain / 'run').config().cluster.threads_of('generate')}\n"


def test_an_image_that_comes_out_otherwise_is_told_by_the_exit_status(chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other-synthetic"
    claim(folder, {"stage": "generate"})
    with ShardWriter(folder, 0) as shard:
        shard.add("syn-00000004", {"jpg": encode_jpeg(np.zeros((64, 64, 3), np.uint8), 90), "json": b"{}"})
    done = skinsynth("regenerate", str(folder), "syn-00000004", "--run", str(chain / "run"), "--to", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "syn-00000004.png: NOT the same as in the shard (another kind of device, or number of CPU threads?)" in done.stdout


# ---- files ----

def test_exported_as_files_with_a_table(chain: Path, tmp_path: Path) -> None:
    folder, accepted = chain / "shards/run-synthetic", chain / "run/screen/accepted.json"
    assert "27 images" in skinsynth("export", str(folder), str(tmp_path / "all")).stdout
    with open(tmp_path / "all/metadata.csv") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0])[:8] == ["image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis", "benign_malignant",
                                 "target"]
    assert {(row["benign_malignant"], row["target"]) for row in rows} == {("benign", "0"), ("malignant", "1")}
    assert {row["image_name"] for row in rows} == {p.stem for p in (tmp_path / "all/images").iterdir()}
    assert (tmp_path / "all/images/syn-00000000.jpg").read_bytes() == Dataset.open(folder).read(0, "jpg")
    told = skinsynth("export", str(folder), str(tmp_path / "some"), "--format", "imagefolder", "--only", str(accepted)).stdout
    assert f"{read_json(accepted)['count']} images" in told
    with open(tmp_path / "some/train/metadata.csv") as f:
        assert [row["file_name"] for row in csv.DictReader(f)] == [f"{key}.jpg" for key in read_json(accepted)["keys"]]
    again = skinsynth("export", str(folder), str(tmp_path / "all"))
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert "expected siim or imagefolder" in skinsynth("export", str(folder), str(tmp_path / "x"), "--format", "folder").stderr
    with pytest.raises(UserError, match="holds no images but latents"):
        export(chain / "shards/run-latents", tmp_path / "x", "siim", None)


def test_a_list_of_another_dataset_is_not_taken(chain: Path, tmp_path: Path) -> None:
    """All runs' images have the same names: of another run's list, those that were set aside here might leave the house."""
    accepted = read_json(chain / "run/screen/accepted.json")
    (tmp_path / "other.json").write_text(json.dumps({**accepted, "manifest_sha256": "0" * 64}))
    done = skinsynth("export", str(chain / "shards/run-synthetic"), str(tmp_path / "out"), "--only", str(tmp_path / "other.json"))
    assert done.returncode == 1
    assert "says what is accepted of another dataset" in done.stderr
    with pytest.raises(UserError, match="has no nobody of those listed: the list is of another dataset"):
        export(small(tmp_path), tmp_path / "out", "siim", {"a", "nobody"})
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_may_be_the_target_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert export(folder, Path("."), "siim", None) == 2
    assert (tmp_path / "out/metadata.csv").is_file()


def test_an_export_that_breaks_off_leaves_nothing(chain: Path, tmp_path: Path) -> None:
    def tell(done: int, of: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export(chain / "shards/run-synthetic", tmp_path / "out", "siim", None, tell)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"keys": ["../../../pwned", "b"]}, {"shard": "../elsewhere.tar"}])
def test_a_name_that_could_leave_the_folder_is_neither_exported_nor_shown(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = small(tmp_path)
    planted = {**read_json(part_path(folder, 0)), **change}
    part_path(folder, 0).write_text(json.dumps(planted))
    write_manifest(folder, 1, kind="real")
    (folder.parent / "elsewhere.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(UserError, match=r"parts/00000.json: '\.\./.*' cannot be used as a name"):
        export(folder, tmp_path / "a/b/out", "siim", None)
    with pytest.raises(UserError, match=r"parts/00000.json: '\.\./.*' cannot be used as a name"):
        show(folder, planted["keys"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_a_damaged_image_is_neither_exported_nor_shown(tmp_path: Path) -> None:
    folder = small(tmp_path)
    damaged(folder / "00000.tar", read_json(part_path(folder, 0))["members"][1]["jpg"][0] + 20)
    for call in (lambda: export(folder, tmp_path / "out", "siim", None), lambda: show(folder, "b")):
        with pytest.raises(BadSample, match=r"sample b in .*/a-train/00000.tar is damaged: its jpg has another checksum"):
            call()
    assert not (tmp_path / "out").exists()
    assert show(folder, "a")[0]["target"] == 0
    assert export(folder, tmp_path / "out", "siim", {"a"}) == 1


def small(folder: Path) -> Path:
    """A dataset of two real images, ``a`` and ``b``."""
    found = folder / "shards/a-train"
    claim(found, {"stage": "prepare"})
    with ShardWriter(found, 0) as shard:
        for key in ("a", "b"):
            image = encode_jpeg(np.full((16, 16, 3), ord(key), np.uint8), 90)
            shard.add(key, {"jpg": image, "json": json.dumps({"target": 0, "group": key, "origin": "real"}).encode()}, target=0, group=key)
    write_manifest(found, 1, kind="real")
    return found


def test_what_was_exported_can_be_prepared_again(chain: Path, tmp_path: Path) -> None:
    """The table is one that prepare reads."""
    assert skinsynth("export", str(chain / "shards/small-test"), str(tmp_path / "test")).returncode == 0
    rows, aside = isic.read_metadata(tmp_path / "test/metadata.csv")
    data = Dataset.open(chain / "shards/small-test")
    assert aside == []
    assert {row.image_name: row.target for row in rows} == dict(zip(data.keys, data.columns["target"], strict=True))
    assert together(groups(rows, {}, [])) == together(dict(zip(data.keys, data.columns["group"], strict=True)))


def together(group_of: dict[str, str]) -> set[frozenset[str]]:
    """The groups, whatever they are called."""
    return {frozenset(name for name, other in group_of.items() if other == group) for group in group_of.values()}


def test_groups_stay_whole_where_what_was_exported_is_prepared_again(tmp_path: Path) -> None:
    """Those of a lesion, and of copies and listed pairs, whose list does not go with the images. Nobody is named by a group."""
    of = {"a": ("IL_1", None, "IL_1"), "b": ("IL_1", None, "IL_1"), "c": ("sha-12", None, None), "d": ("sha-12", None, None),
          "e": ("sha-34", None, None), "f": ("IP_1", "IP_1", None), "g": ("IP_1", None, None), "h": ("IP_9", None, None)}
    export(of_patients(tmp_path / "shards", of), tmp_path / "out", "siim", None)
    rows, aside = isic.read_metadata(tmp_path / "out/metadata.csv")
    assert aside == []
    assert [(row.patient_id, row.lesion_id) for row in rows] == [(patient, lesion) for _, patient, lesion in of.values()]
    assert together(groups(rows, {}, [])) == together({name: group for name, (group, *_) in of.items()})
    assert "IP_9" not in (tmp_path / "out/metadata.csv").read_text()
    table = tmp_path / "others.csv"
    table.write_text("image_name,target,group\na,0,control\nb,1,control\n")
    assert [row.group for row in isic.read_metadata(table)[0]] == [None, None], "of another tool's table the word may mean anything"


# ---- a patient withdraws ----

def test_all_that_descends_from_a_patient_is_named_and_marked(copied: Path) -> None:
    there = original(copied)
    for path in [*copied.rglob("*.json"), copied / "run/config.yaml"]:  # as if the chain had been made here
        path.write_text(path.read_text().replace(there, str(copied)))
    run, train = RunDir(copied / "run"), Dataset.open(copied / "shards/small-train")
    lineage = read_json(run.weights / "lineage.json")
    group = lineage["group_ids"][0]
    mine = [key for key, g in zip(train.keys, train.columns["group"], strict=True) if g == group]
    arguments = ["withdraw", "--group", group, "--shards", str(copied / "shards"), "--runs", str(copied)]
    dry = skinsynth(*arguments, "--dry-run")
    assert "nothing was marked" in dry.stdout
    assert not list(copied.rglob("withdrawn.json"))
    done = skinsynth(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"small-train: real images, {len(mine)} samples: images of theirs" in done.stdout
    assert f"run-latents: latents, {len(mine)} samples" in done.stdout
    assert "run-synthetic: synthetic images, all of it: drawn with weights that were trained on them" in done.stdout
    assert "finetune/weights: weights of the generator, all of it" in done.stdout
    assert "classify/baseline/seed-0/weights: weights of a classifier" in done.stdout
    assert "small-val" not in done.stdout
    assert set(Dataset.open(copied / "shards/small-train").keys) == set(train.keys) - set(mine)
    for call in (lambda: Dataset.open(copied / "shards/run-synthetic"), lambda: read_lineage(run.weights)):
        with pytest.raises(UserError, match=f"is withdrawn: group {group}, .*trained on"):
            call()
    for card, start in ((copied / "shards/run-synthetic/DATASHEET.md", ""), (run.weights / "MODEL_CARD.md", r"---\n[^>]*\n---\n\n")):
        told = re.match(start + r"(> \*\*Somebody withdrew \(20.*\n)\n# ", card.read_text())
        assert told, "behind the front matter that hubs read, before everything else"
        assert "All of this must not be used any more: " in told[1]
        assert group not in told[1]
    named = {d.folder for d in find(group, copied / "shards", copied) if d.kind == "weights of a classifier"}
    config_path = run.path / "config.yaml"  # as most runs have it: relative to where it was launched, which nobody knows
    config_path.write_text(config_path.read_text().replace(f"shards: {copied}/shards", "shards: shards"))
    assert {d.folder for d in find(group, copied / "shards", copied) if d.kind == "weights of a classifier"} == named
    config_path.write_text(config_path.read_text().replace("shards: shards", f"shards: {copied}/shards"))
    assert len(named) >= 2
    (copied / "runs/2026").mkdir(parents=True)
    run.path.rename(copied / "runs/2026/run")
    assert {d.folder for d in find(group, copied / "shards", copied / "runs") if d.kind == "weights of a classifier"} == {
        path.replace(str(run.path), str(copied / "runs/2026/run")) for path in named}, "however deep"
    (copied / "runs/2026/run").rename(run.path)
    shown = skinsynth("withdraw", "--group", "nobody", "--shards", str(copied / "shards"), "--runs", str(copied))
    assert "nothing in" in shown.stdout
    (run.node("generate") / "done.json").unlink()
    again = skinsynth("launch", str(copied / "run/config.yaml"))
    assert again.returncode == 1
    assert f"is withdrawn: group {group}" in again.stderr


def original(copied: Path) -> str:
    """Where the chain was made: what its config says."""
    lines = (copied / "run/config.yaml").read_text().splitlines()
    return next(line.split(": ", 1)[1] for line in lines if line.startswith("run: ")).removesuffix("/run")


@pytest.mark.parametrize("name", ["IP_2", "IL_2", "IP_1"])
def test_a_patient_is_found_in_a_group_that_is_named_after_another(tmp_path: Path, name: str) -> None:
    """Joined by a pair of duplicates; and in weights and a set that were made when the group had the other name."""
    shards, run = tmp_path / "shards", RunDir(tmp_path / "runs/run")
    rows = {"a": ("IP_1", "IP_1", None), "b": ("IP_1", "IP_2", "IL_2"), "c": ("IP_3", "IP_3", "IP_2")}  # a lesion of the same name
    with ShardWriter(shards / "isic-train", 0) as shard:
        for key, (group, patient, lesion) in rows.items():
            shard.add(key, {"jpg": b"x"}, target=0, group=group, patient=patient, lesion=lesion)
    write_manifest(shards / "isic-train", 1, kind="real", group_ids=["IP_1", "IP_3"])
    then = {"groups": ["IP_2"], "images": ["b"], "patients": ["IP_2"], "lesions": ["IL_2"]}
    for made, lineage in (("run", {"group_ids": ["IP_2"], "trained_on": then}), ("old", {"group_ids": ["IP_3"]})):
        with ShardWriter(shards / f"{made}-synthetic", 0) as shard:
            for i, source in enumerate("abc"):
                shard.add(f"syn-{i:08d}", {"jpg": b"x"}, target=0, source=source, source_group="then")
        write_manifest(shards / f"{made}-synthetic", 1, kind="synthetic", lineage=lineage)
    run.create(Config(run=str(run.path)))
    write_json(run.weights / "lineage.json", {"group_ids": ["IP_2"], "trained_on": then})
    found = {Path(d.folder).name: d for d in find(name, shards, run.path.parent)}
    assert found.keys() == {"isic-train", "run-synthetic", "old-synthetic", "weights"}
    assert found["isic-train"].keys == ["a", "b"]
    assert found["isic-train"].why == ("images of theirs" if name == "IP_1" else "images of theirs (of group IP_1)")
    assert found["run-synthetic"].keys is found["weights"].keys is None
    assert found["old-synthetic"].keys == ["syn-00000000", "syn-00000001"]
    for path in shards.rglob("parts/*.json"):  # older parts have no such columns: the plan has
        part = read_json(path)
        part["columns"] = {name: values for name, values in part["columns"].items() if name not in ("patient", "lesion")}
        path.write_text(json.dumps(part))
    plan = {key: {"patient_id": patient, "lesion_id": lesion} for key, (_, patient, lesion) in rows.items()}
    write_json(shards / "isic-train/plan.json", {"samples": plan})
    assert {Path(d.folder).name: d for d in find(name, shards, run.path.parent)} == found


def test_what_is_of_unknown_descent_is_told_and_not_marked(tmp_path: Path) -> None:
    """Neither the set, nor its generator, nor the classifier that was trained on it."""
    shards, cfg = tmp_path / "shards", Config(run=str(tmp_path / "runs/run"))
    cfg.data.shards, cfg.classify.arms = str(shards), {"hybrid": Arm({"real": 1.0, "synthetic": 1.0})}
    run = RunDir(tmp_path / "runs/run")
    run.create(cfg)
    with ShardWriter(shards / "run-synthetic", 0) as shard:
        shard.add("syn-00000000", {"jpg": b"x"}, target=0)
    write_manifest(shards / "run-synthetic", 1, kind="synthetic", lineage={"group_ids": None})
    write_json(run.weights / "lineage.json", {"group_ids": None, "trained_on": {"groups": ["P1"], "images": ["a"]}})
    (run.node("classify/hybrid") / "seed-0/weights").mkdir(parents=True)
    found = find("nobody", shards, run.path.parent)
    assert [(d.kind, d.why) for d in found] == [("synthetic images", None), ("weights of the generator", None), ("weights of a classifier", None)]
    withdraw("nobody", found, shards)
    assert list(tmp_path.rglob("withdrawn.json")) == [shards / "withdrawn.json"], "noted for what is prepared later, and nothing marked"
    assert [d.why for d in find("P1", shards, run.path.parent)] == [None, "trained on images of theirs", None]


def test_of_images_drawn_over_a_patients_only_those_are_withdrawn(tmp_path: Path) -> None:
    folder = tmp_path / "shards/run-synthetic"
    with ShardWriter(folder, 0) as shard:
        for i in range(4):
            shard.add(f"syn-{i:08d}", {"jpg": bytes([i])}, target=0, source_group=f"P{i % 2}")
    write_manifest(folder, 1, kind="synthetic", lineage={"trained_group_ids": ["P7"], "group_ids": ["P0", "P1", "P7"]})
    unknown = tmp_path / "shards/elsewhere-synthetic"
    with ShardWriter(unknown, 0) as shard:
        shard.add("syn-00000000", {"jpg": b""}, target=0)
    write_manifest(unknown, 1, kind="synthetic", lineage={"group_ids": None})
    (tmp_path / "runs").mkdir()
    done = skinsynth("withdraw", "--group", "P1", "--shards", str(tmp_path / "shards"), "--runs", str(tmp_path / "runs"))
    assert "run-synthetic: synthetic images, 2 samples: drawn over images of theirs" in done.stdout, done.stderr
    assert "elsewhere-synthetic: synthetic images, of unknown descent: nobody can tell, so it is not marked" in done.stdout
    data = Dataset.open(folder)
    assert data.keys == ["syn-00000000", "syn-00000002"]
    assert [data.read(i, "jpg") for i in range(2)] == [b"\0", b"\2"]
    assert list(data.shard_samples(0)) == [0, 1]
    assert not (unknown / "withdrawn.json").exists()
    said = (r"> \*\*Somebody withdrew \(.{10}\)\.\*\* 2 of these samples must not be used any more: drawn over images of theirs "
            r"\(withdrawn.json tells which\)\.\n\n")
    for card, start in (("DATASHEET.md", ""), ("MODEL_CARD.md", "---\nlicense: other\n---\n\n")):
        (folder / card).write_text(f"{start}# It\n\nrest\n")
        for _ in range(2):  # said again it is said once
            renew(folder)
            assert re.fullmatch(rf"{start}{said}# It\n\nrest\n", (folder / card).read_text())
    missing = skinsynth("withdraw", "--group", "P1", "--shards", str(tmp_path / "no"), "--runs", str(tmp_path / "runs"))
    assert "is not a folder" in missing.stderr


def test_what_is_withdrawn_is_neither_shown_nor_drawn_again(tmp_path: Path, copied: Path) -> None:
    folder = small(tmp_path)
    withdraw("a", find("a", folder.parent, tmp_path), folder.parent)
    done = skinsynth("show", str(folder), "a", "--picture", str(tmp_path / "a.jpg"))
    assert done.returncode == 1
    assert f"a of {folder} is withdrawn: withdrawn.json in it, or beside it, tells who" in done.stderr
    assert not (tmp_path / "a.jpg").exists()
    (folder / "withdrawn.json").unlink()  # as where it was prepared meanwhile: its home has the name
    with pytest.raises(UserError, match=r"a of .* is withdrawn"):
        show(folder, "a")
    assert show(folder, "b")[0]["group"] == "b"
    mark(copied / "shards/run-synthetic", "g", None, "drawn with weights that were trained on them")  # a copy, of which the run knows nothing
    again = skinsynth("regenerate", str(copied / "shards/run-synthetic"), "syn-00000000", "--to", str(tmp_path / "again"))
    assert again.returncode == 1
    assert "run-synthetic is withdrawn: group g, drawn with weights that were trained on them" in again.stderr
    assert not (tmp_path / "again").exists()


def test_what_was_made_while_they_withdrew_is_refused_although_it_bears_no_mark(tmp_path: Path) -> None:
    """The home of the datasets names them: weights that a training wrote afterwards, and what was drawn with these."""
    shards, folder = tmp_path / "shards", tmp_path / "shards/run-synthetic"
    known = {"groups": ["g"], "images": ["a"], "patients": ["IP_1"], "lesions": ["IL_1"]}
    lineage = {"group_ids": ["g"], "trained_group_ids": ["g"], "trained_on": known}
    with ShardWriter(folder, 0) as shard:
        shard.add("syn-00000000", {"jpg": b"x"}, target=0)
    for gone in ("g", "IP_1", "IL_1"):
        withdraw(gone, [], shards)
        write_manifest(folder, 1, kind="synthetic", lineage=lineage)
        with pytest.raises(UserError, match=rf"run-synthetic is withdrawn: it was trained on {gone}, which .*withdrawn.json names"):
            Dataset.open(folder)
        with pytest.raises(UserError, match="the weights is withdrawn"):
            descent.check_withdrawn(lineage, shards, "the weights")
        (shards / "withdrawn.json").unlink()
    assert len(Dataset.open(folder)) == 1


def test_a_number_that_is_anothers_lesion_withdraws_nobody_else(tmp_path: Path) -> None:
    """Also once the patient of that number is in no dataset any more."""
    shards = tmp_path / "shards"
    for split, rows in {"train": {"a": ("12", None), "b": ("13", "40")}, "val": {"c": ("40", "12")}}.items():
        with ShardWriter(shards / f"isic-{split}", 0) as shard:
            for key, (patient, lesion) in rows.items():
                shard.add(key, {"jpg": b"x"}, target=0, group=f"g{key}", patient=patient, lesion=lesion)
        write_manifest(shards / f"isic-{split}", 1, kind="real")
    withdraw("12", find("12", shards, tmp_path), shards)
    lineage = {"trained_on": {"groups": ["gc"], "images": ["c"], "patients": ["40"], "lesions": ["12"]}}
    for _ in range(2):
        assert Dataset.open(shards / "isic-val").keys == ["c"]
        descent.check_withdrawn(lineage, shards, "the weights")
        shutil.rmtree(shards / "isic-train", ignore_errors=True)
    withdraw("nobody", [], shards)
    known = (shards / "withdrawn.json").read_bytes()
    withdraw("12", [], shards)
    assert (shards / "withdrawn.json").read_bytes() == known, "said again it is the same"


def test_runs_behind_links_are_found_and_other_tools_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    run = RunDir(tmp_path / "scratch/isic")
    run.create(Config(run=str(run.path)))
    write_json(run.weights / "lineage.json", {"group_ids": ["P1"]})
    (tmp_path / "runs/mlflow").mkdir(parents=True)
    (tmp_path / "runs/mlflow/config.yaml").write_text("a: [b")
    (tmp_path / "runs/isic").symlink_to(run.path)
    (tmp_path / "runs/round").symlink_to(tmp_path / "runs")
    assert [d.folder for d in find("P1", tmp_path / "shards", tmp_path / "runs")] == [str(tmp_path / "runs/isic/finetune/weights")]


def of_patients(shards: Path, rows: dict[str, tuple[str, str | None, str | None]]) -> Path:
    """A dataset of real images: key -> group, patient, lesion."""
    with ShardWriter(shards / "isic-train", 0) as shard:
        for key, (group, patient, lesion) in rows.items():
            facts = {"target": 0, "group": group, "origin": "real"}
            shard.add(key, {"jpg": b"x", "json": json.dumps(facts).encode()}, target=0, group=group, patient=patient, lesion=lesion)
    write_manifest(shards / "isic-train", 1, kind="real")
    return shards / "isic-train"


def test_an_images_name_is_no_patient(tmp_path: Path) -> None:
    """Where the metadata know no patient it is the name that a user has."""
    of_patients(tmp_path / "shards", {"ISIC_1": ("sha-12", None, None), "ISIC_2": ("sha-12", None, None), "ISIC_3": ("ISIC_3", None, "ISIC_3")})
    with pytest.raises(UserError, match="ISIC_2 is an image, of the group sha-12 "):
        find("ISIC_2", tmp_path / "shards", tmp_path)
    assert [one.keys for one in find("sha-12", tmp_path / "shards", tmp_path)] == [["ISIC_1", "ISIC_2"]]
    assert [one.keys for one in find("ISIC_3", tmp_path / "shards", tmp_path)] == [["ISIC_3"]], "a lesion is one whatever it is called"
    with pytest.raises(UserError, match="the id is empty"):
        find(" ", tmp_path / "shards", tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "request.json"])
def test_a_dataset_is_not_taken_for_their_folder(tmp_path: Path, name: str) -> None:
    """Nothing would be found in it, and the note would be read by nobody."""
    folder = of_patients(tmp_path / "shards", {"a": ("P1", "P1", None)})
    (folder / "manifest.json").rename(folder / name)
    done = skinsynth("withdraw", "--group", "P1", "--shards", str(folder), "--runs", str(tmp_path))
    assert done.returncode == 1
    assert f"{folder} is a dataset: give the folder that it lies in" in done.stderr
    assert not list(tmp_path.rglob("withdrawn.json"))


def test_a_copied_tree_has_its_own_classifiers(tmp_path: Path) -> None:
    """Its configuration tells the home that it was copied from; what prepare noted lies beside it."""
    first, second = tmp_path / "first", tmp_path / "second"
    of_patients(first / "shards", {"a": ("P1", "P1", None)})
    run, cfg = RunDir(first / "runs/run"), Config(run=str(first / "runs/run"))
    cfg.data.shards, cfg.classify.arms = str(first / "shards"), {"baseline": Arm({"real": 1.0})}
    run.create(cfg)
    run.finish("prepare", {}, [first / "shards/isic-train/manifest.json"])
    (run.node("classify/baseline") / "seed-0/weights").mkdir(parents=True)
    shutil.copytree(first, second)
    for tree in (first, second):
        found = find("P1", tree / "shards", tree / "runs")
        assert [(one.kind, one.folder) for one in found if one.kind == "weights of a classifier"] == [
            ("weights of a classifier", str(tree / "runs/run/classify/baseline/seed-0/weights"))]
    assert not [one for one in find("P1", second / "shards", first / "runs") if "classifier" in one.kind], "those of another home"


def test_exported_rows_name_the_patient_and_nobody_else(tmp_path: Path) -> None:
    """A group may be named after a lesion, or after another patient."""
    folder = of_patients(tmp_path / "shards", {"a": ("IP_1", "IP_1", None), "b": ("IP_1", "IP_2", None), "c": ("IL_7", None, "IL_7")})
    export(folder, tmp_path / "out", "siim", None)
    with open(tmp_path / "out/metadata.csv") as f:
        assert {row["image_name"]: row["patient_id"] for row in csv.DictReader(f)} == {"a": "IP_1", "b": "IP_2", "c": ""}


@pytest.mark.parametrize("listed", ["{}", '{"rejected": []}', "[]"])
def test_a_file_that_lists_no_keys_exports_nothing(tmp_path: Path, listed: str) -> None:
    (tmp_path / "list.json").write_text(listed)
    done = skinsynth("export", str(small(tmp_path)), str(tmp_path / "out"), "--only", str(tmp_path / "list.json"))
    assert done.returncode == 1
    assert "no list of keys as screen writes it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_exported_rows_say_which_real_image_a_synthetic_one_was_drawn_over(tmp_path: Path) -> None:
    folder = tmp_path / "shards/run-synthetic"
    with ShardWriter(folder, 0) as shard:
        for key, more in (("syn-00000000", {"source": "ISIC_7"}), ("syn-00000001", {})):
            shard.add(key, {"jpg": b"x", "json": json.dumps({"target": 0, "origin": "synthetic", **more}).encode()}, target=0)
    write_manifest(folder, 1, kind="synthetic", lineage={"group_ids": []})
    export(folder, tmp_path / "out", "imagefolder", None)
    with open(tmp_path / "out/train/metadata.csv") as f:
        assert [row["source"] for row in csv.DictReader(f)] == ["ISIC_7", ""]
