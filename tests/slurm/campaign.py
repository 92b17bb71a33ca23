"""What the tests on the real Slurm share: asking it, a run that is under way there, and everything that may happen to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import DEVCLUSTER, ROOT, overrides, until

from skinsynth import config
from skinsynth.files import read_json
from skinsynth.run import RunDir

Environment = dict[str, str]


def command(env: Environment, *arguments: str, seconds: float = 120) -> str:
    done = subprocess.run(arguments, cwd=ROOT, env={**env, "COLUMNS": "160"}, text=True, capture_output=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def skinsynth_on(env: Environment, *arguments: str) -> str:
    return command(env, sys.executable, "-m", "skinsynth", *arguments)


def states(env: Environment, run: RunDir) -> dict[str, dict[str, object]]:
    found = json.loads(skinsynth_on(env, "status", str(run.path), "--json"))
    assert found["slurm"] is None
    return {row["node"]: row for row in found["stages"]}


LONG = {"finetune.steps": 90, "finetune.checkpoint_every": 4, "generate.classes.benign.count": 12, "generate.classes.malignant.count": 12,
        "generate.shard_size": 8, "generate.steps": 200}  # as long as all disturbances, one after the other


def begun(drawn: Path, chain: Path, folder: Path, **more: object) -> tuple[list[str], RunDir]:
    """A run whose data are prepared and encoded already."""
    items = overrides(drawn, folder, **{**LONG, "data.shards": folder / "shards", **more})
    run = RunDir(folder / "run")
    run.create(config.load("configs/demo.yaml", items))
    shutil.copytree(chain / "shards", folder / "shards", ignore=shutil.ignore_patterns("*-synthetic"), copy_function=os.link)
    for node in ("prepare", "encode"):
        shutil.copytree(chain / "run" / node, run.node(node))
    return items, run


def restarts(env: Environment, job: str) -> int:
    text = command(env, "scontrol", "show", "job", job, "--oneliner")
    return int(dict(pair.split("=", 1) for pair in text.split() if "=" in pair)["Restarts"])


def progress_of(run: RunDir, node: str) -> int:
    return sum(p["done"] for path in (run.node(node) / "progress").glob("*.json") if (p := read_json(path)))


class Campaign:
    """One stage under way on Slurm."""

    def __init__(self, env: Environment, run: RunDir, node: str, launch: list[str]):
        self.env, self.run, self.node, self.launch = env, run, node, launch
        self.held = False

    def restarted(self, job: str, before: int) -> bool:
        """A job that could not start where its last life was just ending is held by Slurm; the same command again releases it."""
        if "held" in command(self.env, "squeue", "-h", f"--jobs={job}", "--format=%r"):
            all_nodes_up(self.env)
            skinsynth_on(self.env, *self.launch)
            self.held = True
        return restarts(self.env, job) > before and bool(self.job)

    @property
    def job(self) -> str:
        """The first of the stage's jobs that is with Slurm."""
        ids = {job["id"] for job in read_json(self.run.path / "jobs.json") if job["node"] == self.node}
        lines = command(self.env, "squeue", "-h", "-r", "--format=%i %T").splitlines()
        return next((i for i, state in (line.split() for line in lines) if i in ids and state == "RUNNING"), "")

    def progress(self) -> int:
        return progress_of(self.run, self.node)

    def at_work(self) -> str:
        """Waits until the stage got further than it was; the job's id."""
        before = self.progress()
        until(f"{self.node} at work", lambda: self.job and (self.progress() != before or self.run.is_done(self.node)))
        assert not self.run.is_done(self.node), f"{self.node} was done before all disturbances were over"
        return self.job

    def endure(self, disturbances: dict[str, Callable[[str], object]]) -> None:
        """One after the other, each as soon as the stage is at work again."""
        for name, how in disturbances.items():
            job = self.at_work()
            before = restarts(self.env, job)
            print(f"{time.strftime('%H:%M:%S')} {self.node}, job {job}: {name}", flush=True)
            how(job)
            try:
                until(f"{self.node} restarted after {name}", lambda job=job, before=before: self.restarted(job, before))
            except AssertionError:  # why, in Slurm's words
                print(command(self.env, "squeue", "--format=%i %j %T %r %R"), command(self.env, "sinfo", "-N", "-l"),
                      command(self.env, "scontrol", "show", "job", job))
                raise
            assert restarts(self.env, job) == before + 1 or self.held, "one disturbance, one restart"
            self.held = False
        until(f"{self.node} ends", lambda: self.run.is_done(self.node), 400)  # the last restart may be from nothing, and 200 steps draw previews


def pids_of(env: Environment, job: str) -> list[int]:
    import psutil

    number = job.split("_")[0]
    found = []
    for process in psutil.process_iter():
        try:
            own = process.environ()
            if "submitit.core._submit" in " ".join(process.cmdline()) and own.get("SLURM_CONF") == env.get("SLURM_CONF") and (
                    own.get("SLURM_ARRAY_JOB_ID", own.get("SLURM_JOB_ID")) == number) and "SLURM_PROCID" in own:
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def all_nodes_up(env: Environment) -> bool:
    """Brings back what was set down, or drained because a job could not be started there."""
    found = dict(line.split() for line in command(env, "sinfo", "-h", "-N", "--partition=main", "--format=%N %T").splitlines())
    lost = [node for node, state in found.items() if "down" in state or "drain" in state]
    for node in lost:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], env=env, capture_output=True, check=False)
    return not lost


def disturbances(env: Environment) -> dict[str, Callable[[str], object]]:
    def host(job: str) -> str:
        return command(env, "squeue", "-h", f"--jobs={job}", "--format=%B").strip()

    def crash(job: str) -> None:
        node = host(job)
        command(env, str(DEVCLUSTER), "node-kill", node)
        command(env, str(DEVCLUSTER), "node-start", node)
        until("the node comes back", lambda: all_nodes_up(env))

    def down(job: str) -> None:
        command(env, "scontrol", "update", f"nodename={host(job)}", "state=down", "reason=test")
        until("the node comes back", lambda: all_nodes_up(env))

    def preempt(job: str) -> None:
        until("all nodes are there", lambda: all_nodes_up(env))
        command(env, "sbatch", "--partition=main", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap", "sleep 1")

    def time_limit(job: str) -> None:
        """The limit is drawn near: 60 s, of which the last 50 are those of the signal."""
        before = restarts(env, job)
        command(env, "scontrol", "update", f"jobid={job}", "timelimit=1")
        until("the job is restarted", lambda: restarts(env, job) > before)
        command(env, "scontrol", "update", f"jobid={job}", "timelimit=60")

    return {
        "a signal": lambda job: command(env, "scancel", "--signal=USR2", job),
        "kill -9 of a rank": lambda job: os.kill(pids_of(env, job)[-1], 9),
        "scontrol requeue": lambda job: command(env, "scontrol", "requeue", job),
        "the time limit": time_limit,
        "preemption": preempt,
        "the node set down": down,
        "slurmd and its steps killed": crash,
    }
