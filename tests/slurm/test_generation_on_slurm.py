"""Many images by an array on the real Slurm, while its tasks are killed, requeued and lose a node: each planned image comes out once, and the
bytes are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from campaign import Environment, all_nodes_up, begun, command, pids_of, progress_of, skinsynth_on
from conftest import ROOT, until

from skinsynth.files import read_json
from skinsynth.run import RunDir

pytestmark = pytest.mark.slurm


@dataclass
class Havoc:
    """Kills, requeues and a lost node, each once so many more images are there."""

    env: Environment = field(repr=False)
    run: RunDir
    launch: list[str] = field(repr=False)
    images: int
    kills: int
    killed: int = 0
    requeued: int = 0
    nodes_lost: int = 0
    released: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def tasks(self) -> dict[str, str]:
        """The stage's jobs that are with Slurm, and their states."""
        ids = {job["id"] for job in read_json(self.run.path / "jobs.json") if job["node"] == "generate"}
        lines = command(self.env, "squeue", "-h", "-r", "--format=%i|%T|%r").splitlines()
        return {i: f"{state} {reason}" for i, state, reason in (line.split("|") for line in lines) if i in ids}

    def wreak(self) -> None:
        reached = 0
        while not self.run.is_done("generate"):
            reached = max(reached, progress_of(self.run, "generate"))
            if self.killed < self.kills and reached >= (self.killed + 1) * self.images // (self.kills + 3):
                self.one()
            self.mend()
            time.sleep(0.3)

    def one(self) -> None:
        running = [i for i, state in self.tasks().items() if state.startswith("RUNNING")]
        pids = pids_of(self.env, running[0]) if running else []
        if not pids:
            return
        os.kill(self.rng.choice(pids), 9)
        self.killed += 1
        if self.killed % 4 == 0:
            chosen = self.rng.choice(running)  # it may have ended just now
            subprocess.run(["scontrol", "requeue", chosen], env=self.env, capture_output=True, check=False)
            self.requeued += 1
        if self.killed == self.kills // 2:
            host = command(self.env, "squeue", "-h", f"--jobs={running[-1]}", "--format=%B").strip()
            command(self.env, "scontrol", "update", f"nodename={host}", "state=down", "reason=test")
            self.nodes_lost += 1

    def mend(self) -> None:
        """What an administrator and a user would do: the node comes back; what Slurm holds, the same command again releases."""
        if self.nodes_lost:
            all_nodes_up(self.env)
        states = self.tasks().values()
        if any("held" in state or "JobHold" in state for state in states) or (not states and not self.run.is_done("generate")):
            skinsynth_on(self.env, *self.launch)
            self.released += 1


@pytest.mark.parametrize(("images", "kills", "mode"), [
    pytest.param(300, 3, "array", marks=pytest.mark.timeout(600)),
    pytest.param(20_000, 30, "array", marks=(pytest.mark.soak, pytest.mark.timeout(2400))),
    pytest.param(2_000, 4, "gang", marks=(pytest.mark.soak, pytest.mark.timeout(900)))])
def test_every_image_once_whatever_is_killed(slurm: Environment, drawn: Path, chain: Path, tmp_path: Path, images: int, kills: int,
                                             mode: str) -> None:
    if "SKINSYNTH_DEVCLUSTER" not in slurm:
        pytest.skip("nodes can be set down on our own devcluster only")
    settings = {"generate.weights": "base", "generate.classes.benign.count": images // 2, "generate.classes.malignant.count": images // 2,
                "generate.shard_size": max(20, images // 200), "generate.steps": 2, "generate.guidance": 1.0, "generate.batch": 20,
                "generate.commit_every": 1, "prepare.size": 32, "generate.mode": mode}
    items, run = begun(drawn, chain, tmp_path / "disturbed", **settings)
    tasks = 6 if images > 1000 else 3
    launch = ["launch", "configs/demo.yaml", *items, "cluster=devcluster", "cluster.max_restarts=50", f"cluster.stages.generate.array={tasks}",
              "cluster.stages.generate.throttle=4", "cluster.stages.generate.nodes=2", "cluster.stages.generate.tasks_per_node=2",
              *(f"cluster.stages.{stage}.extra={{hold: true}}" for stage in ("screen", "classify"))]
    skinsynth_on(slurm, *launch)
    havoc = Havoc(slurm, run, launch, images, kills)
    havoc.wreak()
    print(havoc)
    assert (havoc.killed, havoc.nodes_lost) == (kills, 1)
    assert {job["tasks"] for job in read_json(run.path / "jobs.json") if job["node"] == "generate"} == {tasks if mode == "array" else 1}
    skinsynth_on(slurm, "cancel", str(run.path))
    told = skinsynth_on(slurm, "verify", str(tmp_path / "disturbed/shards/run-synthetic"))
    assert f"synthetic, {images:,} images of {images:,} planned (0 left out" in told
    assert "all as it should be" in told
    assert list((tmp_path / "disturbed/shards/run-synthetic").rglob(".*")) == []
    _, alone = begun(drawn, chain, tmp_path / "undisturbed", **settings)
    done = subprocess.run([sys.executable, "-m", "jobs.generate", str(alone.path)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0
    ours, theirs = (read_json(tmp_path / name / "shards/run-synthetic/manifest.json") for name in ("disturbed", "undisturbed"))
    assert [s["sha256"] for s in ours["shards"]] == [s["sha256"] for s in theirs["shards"]]
    until("nothing is left with Slurm", lambda: not havoc.tasks())
