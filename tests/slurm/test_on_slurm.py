"""On the real Slurm: the whole chain; a campaign of everything that may go wrong, against an undisturbed run; an array with failing tasks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import LONG, Campaign, Environment, begun, command, disturbances, restarts, skinsynth_on, states
from conftest import ROOT, free_port, overrides, until

from skinsynth.files import read_json
from skinsynth.run import RunDir

pytestmark = pytest.mark.slurm


@pytest.mark.timeout(600)
def test_the_chain_from_launch_to_report_over_four_nodes(slurm: Environment, chain: Path, drawn: Path, tmp_path: Path) -> None:
    """finetune on 2 nodes x 2 tasks under ZeRO-2. The launcher submits without torch; the sets that do not depend on the number of ranks
    are those of the local run."""
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster"]
    code = f"import sys; sys.argv = ['skinsynth', *{arguments!r}]\nfrom skinsynth.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    said = command(slurm, sys.executable, "-c", code + "print('heavy:', sorted({'torch', 'diffusers', 'cv2'} & set(sys.modules)))")
    assert "heavy: []" in said
    assert "finetune             submitted as" in said
    run = RunDir(tmp_path / "run")
    until("the report", lambda: run.is_done("report") or "failed" in {row["state"] for row in states(slurm, run).values()}, 400)
    assert {row["state"] for row in states(slurm, run).values()} == {"done"}
    logs = "".join(p.read_text() for p in (run.node("finetune") / "submit").glob("*_log.out"))
    assert "global_rank=3(4)" in logs
    assert "local_rank=1(2), node=1(2)" in logs
    assert read_json(max((run.node("finetune") / "checkpoints").glob("step-*")) / "complete.json")["topology"] == {"ranks": 4, "zero": 2}
    ours, theirs = (read_json(folder / "shards/small-train/manifest.json") for folder in (tmp_path, chain))
    assert [shard["sha256"] for shard in ours["shards"]] == [shard["sha256"] for shard in theirs["shards"]]
    report = read_json(run.path / "report/report.json")
    assert report["synthetic"]["generated"] == 27
    assert skinsynth_on(slurm, "logs", str(run.path), "generate", "--task", "1").count("Job completed successfully") == 1
    assert "all 8 stages" in skinsynth_on(slurm, *arguments)


# ---- the campaign: each disturbance in turn, for a gang (finetune) and for an array (generate) at once ----

@pytest.fixture(scope="session")
def undisturbed(drawn: Path, chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """finetune on two ranks and generate in one task, on this machine, to hold against."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, run = begun(drawn, chain, folder)
    port = str(free_port())
    ranks = [subprocess.Popen([sys.executable, "-m", "jobs.finetune", str(run.path)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [rank.wait(170) for rank in ranks] == [0, 0]
    command(dict(os.environ), sys.executable, "-m", "jobs.generate", str(run.path), seconds=170)
    return folder


@pytest.mark.soak  # minutes each; make test has the signal (test_a_stage_by_hand), and local kills (test_finetune, test_chain)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("node", "chosen"), [
    ("finetune", ("kill -9 of a rank", "slurmd and its steps killed")), ("generate", ("a signal", "preemption", "scontrol requeue")),
    ("finetune", None), ("generate", None)])
def test_whatever_happens_it_ends_with_the_same(slurm: Environment, undisturbed: Path, drawn: Path, chain: Path, tmp_path: Path, node: str,
                                                chosen: tuple[str, ...] | None) -> None:
    if "SKINSYNTH_DEVCLUSTER" not in slurm:
        pytest.skip("nodes can be killed on our own devcluster only")
    items, run = begun(drawn, chain, tmp_path)
    if node == "generate":
        shutil.copytree(undisturbed / "run/finetune/weights", run.weights, copy_function=os.link)
        run.finish("finetune", {"steps": LONG["finetune.steps"], "loss": 0.0}, [run.weights / "lineage.json"])
    held = [f"cluster.stages.{stage}.extra={{hold: true}}" for stage in ("classify", "screen", "generate") if stage != node]
    launch = ["launch", "configs/demo.yaml", *items, "cluster=devcluster", "cluster.partition=scavenge", "cluster.max_restarts=12",
              "cluster.signal_seconds=50", "cluster.stages.finetune.tasks_per_node=1", "cluster.stages.generate.array=1", *held]
    skinsynth_on(slurm, *launch)
    ways = disturbances(slurm)
    Campaign(slurm, run, node, launch).endure({name: ways[name] for name in chosen or ways})
    skinsynth_on(slurm, "cancel", str(run.path))
    assert read_json(run.node(node) / "restarts/0.json")["restarts"] >= len(chosen or ways)
    if node == "generate":
        same_shards(tmp_path, undisturbed)
    else:
        same_losses(run, RunDir(undisturbed / "run"))


def same_shards(made: Path, expected: Path) -> None:
    tars = [{p.name: p.read_bytes() for p in (folder / "shards/run-synthetic").glob("*.tar")} for folder in (made, expected)]
    assert len(tars[0]) == 3
    assert tars[0] == tars[1]
    assert not list((made / "shards/run-synthetic").glob(".*tmp"))


def same_losses(made: RunDir, expected: RunDir) -> None:
    mine, theirs = ([json.loads(line) for line in (run.node("finetune") / "metrics.jsonl").read_text().splitlines()] for run in (made, expected))
    assert [row["step"] for row in mine] == list(range(1, LONG["finetune.steps"] + 1))
    assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]
    assert read_json(made.weights / "lineage.json")["weights_sha256"] == read_json(expected.weights / "lineage.json")["weights_sha256"]


# ---- one failing, and what the same command does then ----

@pytest.mark.parametrize("tasks", [12, pytest.param(200, marks=pytest.mark.soak)])
def test_of_an_array_only_the_failing_tasks_run_again(slurm: Environment, drawn: Path, tmp_path: Path, tasks: int) -> None:
    """Three shards of prepare cannot be written. What waits for it is cancelled; mended, launch submits those three tasks alone."""
    items = overrides(drawn, tmp_path, **{"prepare.shard_size": 1})
    arguments = ["launch", "configs/demo.yaml", *items, "cluster=devcluster", f"cluster.stages.prepare.array={tasks}",
                 "cluster.stages.prepare.throttle=4"]
    bad = [3, 7, 10]
    run, train = RunDir(tmp_path / "run"), tmp_path / "shards/small-train"
    for unit in bad:  # a folder is in the way of the shard
        (train / f"{unit:05d}.tar" / "in-the-way").mkdir(parents=True)
    skinsynth_on(slurm, *arguments)
    until("Slurm has cancelled what waited", lambda: states(slurm, run)["report"]["state"] == "stopped", 60 + 3 * tasks)
    found = states(slurm, run)
    assert found["prepare"]["state"] == "failed"
    assert "3 tasks failed; task 3: Is a directory" in str(found["prepare"]["detail"])
    assert found["prepare"]["tasks"] == {"COMPLETED": tasks - 3, "FAILED": 3}
    assert found["encode"]["state"] == "stopped"
    assert "cancelled, since prepare did not finish" in str(found["encode"]["detail"])
    assert "00003.tar" in skinsynth_on(slurm, "logs", str(run.path), "prepare", "--task", "3")
    first = {job["id"] for job in read_json(run.path / "jobs.json") if job["node"] == "prepare"}
    for unit in bad:
        shutil.rmtree(train / f"{unit:05d}.tar")
    said = skinsynth_on(slurm, *arguments)
    assert f"(tasks 3, 7, 10 of {tasks})" in said
    again = {job["id"] for job in read_json(run.path / "jobs.json") if job["node"] == "prepare"} - first
    assert len(again) == 3
    until("prepare is done", lambda: run.is_done("prepare"))
    assert states(slurm, run)["encode"]["state"] in ("pending", "running")
    skinsynth_on(slurm, "cancel", str(run.path))


def test_a_stage_by_hand(slurm: Environment, drawn: Path, chain: Path, tmp_path: Path) -> None:
    """`sbatch slurm/stage.sbatch` on a folder made by `config --write`; a signal leads to a requeue without submitit, too."""
    items, run = begun(drawn, chain, tmp_path)
    shown = skinsynth_on(slurm, "config", "configs/demo.yaml", *items, "--write")
    assert f"steps: {LONG['finetune.steps']}" in shown
    env = {**slurm, "SKINSYNTH_PYTHON": f"env {sys.executable}"}
    job = command(env, "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/%j.out",
                  "slurm/stage.sbatch", "finetune", str(run.path)).strip()
    until("a checkpoint", lambda: list((run.node("finetune") / "checkpoints").glob("step-*/complete.json")))
    command(env, "scancel", "--signal=USR2", job)
    until("it asked for another turn", lambda: restarts(env, job) == 1)
    command(env, "scancel", job)
    log = (tmp_path / f"{job}.out").read_text()
    assert "finetune stopped at step" in log
    assert f"asking Slurm to run job {job} again" in log
    until("it is gone", lambda: job not in command(env, "squeue", "-h", "--format=%i"))
    assert restarts(env, job) == 1, "a cancelled job asks for no other turn"


def test_only_what_srun_starts_is_one_of_many_ranks(slurm: Environment, tmp_path: Path) -> None:
    """A stage or a launch in a batch script of several tasks, without srun, is alone; in the step that it starts it is not."""
    python = f'{sys.executable} -c "from skinsynth.world import place; here = place()[0]; print(here.rank, here.size)"'
    command(slurm, "sbatch", "--wait", "--ntasks=2", f"--output={tmp_path}/out", "--wrap", f"{python}; srun --label {python}")
    alone, *ranks = (tmp_path / "out").read_text().splitlines()
    assert (alone, sorted(ranks)) == ("0 1", ["0: 0 2", "1: 1 2"])


def test_what_slurm_holds_since_it_could_not_start_is_released_by_the_next_launch(slurm: Environment, drawn: Path, tmp_path: Path) -> None:
    """No node can make the job's folder, as when its disk is full: Slurm requeues it and holds it, for an administrator to look."""
    if "SKINSYNTH_DEVCLUSTER" not in slurm:
        pytest.skip("nodes can be broken on our own devcluster only")
    shown = command(slurm, "scontrol", "show", "config")
    job = int(next(line.split("=")[1] for line in shown.splitlines() if line.startswith("NEXT_JOB_ID")))
    blockers = [Path(slurm["SKINSYNTH_DEVCLUSTER"]) / f"spool/node{n}/job{job:05d}" for n in range(1, 5)]
    for blocker in blockers:
        blocker.write_text("in the way")
    arguments = ["launch", "configs/demo.yaml", *overrides(drawn, tmp_path), "cluster=devcluster", "cluster.stages.prepare.array=1"]
    run = RunDir(tmp_path / "run")
    try:
        skinsynth_on(slurm, *arguments)
        until("Slurm holds it", lambda: "launch failed requeued held" in str(states(slurm, run)["prepare"]["detail"]))
    finally:
        for blocker in blockers:
            blocker.unlink()
    said = skinsynth_on(slurm, *arguments)
    assert f"released what Slurm held because it could not be started: {job} (launch failed requeued held)" in said
    assert f"prepare              with Slurm already: {job}" in said
    until("prepare is done", lambda: run.is_done("prepare"))
    skinsynth_on(slurm, "cancel", str(run.path))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_job_that_gets_nowhere_ends_with_the_reason(slurm: Environment, drawn: Path, chain: Path, tmp_path: Path) -> None:
    """Every rank is killed before its first checkpoint, each time: after so many restarts in a row the job gives up, and says why."""
    items, run = begun(drawn, chain, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec timeout --signal=KILL 7 {sys.executable} \"$@\"\n")
    python.chmod(0o755)
    skinsynth_on(slurm, "launch", "configs/demo.yaml", *items, "cluster=devcluster", f"cluster.python={python}", "cluster.max_restarts=2",
                 "cluster.stages.finetune.tasks_per_node=1", "cluster.stages.classify.extra={hold: true}", "cluster.signal_seconds=5")
    until("it gives up", lambda: states(slurm, run)["finetune"]["state"] == "failed")
    assert "it was restarted 3 times in a row without getting any further" in str(states(slurm, run)["finetune"]["detail"])
    job = next(job["id"] for job in read_json(run.path / "jobs.json") if job["node"] == "finetune")
    assert restarts(slurm, job) == 3
    skinsynth_on(slurm, "cancel", str(run.path))
