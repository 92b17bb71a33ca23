"""Several seeds of an arm: tasks of their own, each a gang, here and with Slurm; those that are missing are trained alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import overrides, skinsynth

from skinsynth import config, knobs, slurm, stages, status
from skinsynth.chain import chain as nodes
from skinsynth.estimate import estimate
from skinsynth.files import read_json
from skinsynth.local import shares
from skinsynth.quality import predictions
from skinsynth.run import RunDir, Task

BEFORE = ("prepare", "encode", "finetune", "generate", "screen")


def one_arm(folder: Path, chain: Path, drawn: Path) -> tuple[Path, RunDir]:
    """A configuration with a single arm of two seeds, and its run folder, in which all before classify is done."""
    cfg = config.load("configs/demo.yaml", [*overrides(drawn, folder), "classify.seeds=[3, 7]", "classify.steps=4", "classify.warmup_steps=0"])
    cfg.classify.arms = {"baseline": cfg.classify.arms["baseline"]}
    path, run = folder / "one-arm.yaml", RunDir(folder / "run")
    path.write_text(config.dump(cfg))
    run.create(cfg)
    shutil.copytree(chain / "shards", folder / "shards")
    for node in BEFORE:
        shutil.copytree(chain / "run" / node, run.node(node))
    return path, run


@pytest.mark.timeout(600)
def test_a_seed_that_failed_is_trained_alone_by_the_next_launch(chain: Path, drawn: Path, tmp_path: Path) -> None:
    path, run = one_arm(tmp_path, chain, drawn)
    node = "classify/baseline"
    run.node(node).mkdir(parents=True)
    (run.node(node) / "seed-7").write_text("in the way")
    first = skinsynth("launch", str(path))
    assert first.returncode == 1
    assert "classify/baseline failed: " in first.stderr
    assert "seed-7" in first.stderr
    assert run.unfinished(node, 2) == [1]
    assert list(predictions.finished(run.config(), run, "baseline")) == [3]
    row = next(row for row in status.rows(run)[0] if row.node == node)
    assert (row.state, row.done, row.total, row.unit) == ("failed", 4, 8, "steps")
    assert "task 1" in row.detail
    (run.node(node) / "seed-7").unlink()
    before = (run.node(node) / "seed-3/metrics.json").stat().st_mtime_ns
    assert shares(run.config(), run, next(n for n in nodes(run.config()) if n.name == node)) == [[Task(1, 2)]]
    second = skinsynth("launch", str(path))
    assert second.returncode == 0, second.stderr
    assert (run.node(node) / "seed-3/metrics.json").stat().st_mtime_ns == before
    assert run.metrics(node)["seeds"] == [3, 7]
    assert [len(status.logs(run, node, task)) for task in (0, 1)] == [1, 2]
    assert "stopped" not in second.stdout
    report = read_json(run.node("report") / "report.json")
    assert len(report["arms"]["baseline"]["auroc"]["seeds"]) == 2


@pytest.mark.parametrize(("asked", "said"), [("--arm baseline --seed 5", "--seed 5: classify.seeds of .* has 3, 7"),
                                             ("--arm nope", "--arm nope: classify.arms of .* has baseline")])
def test_a_seed_or_arm_that_is_not_there_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, said: str,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config.load("configs/demo.yaml", [f"run={tmp_path / 'run'}", "classify.seeds=[3, 7]", "classify.arms={baseline: {sources: {real: 1}}}"])
    run = RunDir(tmp_path / "run")
    run.create(cfg)
    before = sorted(run.path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["jobs.classify", str(run.path), *asked.split()])
    with pytest.raises(SystemExit) as ended:
        stages.main("classify")
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(run.path.rglob("*")) == before


def sbatch(cfg: knobs.Config, tasks: list[int]) -> str:
    run = RunDir(Path(cfg.run))
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string("work", run.path / "x", **slurm.parameters(cfg, run, "classify/hybrid", [], tasks),
                               map_count=len(tasks) if len(tasks) > 1 else None)


def test_an_arm_of_seeds_is_one_array_of_gangs() -> None:
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", "run=runs/golden", "classify.seeds=[0, 1, 2]", "cluster.stages.classify.nodes=2",
                                            "cluster.stages.classify.throttle=2"])
    text = slurm.script(cfg, RunDir(Path(cfg.run)), "classify/hybrid", 3, [])
    for line in ("--array=0-2%2", "--nodes=2", "--ntasks-per-node=4"):
        assert f"#SBATCH {line}\n" in text
    assert "tasks=(0 1 2)\n" in text
    assert {n.name: n.tasks(cfg) for n in nodes(cfg) if n.stage in ("finetune", "classify")} == {
        "finetune": 1, "classify/baseline": 3, "classify/hybrid": 3}
    rows = {row.node: row for row in estimate(cfg)}
    assert (rows["classify/hybrid"].tasks, rows["classify/hybrid"].ranks, rows["classify/hybrid"].devices) == (3, 8, 24)


def test_a_gang_of_an_array_that_failed_by_itself_gets_no_other_turn(tmp_path: Path) -> None:
    """The tasks that are left are numbered anew in their array; the file that tells of a failure has the seed's number."""
    cfg = config.load("configs/demo.yaml", ["cluster=slurm", f"run={tmp_path}", "classify.seeds=[0, 1, 2]"])
    found = re.search(r"code=\$\?\n(.*)", sbatch(cfg, [0, 2]), re.DOTALL)
    assert found
    asked = tmp_path / "asked"
    for name, text in (("squeue", "echo RUNNING"), ("scontrol", f"echo $2 >> {asked}"), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for number, failed, again in ((1, 2, False), (1, 1, True), (0, 0, False), (0, 2, True)):
        path = RunDir(tmp_path).failed_path("classify/hybrid", failed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "17",
               "SLURM_JOB_ID": "18"}
        done = subprocess.run(["bash", "-c", f"code=75\n{found[1]}"], env=env, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 75, done.stderr
        assert (asked.exists() and asked.read_text() == f"17_{number}\n") is again, (number, failed, done.stderr)
        asked.unlink(missing_ok=True)
        path.unlink()
