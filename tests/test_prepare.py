"""The prepare stage on drawn images, on broken ones and on a slice of real ones."""

import csv
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from skinsynth.data.dataset import Dataset
from skinsynth.data.phantom import write_dataset
from skinsynth.data.shards import ShardWriter
from skinsynth.data.withdrawn import mark, withdrawn_keys
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task
from skinsynth.stages.prepare import SPLITS, check_disjoint, prepare
from skinsynth.withdraw import find, withdraw

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "isic"
WHOLE = Task(0, 1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn images with exact and near copies."""
    folder = tmp_path_factory.mktemp("drawn")
    write_dataset(folder, 60, 0.3, 1)
    return folder


def config(source: Path, out: Path, **prepare_keys: object) -> Config:
    cfg = Config(run=str(out / "run"))
    cfg.data.name, cfg.data.shards = "set", str(out / "shards")
    cfg.data.metadata, cfg.data.images = str(source / "metadata.csv"), str(source / "images")
    if (source / "duplicates.csv").exists():
        cfg.data.duplicates = str(source / "duplicates.csv")
    for key, value in {"size": 32, "shard_size": 8, **prepare_keys}.items():
        setattr(cfg.prepare, key, value)
    return cfg


def go(cfg: Config, task: Task = WHOLE) -> RunDir:
    run = RunDir(Path(cfg.run))
    prepare(cfg, run, task)
    return run


def start(cfg: Config, task: Task = WHOLE, **options: object) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    from skinsynth import config as configs

    path = Path(cfg.run) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(configs.dump(cfg))
    return subprocess.Popen([sys.executable, "-m", "jobs.prepare", str(path.parent), "--task", f"{task.index}/{task.count}"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload, no-any-return]


def digest(cfg: Config) -> dict[str, str]:
    """Every file of the datasets with the hash of its bytes."""
    files = [p for p in Path(cfg.data.shards).rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(cfg.data.shards)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def done(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, str]]:
    """The dataset made by one undisturbed task."""
    cfg = config(drawn, tmp_path_factory.mktemp("done"))
    go(cfg)
    return cfg, digest(cfg)


@pytest.fixture
def broken(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the drawn images to break."""
    shutil.copytree(drawn, tmp_path / "source")
    return tmp_path / "source"


def rows(source: Path) -> list[dict[str, str]]:
    with open(source / "metadata.csv", newline="") as f:
        return list(csv.DictReader(f))


def write_rows(source: Path, content: list[dict[str, str]]) -> None:
    with open(source / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(content[0]))
        writer.writeheader()
        writer.writerows(content)


def lonely(source: Path) -> list[Path]:
    """Images without a copy: breaking one must not change how others are grouped."""
    files = sorted((source / "images").glob("*.jpg"))
    contents = [p.read_bytes() for p in files]
    return [p for p, content in zip(files, contents, strict=True) if contents.count(content) == 1]


def aside(cfg: Config) -> dict[str, str]:
    with open(Path(cfg.data.shards) / "set-train" / "set_aside.csv", newline="") as f:
        return {row["key"]: row["reason"] for row in csv.DictReader(f)}


def manifests(cfg: Config) -> dict[str, dict]:
    return {s: read_json(Path(cfg.data.shards) / f"set-{s}" / "manifest.json") for s in SPLITS}


def test_every_image_is_in_one_split_with_its_patient_and_its_copies(drawn: Path, done: tuple[Config, dict[str, str]]) -> None:
    sets = {s: Dataset.open(Path(done[0].data.shards) / f"set-{s}") for s in SPLITS}
    place = {key: s for s, data in sets.items() for key in data.keys}
    assert sorted(place) == sorted(r["image_name"] for r in rows(drawn))
    assert sum(map(len, sets.values())) == 60
    ties = {(r["patient_id"], place[r["image_name"]]) for r in rows(drawn) if r["patient_id"]}
    assert len(ties) == len({patient for patient, _ in ties})
    ties = {(p.read_bytes(), place[p.stem]) for p in (drawn / "images").glob("*.jpg")}
    assert len(ties) == len({content for content, _ in ties}) < 60
    with open(drawn / "duplicates.csv", newline="") as f:
        assert all(place[r["image_name_1"]] == place[r["image_name_2"]] for r in csv.DictReader(f))


def test_copies_and_published_pairs_stay_together_where_no_patient_is_known(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six ties of each kind: by chance alone, six would all hold once in forty seeds."""
    write_rows(broken, [r | {"patient_id": "", "lesion_id": "-1", "subject": r["patient_id"]} for r in rows(broken)])
    alone = {p.stem for p in lonely(broken)}
    benign = [r["image_name"] for r in rows(broken) if r["target"] == "0" and r["image_name"] in alone]
    copies, published = (list(zip(benign[i : i + 12 : 2], benign[i + 1 : i + 12 : 2], strict=True)) for i in (0, 12))
    assert len(copies) == len(published) == 6
    for one, other in copies:
        shutil.copy(broken / "images" / f"{one}.jpg", broken / "images" / f"{other}.jpg")
    with open(broken / "duplicates.csv", "a") as f:
        f.writelines(f"{one},{other}\n" for one, other in published)
    cfg = config(broken, tmp_path)
    go(cfg)
    place = {key: s for s in SPLITS for key in Dataset.open(Path(cfg.data.shards) / f"set-{s}").keys}
    assert all(place[one] == place[other] for one, other in copies + published)
    told = "no patient or lesion ids: only identical files and listed pairs of duplicates are kept together (not read: subject;"
    assert told in capsys.readouterr().out
    assert told in (Path(cfg.data.shards) / "set-train/split.md").read_text()


def test_samples_columns_and_manifest_tell_what_is_there(drawn: Path, done: tuple[Config, dict[str, str]]) -> None:
    data = Dataset.open(Path(done[0].data.shards) / "set-train")
    row = next(r for r in rows(drawn) if r["image_name"] == data.keys[0])
    sample = data.json(0)
    assert data.image(0).shape == (32, 32, 3)
    assert (sample["isic_id"], sample["split"], sample["origin"]) == (row["image_name"], "train", "real")
    assert (str(sample["target"]), sample["diagnosis"], sample["sex"]) == (row["target"], row["diagnosis"] or None, row["sex"] or None)
    assert sample["caption"].startswith("a dermoscopy image of a")
    assert set(sample) >= {"group", "age", "site"}
    assert set(data.columns) == {"target", "group", "patient", "lesion", "caption", "diagnosis", "sex", "age", "site"}
    malignant = data.select({"target": 1})
    assert sorted({data.columns["caption"][i] for i in malignant}) == sorted({data.json(i)["caption"] for i in malignant})
    m = data.manifest
    assert m["classes"]["1"] == len(malignant) == m["statistics"]["1"]["images"]
    assert (m["name"], m["split"], m["kind"], m["size"], m["seed"]) == ("set-train", "train", "real", 32, 0)
    assert m["group_ids"] == sorted(set(data.columns["group"]))
    assert m["groups"] == len(m["group_ids"])
    assert m["request"] == read_json(data.folder / "request.json")
    assert data.verify() == []
    assert "no patient or lesion ids" not in (data.folder / "split.md").read_text()
    finished = read_json(Path(done[0].run) / "prepare" / "done.json")
    assert finished["metrics"]["train"]["classes"] == m["classes"]
    assert len(finished["outputs"]) == 3
    assert read_json(Path(done[0].run) / "prepare" / "progress" / "0.json")["done"] == 60


def test_three_tasks_at_once_give_the_bytes_of_one(drawn: Path, done: tuple[Config, dict[str, str]], tmp_path: Path) -> None:
    cfg = config(drawn, tmp_path)
    tasks = [start(cfg, Task(i, 3)) for i in range(3)]
    assert [t.wait(60) for t in tasks] == [0, 0, 0]
    assert digest(cfg) == done[1]
    assert RunDir(Path(cfg.run)).is_done("prepare")


def test_killed_and_run_again_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    whole, cut = config(drawn, tmp_path / "a", shard_size=1), config(drawn, tmp_path / "b", shard_size=1)
    go(whole)
    process = start(cut)
    parts = Path(cut.data.shards) / "set-train" / "parts"
    while not parts.is_dir() or len(list(parts.glob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not any(manifests(cut).values()), "killed too late to show anything"
    before = {p: p.stat().st_mtime_ns for p in parts.glob("*.json")}
    go(cut)
    assert digest(cut) == digest(whole)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # finished shards were not made again


def test_only_the_task_that_sees_all_finishes(drawn: Path, tmp_path: Path) -> None:
    cfg = config(drawn, tmp_path)
    run = go(cfg, Task(1, 2))
    assert not run.is_done("prepare")
    assert not any(manifests(cfg).values())
    go(cfg, Task(0, 2))
    assert run.is_done("prepare")


def test_plain_webdataset_reads_the_shards(done: tuple[Config, dict[str, str]]) -> None:
    script = ("import sys, webdataset as wds\n"
              "d = wds.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False).decode('rgb8')\n"
              "print([(s['__key__'], s['jpg'].shape, s['json']['isic_id']) for s in d])")
    tars = sorted((Path(done[0].data.shards) / "set-train").glob("*.tar"))
    got = subprocess.run([sys.executable, "-c", script, *map(str, tars)], capture_output=True, text=True, check=True,
                         env={**os.environ, "WDS_SECURE": "1"})
    keys = Dataset.open(tars[0].parent).keys
    assert got.stdout.strip() == str([(key, (32, 32, 3), key) for key in keys])


def test_bad_images_are_set_aside_with_the_reason(broken: Path, tmp_path: Path) -> None:
    missing, empty, cut, text, png = lonely(broken)[:5]
    missing.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-500])
    text.write_bytes(b"<html>404</html>")
    Image.open(png).save(png, "PNG")
    cfg = config(broken, tmp_path, max_bad=0.2)
    run = go(cfg)
    assert aside(cfg) == {missing.stem: "image file is missing", empty.stem: "empty file", cut.stem: "truncated image", text.stem: "not an image"}
    found = manifests(cfg)
    assert sum(m["count"] for m in found.values()) == 56
    assert [n for m in found.values() for n in m["notes"]] == [{"key": png.stem, "note": f"{png.name} is a PNG file"}]
    assert {a["key"] for m in found.values() for a in m["set_aside"]} == set(aside(cfg))
    assert run.metrics("prepare")["set_aside"]["total"] == 4


def test_bad_rows_are_set_aside_with_the_reason(broken: Path, tmp_path: Path) -> None:
    content = rows(broken)
    once, twice = (next(r for r in content if r["image_name"] == p.stem) for p in lonely(broken)[:2])
    odd = next(r for r in content if r["image_name"] == lonely(broken)[2].stem)
    odd["target"] = "7"
    write_rows(broken, [*content, dict(once), {**twice, "sex": "other"}])
    cfg = config(broken, tmp_path, max_bad=0.2)
    go(cfg)
    assert aside(cfg) == {once["image_name"]: "duplicated id (the same row again; kept once)",
                          twice["image_name"]: "duplicated id with rows that differ",
                          odd["image_name"]: "unknown target '7' (expected 0 or 1)"}
    kept = {key for s in SPLITS for key in Dataset.open(Path(cfg.data.shards) / f"set-{s}").keys}
    assert once["image_name"] in kept
    assert not {twice["image_name"], odd["image_name"]} & kept


def test_who_withdrew_is_in_no_dataset_that_is_prepared_later(broken: Path, tmp_path: Path) -> None:
    """Of another name or size, or the same once it was deleted; and the images are not even looked at."""
    cfg = config(broken, tmp_path)
    run = go(cfg)
    train, home = Dataset.open(run.dataset(cfg, "train")), Path(cfg.data.shards)
    patient = next(name for name in train.columns["patient"] if name)
    withdraw(patient, find(patient, home, tmp_path), home)
    gone = withdrawn_keys(train.folder)
    assert {key for key, name in zip(train.keys, train.columns["patient"], strict=True) if name == patient} <= gone
    content = rows(broken)
    new = next(row for row in content if row["patient_id"] != patient and row["image_name"] not in gone)
    new["patient_id"] = patient  # a new image of theirs
    mark(home, "IL_7", ["ISIC_7"], "withdrawn by the lesion")
    another = next(row for row in reversed(content) if row["patient_id"] != patient and row["image_name"] not in gone)
    write_rows(broken, [{**row, "lesion_id": "IL_7" if row is another else ""} for row in content])
    gone |= {new["image_name"], another["image_name"]}
    for name in gone:
        (broken / f"images/{name}.jpg").write_bytes(b"not to be read")
    cfg.data.name, cfg.prepare.size, cfg.prepare.max_bad, cfg.run = "other", 48, 0.0, str(tmp_path / "other")
    go(cfg)
    found = {item["key"]: item["reason"] for item in read_json(home / "other-train/manifest.json")["set_aside"]}
    assert found == dict.fromkeys(gone, "withdrawn: see withdrawn.json beside the datasets")
    for split in ("train", "val", "test"):
        assert not found.keys() & set(Dataset.open(home / f"other-{split}").keys)


def test_images_that_are_gone_or_others_since_the_plan_are_no_bad_images(drawn: Path, tmp_path: Path) -> None:
    """A node on which their file system is not mounted must not commit shards without them; nor may another image come in under a planned name."""
    shutil.copytree(drawn, tmp_path / "source")
    cfg = config(tmp_path / "source", tmp_path)
    images = tmp_path / "source/images"
    images.rename(tmp_path / "mounted")
    shutil.copytree(tmp_path / "mounted", images)
    go(cfg, Task(1, 2))
    shutil.rmtree(images)
    images.mkdir()
    with pytest.raises(UserError, match=r"\.jpg is gone since prepare looked at the images .*is its file system there on this node"):
        go(cfg, Task(0, 2))
    shutil.rmtree(images)
    shutil.copytree(tmp_path / "mounted", images)
    samples = read_json(tmp_path / "shards/set-train/plan.json")["splits"]
    for split in SPLITS:  # whichever is this task's
        for one, other in zip(samples[split], reversed(samples[split]), strict=True):
            shutil.copy(tmp_path / "mounted" / f"{other}.jpg", images / f"{one}.jpg")
    with pytest.raises(UserError, match=r"\.jpg has changed since prepare looked at the images"):
        go(cfg, Task(0, 2))
    shutil.rmtree(images)
    shutil.copytree(tmp_path / "mounted", images)
    assert go(cfg, Task(0, 2)).is_done("prepare")
    assert all(Dataset.open(tmp_path / f"shards/set-{split}").manifest["set_aside"] == [] for split in SPLITS)


def test_images_that_were_added_later_are_told(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(drawn, tmp_path / "source")
    cfg = config(tmp_path / "source", tmp_path)
    late = sorted((tmp_path / "source/images").iterdir())[:2]
    for path in late:
        path.rename(tmp_path / path.name)
    go(cfg)
    assert "are there now" not in capsys.readouterr().out
    for path in late:
        (tmp_path / path.name).rename(path)
    cfg.run = str(tmp_path / "later")
    go(cfg)
    assert "2 images that were missing when set was prepared are there now" in capsys.readouterr().out


def test_a_table_that_has_its_rows_twice_loses_no_image(drawn: Path, tmp_path: Path) -> None:
    """As two collections' tables one after the other: half of the rows are no images that cannot be used."""
    shutil.copytree(drawn, tmp_path / "source")
    table = tmp_path / "source/metadata.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *rows, *rows]) + "\n")
    run = go(config(tmp_path / "source", tmp_path))
    assert run.metrics("prepare")["set_aside"]["reasons"] == {"duplicated id (the same row again; kept once)": len(rows)}


def test_who_withdraws_before_or_while_the_data_are_prepared_is_in_none_of_them(drawn: Path, tmp_path: Path) -> None:
    cfg = config(drawn, tmp_path)
    (tmp_path / "shards").mkdir()
    table = [line.split(",") for line in (drawn / "metadata.csv").read_text().splitlines()]
    names, patients = ([row[table[0].index(column)] for row in table[1:]] for column in ("image_name", "patient_id"))
    early, late = sorted({patient for patient in patients if patient})[:2]
    withdraw(early, find(early, tmp_path / "shards", tmp_path), tmp_path / "shards")
    go(cfg, Task(0, 2))
    withdraw(late, find(late, tmp_path / "shards", tmp_path), tmp_path / "shards")
    assert go(cfg, Task(1, 2)).is_done("prepare")
    read = {key for split in SPLITS for key in Dataset.open(tmp_path / f"shards/set-{split}").keys}
    theirs = {name for name, patient in zip(names, patients, strict=True) if patient in (early, late)}
    assert theirs
    assert not theirs & read
    assert {name for name, patient in zip(names, patients, strict=True) if patient == early}.isdisjoint(
        read_json(tmp_path / "shards/set-train/plan.json")["samples"])


def test_the_same_file_under_both_targets_is_set_aside(broken: Path, tmp_path: Path) -> None:
    content = rows(broken)
    alone = {p.stem for p in lonely(broken)}
    benign, malignant = (next(r["image_name"] for r in content if r["target"] == t and r["image_name"] in alone) for t in "01")
    shutil.copy(broken / "images" / f"{benign}.jpg", broken / "images" / f"{malignant}.jpg")
    cfg = config(broken, tmp_path)
    go(cfg)
    assert aside(cfg) == dict.fromkeys((benign, malignant), "the same file is listed with both targets")


def test_too_many_bad_images_stop_the_stage(broken: Path, tmp_path: Path) -> None:
    for path in lonely(broken)[:3]:
        path.unlink()
    for path in lonely(broken)[:3]:
        path.write_bytes(path.read_bytes()[:-500])
    cfg = config(broken, tmp_path)
    with pytest.raises(UserError) as caught:
        go(cfg)
    assert "6 of 60 images" in str(caught.value)
    assert "3 x truncated image" in str(caught.value)
    assert "3 x image file is missing" in str(caught.value)
    assert "set_aside.csv" in str(caught.value)
    assert len(aside(cfg)) == 6
    assert not any(manifests(cfg).values())
    assert not (Path(cfg.run) / "prepare" / "done.json").exists()
    cfg.prepare.max_bad = 0.2  # what is to be made stays the same: the shards are kept
    go(cfg)
    assert sum(m["count"] for m in manifests(cfg).values()) == 54


def test_an_empty_class_is_named(broken: Path, tmp_path: Path) -> None:
    write_rows(broken, [r for r in rows(broken) if r["target"] == "0"])
    cfg = config(broken, tmp_path)
    with pytest.raises(UserError, match=r"class 1 \(malignant\) has 0 groups"):
        go(cfg)
    assert not list(Path(cfg.data.shards).rglob("request.json"))  # nothing claimed: after mending, the same command works


@pytest.mark.parametrize(("key", "value", "message"), [
    ("images", "nowhere", "data.images: nowhere is not a folder"), ("metadata", "no.csv", "data.metadata: no.csv does not exist"),
    ("duplicates", "no.csv", "data.duplicates: no.csv does not exist"), ("images", None, "data.images is not set"),
    ("instance_data_dir", "x", "not both"), ("metadata", None, "data.metadata is not set")])
def test_wrong_paths_are_named(drawn: Path, tmp_path: Path, key: str, value: str | None, message: str) -> None:
    cfg = config(drawn, tmp_path)
    setattr(cfg.data, key, value)
    with pytest.raises(UserError, match=message):
        go(cfg)
    assert not Path(cfg.data.shards).exists() or not list(Path(cfg.data.shards).glob("set-*"))


def test_a_missing_column_is_named(broken: Path, tmp_path: Path) -> None:
    write_rows(broken, [{"image_name": r["image_name"], "sex": r["sex"]} for r in rows(broken)])
    with pytest.raises(UserError, match=r"no column 'target' .*it has: image_name, sex"):
        go(config(broken, tmp_path))


def test_a_folder_of_another_request_is_refused(done: tuple[Config, dict[str, str]], drawn: Path) -> None:
    cfg = config(drawn, Path(done[0].run).parent, quality=90)
    with pytest.raises(UserError, match=r"(?s)set-train was made from another request:\n  prepare\.quality: 95 -> 90\n"):
        go(cfg)
    assert digest(done[0]) == done[1]


def test_dreambooth_folders_are_prepared(drawn: Path, tmp_path: Path) -> None:
    for target, name in (("1", "melanoma"), ("0", "nevus")):
        (tmp_path / name).mkdir()
        for r in [r for r in rows(drawn) if r["target"] == target][:10]:
            shutil.copy(drawn / "images" / f"{r['image_name']}.jpg", tmp_path / name)
    cfg = config(drawn, tmp_path)
    cfg.data.metadata = cfg.data.images = cfg.data.duplicates = None
    cfg.data.instance_data_dir, cfg.data.class_data_dir = str(tmp_path / "melanoma"), str(tmp_path / "nevus")
    go(cfg)
    data = Dataset.open(Path(cfg.data.shards) / "set-train")
    assert {data.json(i)["caption"] for i in data.select({"target": 1})} == {"a dermoscopy image of a melanoma"}
    assert all(group.startswith("sha-") for group in data.columns["group"])


def test_leakage_is_found_and_named() -> None:
    one, two = {"name": "a-train", "group_ids": ["P1", "P2"]}, {"name": "a-test", "group_ids": ["P2", "P3"]}
    with pytest.raises(UserError, match=r"1 groups .* in both a-train and a-test: P2"):
        check_disjoint([one, {"name": "a-val", "group_ids": ["P4"]}, two])
    check_disjoint([one, {"name": "b", "group_ids": []}])


def test_a_plan_that_leaks_never_gets_a_manifest(drawn: Path, tmp_path: Path) -> None:
    cfg = config(drawn, tmp_path)
    go(cfg, Task(1, 2))
    path = Path(cfg.data.shards) / "set-train" / "plan.json"
    plan = json.loads(path.read_text())
    train, test = (plan["samples"][plan["splits"][s][0]] for s in ("train", "test"))
    test["group"] = train["group"]
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=f"1 groups .* in both set-train and set-test: {train['group']}"):
        go(cfg)
    assert not any(manifests(cfg).values())


def test_stale_shards_beside_a_new_plan_are_refused(broken: Path, tmp_path: Path) -> None:
    """The train folder deleted and the images mended: the new plan must not join the old test shards."""
    cfg = config(broken, tmp_path)
    go(cfg)
    shutil.rmtree(Path(cfg.data.shards) / "set-train")
    target = lonely(broken)[0]
    Image.open(target).rotate(90).save(target)
    with pytest.raises(UserError, match=r"(?s)another request.*content"):
        go(cfg)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root; test_a_file_limit_acts_like_a_full_disk stands in")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_mended_by_running_again(drawn: Path, small_disk: Path, tmp_path: Path) -> None:
    cfg, free = config(drawn, tmp_path, size=96), config(drawn, tmp_path / "free", size=96)
    cfg.data.shards = str(small_disk / "shards")
    with pytest.raises(OSError, match="No space left on device"):  # stages.explain says it to people
        go(cfg)
    assert not any(manifests(cfg).values())
    assert not list(small_disk.rglob("*.tmp"))
    part = next(Path(cfg.data.shards).rglob("parts/*.json"))  # some shards were made, and they are whole
    tar = part.parent.parent / json.loads(part.read_text())["shard"]
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == json.loads(part.read_text())["sha256"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    go(cfg)
    go(free)
    assert digest(cfg) == digest(free)


def test_a_file_limit_acts_like_a_full_disk(drawn: Path, tmp_path: Path) -> None:
    import resource

    cfg = config(drawn, tmp_path, size=96, shard_size=30)
    process = start(cfg, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "file limit is reached" in said
    assert "start the same command again" in said
    assert "Traceback" not in said
    assert not list(Path(cfg.data.shards).rglob("*.tar"))
    assert not list(Path(cfg.data.shards).rglob("*.tmp"))


def test_a_shard_whose_last_write_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shard = ShardWriter(tmp_path, 0).__enter__()
    shard.add("a", {"txt": b"1"})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        shard.__exit__(None, None, None)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.skipif(not (SHARED / "isic2017").is_dir(), reason=f"{SHARED}/isic2017 with real images is not here")
def test_real_images(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "images").symlink_to(SHARED / "isic2017" / "images")
    shutil.copy(SHARED / "isic2017" / "metadata.csv", source)
    write_rows(source, rows(source)[:2000:20])
    cfg = config(source, tmp_path, size=64, shard_size=40)
    run = go(cfg)
    metrics = run.metrics("prepare")
    assert sum(metrics[s]["images"] for s in SPLITS) == 100
    assert metrics["set_aside"]["total"] == 0
    assert 66 <= metrics["train"]["images"] <= 74
    data = Dataset.open(Path(cfg.data.shards) / "set-train")
    assert all(data.image(i).std() > 3 for i in range(len(data)))


def test_an_id_that_nobody_knew_may_be_an_images_name(drawn: Path, tmp_path: Path) -> None:
    """It was noted before anything was prepared."""
    cfg = config(drawn, tmp_path)
    name = (drawn / "metadata.csv").read_text().splitlines()[1].split(",")[0]
    Path(cfg.data.shards).mkdir(parents=True)
    withdraw(name, find(name, Path(cfg.data.shards), tmp_path), Path(cfg.data.shards))
    prepare(cfg, RunDir(Path(cfg.run)), Task())
    for split in SPLITS:
        assert name not in Dataset.open(RunDir(Path(cfg.run)).dataset(cfg, split)).keys
