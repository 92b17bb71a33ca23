"""The doctor: what is well is said in one line, what is not fails with what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, overrides, skinsynth

from skinsynth import config, knobs
from skinsynth.data import isic
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.doctor import check, cluster, login, node
from skinsynth.doctor.check import Check
from skinsynth.doctor.submit import job_parameters, look, together
from skinsynth.estimate import Stage
from skinsynth.run import RunDir


def diagnose(*arguments: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """The exit status and the checks by name."""
    done = skinsynth("doctor", *arguments, "--json")
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["name"], []).append(one)
    return done.returncode, found


def test_a_machine_without_slurm_is_fine_for_a_local_run(drawn: Path, tmp_path: Path) -> None:
    code, found = diagnose("configs/demo.yaml", *overrides(drawn, tmp_path))
    assert code == 0, found
    for name in ("python", "configuration", "slurm", "model.base", "classify.model", "data.metadata", "data.images", "disk", "run folder"):
        assert [one["state"] for one in found[name]] == ["ok"], name
    assert not list(tmp_path.iterdir()), "looking writes nothing"


def test_without_a_configuration() -> None:
    code, found = diagnose()
    assert code == 0
    assert {"python", "packages", "slurm"} <= found.keys()
    assert "disk" not in found


def test_everything_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    code, found = diagnose("configs/demo.yaml", f"data.metadata={tmp_path}/none.csv", f"data.images={tmp_path}/none", "data.duplicates=null",
                           "model.base=nobody/nothing", "classify.model=./none", "screen.features=nobody/seen")
    assert code == 1
    for name in ("model.base", "classify.model", "screen.features", "data.metadata", "data.images"):
        assert [one["state"] for one in found[name]] == ["fail"], name
    assert "skinsynth pull configs/demo.yaml" in found["model.base"][0]["todo"]
    assert "model.base=nobody/nothing" in found["model.base"][0]["todo"]


def test_images_in_one_file_are_called_a_file(tmp_path: Path) -> None:
    (tmp_path / "train-image.hdf5").write_bytes(b"x")
    cfg = config.load("configs/demo.yaml", [f"data.metadata={tmp_path}", f"data.images={tmp_path}/train-image.hdf5", "data.duplicates=null"])
    metadata, images = check.data(cfg)
    assert (metadata.state, metadata.found) == ("fail", f"{tmp_path} is a folder")
    assert (images.state, images.found) == ("fail", f"{tmp_path}/train-image.hdf5 is not a folder")
    assert "the folder of image files" in images.todo
    assert "data.images=" in images.todo
    assert "unpacked" in images.todo


def test_a_configuration_that_cannot_be_used() -> None:
    code, found = diagnose("configs/demo.yaml", "finetune.stepz=3")
    assert code == 1
    assert "did you mean 'finetune.steps'" in found["configuration"][0]["found"]
    assert "data.metadata" not in found


def test_slurm_is_wanted_and_not_there(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "skinsynth", "doctor", "configs/demo.yaml", "cluster=slurm"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, check=False, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "fail  slurm              sbatch is not there" in done.stdout


def test_a_ctrl_c_while_the_job_is_submitted_cancels_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submits = "kill -INT $PPID; sleep 0.2; echo Submitted batch job 7"
    for name, does in {"sbatch": submits, "srun": "", "scancel": f'echo "$@" > {tmp_path}/told'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", f"run={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"])
    with pytest.raises(KeyboardInterrupt):
        look(cfg, 60, print)
    assert (tmp_path / "told").read_text() == "7\n"


def test_submit_needs_a_configuration_and_slurm() -> None:
    done = skinsynth("doctor", "--submit")
    assert (done.returncode, "needs a CONFIG" in done.stderr) == (1, True)
    done = skinsynth("doctor", "configs/demo.yaml", "--submit")
    assert (done.returncode, "take cluster=slurm" in done.stderr) == (1, True)


def test_another_version_warns_and_a_missing_package_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==0.1\nno-such-tool==1.0\n")  # a tool that is not required may be missing
    found = login.packages(constraints=pins)
    assert found.state == "warn"
    assert "numpy" in found.found
    assert "tested: 0.1" in found.found
    assert "no-such-tool" not in found.found
    for name, requires in (("probe", "other"), ("other", "Not_There>=1")):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requires}\nRequires-Dist: extra-one; extra == 'dev'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = login.packages("probe", pins)
    assert (missing.state, missing.found) == ("fail", "missing: not-there")
    assert login.packages(constraints=tmp_path / "none.txt").state == "warn"


def test_a_disk_that_is_too_small(drawn: Path, tmp_path: Path) -> None:
    few = [Stage("generate", bytes=10**6, files=10)]
    assert login._room(tmp_path, "here", few).state == "ok"
    assert login._room(tmp_path, "here", [*few, Stage("finetune", bytes=None, files=1)]).state == "warn"
    assert login._room(tmp_path, "here", [*few, Stage("finetune", bytes=10**18, files=1)]).state == "fail"
    code, found = diagnose("configs/demo.yaml", *overrides(drawn, tmp_path, **{"generate.classes.benign.count": 2_000_000_000}))
    assert (code, found["disk"][0]["state"]) == (1, "fail")
    assert re.search(r"about 20\.\d TB to be written", found["disk"][0]["found"])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, found = diagnose("configs/demo.yaml", f"run={tmp_path}/file/run")
    assert (code, found["run folder"][0]["state"]) == (1, "fail")


def test_a_run_of_another_configuration_is_told(drawn: Path, tmp_path: Path) -> None:
    RunDir(tmp_path / "run").create(config.load("configs/demo.yaml", overrides(drawn, tmp_path)))
    code, found = diagnose("configs/demo.yaml", *overrides(drawn, tmp_path, **{"finetune.steps": 9}))
    assert code == 1
    assert any("finetune.steps: 8 -> 9" in one["found"] for one in found["run folder"])


def test_a_shard_that_was_changed(drawn: Path, tmp_path: Path) -> None:
    folder, items = tmp_path / "shards" / "small-train", overrides(drawn, tmp_path)
    for number in (0, 1):
        with ShardWriter(folder, number) as shard:
            shard.add(f"ISIC_{number}", {"jpg": b"picture" * 100}, target=number)
    write_manifest(folder, 2)
    code, found = diagnose("configs/demo.yaml", *items, "--checksums")
    assert (code, [one["state"] for one in found["checksums"]]) == (0, ["ok"])
    data = bytearray((folder / "00001.tar").read_bytes())
    data[1000] ^= 1
    (folder / "00001.tar").write_bytes(data)
    code, found = diagnose("configs/demo.yaml", *items, "--checksums")
    assert (code, [one["state"] for one in found["checksums"]]) == (1, ["fail"])
    assert "00001.tar" in found["checksums"][0]["found"]
    (folder / "00001.tar").unlink()
    assert diagnose("configs/demo.yaml", *items, "--checksums")[1]["checksums"][0]["state"] == "fail"
    assert "checksums" not in diagnose("configs/demo.yaml", *items)[1]


@pytest.mark.parametrize(("limit", "minutes"), [("infinite", inf), ("10:00", 10), ("8:00:00", 480), ("1-02:03:00", 1563), ("7-00:00:00", 10080)])
def test_slurms_time_limits(limit: str, minutes: float) -> None:
    assert cluster.minutes(limit) == minutes


def test_wishes_beside_a_partition() -> None:
    there = {p.name: p for p in (cluster.Partition("main", True, True, 60, 3, 4), cluster.Partition("long", False, True, inf, 2, 2))}
    cfg = config.load("configs/demo.yaml", ["cluster=slurm"])
    cfg.cluster.stages = {"finetune": knobs.Resources(nodes=2, minutes=60), "generate": config.Resources(minutes=61)}

    def told(stage: str) -> tuple[str, str]:
        found = cluster._unfit(cfg, stage, there)
        return (found.state, found.found) if found else ("ok", "")

    assert told("finetune")[0] == "ok"
    assert told("generate") == ("fail", "asks for 61 minutes, partition main allows 60")
    cfg.cluster.stages["generate"].partition = "main,long"  # one of them will do
    assert told("generate")[0] == "ok"
    cfg.cluster.stages["finetune"].nodes = 4
    assert told("finetune") == ("warn", "partition main: 3 of 4 nodes can be used now, it asks for 4")
    cfg.cluster.stages["finetune"].nodes = 5
    assert told("finetune") == ("fail", "asks for 5 nodes, partition main has 4")
    cfg.cluster.partition = "gpu"
    assert told("finetune") == ("fail", "there is no partition gpu; there are main, long")


def test_the_job_is_that_of_finetune_but_short_and_not_requeued() -> None:
    cfg, run = config.load("configs/demo.yaml", ["cluster=slurm"]), RunDir(Path("runs/x"))
    found = job_parameters(cfg, run)
    wanted = cfg.cluster.of("finetune")
    assert (found["nodes"], found["ntasks_per_node"], found["gpus_per_node"]) == (wanted.nodes, wanted.tasks_per_node, wanted.gpus_per_node)
    assert found["time"] == 10
    assert found["job_name"].endswith("-doctor")
    assert "requeue" not in found["additional_parameters"]
    assert "teardown" not in found


def test_what_ranks_share_is_one_line() -> None:
    checks = [Check("ok", name, found, where=f"rank {rank} on a") for rank in (0, 1) for name, found in (("hub", "offline"), ("sum", f"{rank} ms"))]
    merged = [(one.name, one.where) for one in together(checks)]
    assert merged == [("hub", "2 ranks, first rank 0 on a"), ("sum", "rank 0 on a"), ("sum", "rank 1 on a")]


def test_the_nodes_part_by_itself_and_in_a_gang(drawn: Path, tmp_path: Path) -> None:
    """Two ranks as torchrun starts them (a bare system may not resolve its own name); the second time the shards' folder is gone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "shards").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
               "-m", "skinsynth.doctor", "configs/demo.yaml", *overrides(drawn, tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"ok    all-reduce         rank {rank} on " in done.stdout
    assert done.stdout.count("gloo over 2 ranks on 1 node, 16 MiB") == 2
    assert "sdpa on cpu" in done.stdout
    (tmp_path / "shards").rmdir()
    alone = subprocess.run([sys.executable, "-m", "skinsynth.doctor", "configs/demo.yaml", *overrides(drawn, tmp_path)], cwd=ROOT,
                           capture_output=True, text=True, timeout=100, check=False)
    assert alone.returncode == 1
    assert "fail  data.shards" in alone.stdout
    assert "all-reduce" in alone.stdout
    assert "one rank: nothing to do" in alone.stdout


def test_what_is_said_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one; with a driver that this torch has no use for; and, since a GPU is seldom at hand, in the words of one that is pretended."""
    def told(*more: str) -> tuple[str, str]:
        found = node._gpus(config.load("configs/demo.yaml", list(more)))
        return found.state, found.found

    if torch.cuda.is_available():
        pytest.skip("there is one: test_the_nodes_part_by_itself_and_in_a_gang tells it")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told() == ("ok", "none, and none is asked for")
    asked = told("cluster.stages.finetune.gpus_per_node=4")
    assert asked == ("warn", f"none, though 4 a node are asked for: torch {torch.__version__} takes the CPU")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.65.06, NVIDIA H100 80GB HBM3'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert told() == ("fail", f"driver 580.65.06, NVIDIA H100 80GB HBM3, but torch {torch.__version__} does not see it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30))
    assert told() == ("ok", "NVIDIA H100, 80 GiB; NVIDIA H100, 80 GiB; driver 580.65.06, NVIDIA H100 80GB HBM3")


def test_no_torch_on_the_login_node(drawn: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from skinsynth.doctor import login, submit
login.login("configs/demo.yaml", {overrides(drawn, tmp_path)!r}, True)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_tables_and_folders_are_read_as_prepare_would(drawn: Path, tmp_path: Path) -> None:
    table = tmp_path / "metadata.csv"
    table.write_text("image_name,age\na,40\n")
    (tmp_path / "empty").mkdir()
    cfg = config.load("configs/demo.yaml", [f"data.metadata={table}", f"data.images={drawn / 'images'}", "data.duplicates=null",
                                            f"data.synthetic={tmp_path / 'empty'}"])
    found = {one.name: one for one in check.data(cfg)}
    assert {name: one.state for name, one in found.items()} == {"data.metadata": "fail", "data.images": "ok", "data.synthetic": "fail"}
    assert "has no column 'target'" in found["data.metadata"].found
    assert "it has: nothing" in found["data.synthetic"].found
    cfg.data.metadata, cfg.data.synthetic = str(drawn / "metadata.csv"), None
    assert "120 rows that can be used" in {one.name: one for one in check.data(cfg)}["data.metadata"].found
    table.write_text("image_name,subject,target\na,1,0\n")
    cfg.data.metadata = str(table)
    warned = [one.found for one in check.data(cfg) if one.state == "warn"]
    assert len(warned) == 1
    assert "no patient or lesion ids" in warned[0]
    assert "not read: subject" in warned[0]
    cfg.data.metadata, cfg.data.images, cfg.data.instance_data_dir, cfg.data.class_data_dir = None, None, str(drawn), str(drawn)
    assert [one.found for one in check.data(cfg) if one.state == "warn"] == [isic.without_ids(None)]
