"""An arm of two seeds on the real Slurm: one array of gangs, of which one loses a rank."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from campaign import Environment, pids_of, skinsynth_on, states
from conftest import overrides, until

from skinsynth import config
from skinsynth.files import read_json
from skinsynth.run import RunDir
from skinsynth.train.log import read_lines

pytestmark = pytest.mark.slurm
NODE = "classify/baseline"


@pytest.mark.timeout(600)
def test_a_gang_that_loses_a_rank_goes_on_and_the_other_is_left_alone(slurm: Environment, chain: Path, drawn: Path, tmp_path: Path) -> None:
    if "SKINSYNTH_DEVCLUSTER" not in slurm:
        pytest.skip("ranks can be killed on our own devcluster only")
    items = overrides(drawn, tmp_path, **{"classify.seeds": "[3, 7]", "classify.steps": 60, "classify.checkpoint_every": 5,
                                          "classify.evaluate_every": 30, "classify.warmup_steps": 0})
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", items))
    shutil.copytree(chain / "shards", tmp_path / "shards")
    for node in ("prepare", "encode", "finetune", "generate", "screen"):
        shutil.copytree(chain / "run" / node, run.node(node))
    hybrid = run.node("classify/hybrid")
    hybrid.mkdir(parents=True)
    run.finish("classify/hybrid", {"seeds": []}, [])
    skinsynth_on(slurm, "launch", "configs/demo.yaml", *items, "cluster=devcluster", "cluster.stages.classify.tasks_per_node=2",
                 "cluster.stages.report.extra={hold: true}")
    jobs = {job["task"]: job["id"] for job in read_json(run.path / "jobs.json") if job["node"] == NODE}
    assert [number.split("_")[1] for _, number in sorted(jobs.items())] == ["0", "1"]
    until("seed 7 has saved", lambda: list((run.node(NODE) / "seed-7/checkpoints").glob("step-*")))
    mine = [pid for pid in pids_of(slurm, jobs[1]) if psutil.Process(pid).environ()["SLURM_ARRAY_TASK_ID"] == "1"]
    os.kill(mine[-1], signal.SIGKILL)  # srun's own processes come first
    until("both seeds", lambda: run.is_done(NODE) or states(slurm, run)[NODE]["state"] == "failed")
    assert run.metrics(NODE)["seeds"] == [3, 7]
    assert read_json(run.node(NODE) / "restarts/1.json")["restarts"] == 1
    assert not (run.node(NODE) / "restarts/0.json").exists()
    for seed in (3, 7):
        assert [row["step"] for row in read_lines(run.node(NODE) / f"seed-{seed}/metrics.jsonl")] == list(range(1, 61))
        newest = max((run.node(NODE) / f"seed-{seed}/checkpoints").glob("step-*"))
        assert read_json(newest / "complete.json")["topology"]["ranks"] == 2
    row = states(slurm, run)[NODE]
    assert (row["state"], row["done"], row["total"]) == ("done", 120, 120)
    told = skinsynth_on(slurm, "logs", str(run.path), NODE, "--task", "1")
    assert "seed-7/checkpoints/step-" in told
    assert "seed-3" not in told
    skinsynth_on(slurm, "cancel", str(run.path))
