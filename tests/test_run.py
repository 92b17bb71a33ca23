from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import overrides
from rich.console import Console

from skinsynth import config, files, slurm, status
from skinsynth import launch as launches
from skinsynth import run as runs
from skinsynth.errors import UserError
from skinsynth.files import write_json
from skinsynth.knobs import Config
from skinsynth.run import Progress, RunDir, Task


def test_a_run_folder_keeps_its_configuration(tmp_path: Path) -> None:
    run, cfg = RunDir(tmp_path / "run"), Config()
    run.create(cfg)
    cfg.cluster.cores = 3  # changes where, not what
    run.create(cfg)
    cfg.finetune.steps = 7
    with pytest.raises(UserError, match=r"finetune.steps: 1000 -> 7"):
        run.create(cfg)
    assert run.config().finetune.steps == 1000


def test_done_means_that_the_outputs_are_there(tmp_path: Path) -> None:
    run, output = RunDir(tmp_path), tmp_path / "weights"
    output.touch()
    run.finish("finetune", {"loss": 1.0}, [output])
    assert run.is_done("finetune")
    assert run.metrics("finetune") == {"loss": 1.0}
    output.unlink()
    assert not run.is_done("finetune")


def test_done_is_done_seen_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far/runs/isic").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/runs").symlink_to(tmp_path / "far/runs")
    monkeypatch.chdir(tmp_path / "here")
    run, shards = RunDir(Path("runs/isic")), Path("shards/isic-train/manifest.json")
    write_json(shards, {})
    run.finish("prepare", {}, [shards])
    assert run.is_done("prepare")
    monkeypatch.chdir(tmp_path)
    assert RunDir(tmp_path / "here/runs/isic").is_done("prepare")
    write_json(run.done_path("encode"), {"node": "encode", "metrics": {}, "outputs": ["here/shards/isic-train/manifest.json"]})
    assert run.is_done("encode"), "as it was written before: relative to where it was run from"
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/shards/isic-train/manifest.json").unlink()
    assert not run.is_done("prepare")


def finished(folder: Path) -> RunDir:
    """A run of the demo in which every node is done; what one makes is a file that holds its name."""
    run = RunDir(folder)
    run.create(config.load("configs/demo.yaml"))
    for node in config.needs(run.config()):
        remake(run, node, node)
    return run


def remake(run: RunDir, node: str, what: str) -> None:
    write_json(run.node(node) / "made.json", what)
    run.finish(node, {"images": 1}, [run.node(node) / "made.json"])


def undone(run: RunDir) -> list[str]:
    return [node for node in config.needs(run.config()) if not run.is_done(node)]


def test_what_needs_a_node_that_made_something_else_since_is_not_done(tmp_path: Path) -> None:
    run = finished(tmp_path)
    assert undone(run) == []
    run.done_path("generate").unlink()
    assert undone(run) == ["generate", "screen", "classify/hybrid", "report"]
    remake(run, "generate", "generate")
    assert undone(run) == [], "it made the same again"
    remake(run, "generate", "another set")
    assert undone(run) == ["screen", "classify/hybrid", "report"]
    assert {row.node for row in status.rows(run)[0] if row.state == "done"} == {"prepare", "encode", "finetune", "generate", "classify/baseline"}
    for node in ("screen", "classify/hybrid", "report"):
        remake(run, node, node)
    assert undone(run) == []


def test_a_stage_by_hand_is_done_though_nothing_before_it_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create(config.load("configs/demo.yaml"))
    remake(run, "classify/baseline", "by hand")
    assert run.is_done("classify/baseline")


def test_a_run_that_noted_no_needs_stays_done(tmp_path: Path) -> None:
    run = finished(tmp_path)
    for node in config.needs(run.config()):
        done = json.loads(run.done_path(node).read_text())
        write_json(run.done_path(node), {key: done[key] for key in ("node", "metrics", "outputs", "relative")})
    assert undone(run) == []
    remake(run, "report", "report")
    assert undone(run) == []
    remake(run, "screen", "anew")
    assert undone(run) == ["report"], "hybrid did not say what it was made from"


def test_a_second_launch_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock(), pytest.raises(UserError, match=f"process {os.getpid()} on "), run.lock():
        pass
    assert not (tmp_path / "launch.lock").exists()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    owner = {"pid": int(dead.stdout), "born": 1.0, "host": os.uname().nodename, "since": "yesterday"}
    (tmp_path / "launch.lock").write_text(json.dumps(owner))
    with run.lock():
        assert json.loads((tmp_path / "launch.lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_taken_over_once_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = RunDir(tmp_path), tmp_path / "launch.lock"
    path.write_text(json.dumps({"pid": 1, "born": 1.0, "host": "login2", "since": "yesterday"}))
    with pytest.raises(UserError, match=r"process 1 on login2 since yesterday.*taken over after 120 s"), run.lock():
        pass
    os.utime(path, (time.time() - 121,) * 2)
    with run.lock():
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(runs, "LOCK_SILENT", 0.6)
    with run.lock():
        first = path.stat().st_mtime
        time.sleep(0.5)
        assert path.stat().st_mtime > first, "its owner touches it all the time"


def of_another_host(run: RunDir) -> Path:
    """As if the run were being launched there just now."""
    path = run.path / "launch.lock"
    path.write_text(json.dumps({"pid": os.getpid(), "born": files.birth(os.getpid()), "host": "login2", "since": "just now"}))
    return path


def test_the_owner_of_a_lock_is_known_on_every_host(tmp_path: Path) -> None:
    run, here = RunDir(tmp_path), os.uname().nodename
    assert run.lock_owner() is None
    with run.lock():
        assert run.lock_owner() == (here, os.getpid())
    (tmp_path / "launch.lock").write_text(json.dumps({"pid": 2**30, "born": 1.0, "host": here, "since": "yesterday"}))
    assert run.lock_owner() is None, "it is dead"
    path = of_another_host(run)
    assert run.lock_owner() == ("login2", os.getpid())
    os.utime(path, (time.time() - 121,) * 2)
    assert run.lock_owner() is None, "its owner does not touch it any more"


def test_a_launch_on_another_host_is_stopped_there(tmp_path: Path) -> None:
    """Its process has a number that here is another's: this test's own."""
    run = RunDir(tmp_path)
    run.create(config.load("configs/demo.yaml"))
    path = of_another_host(run)
    for stage in (None, "generate"):
        with pytest.raises(UserError, match=rf"is being launched on login2 \(process {os.getpid()}\): stop it there"):
            launches.cancel(run, stage, Console(quiet=True))
    os.utime(path, (time.time() - 121,) * 2)
    told = Console(file=io.StringIO(), width=200)
    launches.cancel(run, None, told)
    assert "nothing of" in told.file.getvalue()  # type: ignore[attr-defined]


def test_what_another_host_runs_is_seen_as_running(tmp_path: Path) -> None:
    """Its processes cannot be seen, what their tasks tell of their progress can."""
    run = RunDir(tmp_path)
    run.create(config.load("configs/demo.yaml"))
    run.finish_task("prepare", Task())  # it did its share just now
    Progress(run, "encode", 0, 100, "images").set(30)
    Progress(run, "finetune", 0, 400, "steps").set(12)
    os.utime(run.progress_path("encode", 0), (time.time() - 121,) * 2)

    def states() -> dict[str, str]:
        return {row.node: row.state for row in status.rows(run)[0]}

    assert states()["finetune"] == "stopped"
    path = of_another_host(run)
    found = {row.node: row for row in status.rows(run)[0]}
    assert [found[node].state for node in ("prepare", "encode", "finetune", "generate")] == ["stopped", "stopped", "running", "waiting"]
    assert found["finetune"].detail == "launched on login2"
    os.utime(path, (time.time() - 121,) * 2)
    assert states()["finetune"] == "stopped"


def test_of_two_that_find_a_dead_lock_one_alone_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other takes it over between this one's look and its hand."""
    path, here = tmp_path / "launch.lock", os.uname().nodename
    other = {"pid": os.getpid(), "born": files.birth(os.getpid()), "host": here, "since": "just now"}
    path.write_text(json.dumps({"pid": 2**30, "born": 1.0, "host": here, "since": "yesterday"}))
    take_away = runs._take_away

    def late(path: Path, dead: dict[str, object]) -> None:
        path.write_text(json.dumps(other))
        take_away(path, dead)

    monkeypatch.setattr(runs, "_take_away", late)
    with pytest.raises(UserError, match=f"process {os.getpid()} on {here} since just now"), RunDir(tmp_path).lock():
        pass
    assert json.loads(path.read_text()) == other
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_whose_owner_died_before_it_wrote_is_taken_over_too(tmp_path: Path) -> None:
    run, path = RunDir(tmp_path), tmp_path / "launch.lock"
    for torn in ("", '{"pid": 1'):
        path.write_text(torn)
        assert run.lock_owner() is None
        with pytest.raises(UserError, match="a process that did not say which"), run.lock():
            pass
        os.utime(path, (time.time() - 121,) * 2)
        with run.lock():
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_that_another_has_taken_over_stays(tmp_path: Path) -> None:
    """As after a launch that was asleep for minutes."""
    path, other = tmp_path / "launch.lock", {"pid": 1, "born": 1.0, "host": "another", "since": "just now"}
    with RunDir(tmp_path).lock():
        path.write_text(json.dumps(other))
    assert json.loads(path.read_text()) == other


def test_tasks_share_the_units_without_overlap() -> None:
    units = [0, 2, 3, 4, 7, 9]
    shares = [Task(i, 3).mine(units) for i in range(3)]
    assert sorted(u for share in shares for u in share) == units


def test_a_launch_that_is_refused_leaves_the_configuration_to_the_one_that_runs(tmp_path: Path) -> None:
    """Jobs read it when they begin."""
    items = [f"run={tmp_path / 'run'}", "cluster=debug"]
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", items))
    before = run.config_path.read_bytes()
    with run.lock(), pytest.raises(UserError, match="is being launched already"):
        launches.launch(config.load("configs/demo.yaml", [*items, "cluster.cores=3"]), Console(quiet=True))
    assert run.config_path.read_bytes() == before


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Slurm's programs, as far as a test needs them."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("kind", ["debug", "slurm"])
def test_where_jobs_are_with_slurm_a_refused_launch_changes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it would work beside them, or have what they do be done as a gang."""
    (tmp_path / "bin").mkdir()
    run, items = RunDir(tmp_path / "run"), [f"run={tmp_path / 'run'}", "cluster=slurm"]
    run.create(config.load("configs/demo.yaml", items))
    slurm.note(run, [slurm.Submitted("generate", "17_0", 0, 2), slurm.Submitted("generate", "17_1", 1, 2)])
    before, name = run.config_path.read_bytes(), slurm.job_name(run, "generate")
    programs(tmp_path / "bin", monkeypatch, squeue="\n".join(f"echo '17_{n}|PENDING||{name}|None'" for n in (0, 1)), sbatch="exit 1", srun="")
    cfg = config.load("configs/demo.yaml", [*items, f"cluster={kind}", "generate.mode=gang"])
    why = "are with Slurm: wait" if kind == "debug" else "generate.mode=gang, but jobs 17_.* were submitted with array"
    with pytest.raises(UserError, match=why):
        launches.launch(cfg, Console(quiet=True))
    assert run.config_path.read_bytes() == before


def test_what_was_cancelled_while_what_it_needs_goes_on_does_not_blame_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", [f"run={run.path}", "cluster=slurm"]))
    slurm.note(run, [slurm.Submitted(node, str(17 + n), 0, 1) for n, node in enumerate(("prepare", "encode", "finetune"))])
    programs(tmp_path / "bin", monkeypatch, squeue=f"echo '17|PENDING||{slurm.job_name(run, 'prepare')}|Resources'",
             sacct="echo '18|CANCELLED by 0||'; echo '19|CANCELLED by 0||'")
    found = [(row.node, row.state, row.detail) for row in status.rows(run)[0]]
    assert found[:3] == [("prepare", "pending", "Resources"), ("encode", "stopped", "Slurm: CANCELLED"),
                         ("finetune", "stopped", "cancelled, since encode did not finish")]


OTHER_KEYS = "submitted with other cluster keys: 'skinsynth cancel RUN' first"


@pytest.mark.parametrize(("keys", "queue", "told"), [
    ([], [1, 2, 3], "with Slurm already: 17_1, 17_2, 17_3"),
    (["cluster.partition=new"], [1, 2, 3], f"with Slurm already: 17_1, 17_2, 17_3 ({OTHER_KEYS})"),
    (["cluster.partition=new"], [3], f"submitted as 18_0, 18_1 (tasks 1, 2 of 4); with Slurm already: 17_3 ({OTHER_KEYS})"),
    (["cluster.stages.prepare.array=2"], [3],
     f"with Slurm already: 17_3 ({OTHER_KEYS}; 2 of its 4 tasks are missing: launch again once these have ended)")])
def test_what_is_with_slurm_and_unlike_what_would_be_submitted_is_told(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str],
                                                                      queue: list[int], told: str) -> None:
    (tmp_path / "bin").mkdir()
    run, items = RunDir(tmp_path / "run"), [*overrides(drawn, tmp_path), "cluster=slurm", "cluster.stages.prepare.array=4"]
    run.create(config.load("configs/demo.yaml", items))
    slurm.note(run, [slurm.Submitted("prepare", f"17_{n}", n, 4) for n in range(4)])
    run.finish_task("prepare", Task(0, 4))
    lines = [f"echo '17_{n}|PENDING||{slurm.job_name(run, 'prepare')}|None'" for n in queue]
    programs(tmp_path / "bin", monkeypatch, squeue="\n".join(lines), srun="", sbatch="echo Submitted batch job 18")
    console = Console(file=io.StringIO(), width=300)
    launches.launch(config.load("configs/demo.yaml", [*items, *keys]), console, until="prepare")
    said = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert said == f"{'prepare':<20} {told.replace('RUN', str(run.path))}"


@pytest.fixture
def left_running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job of a local launch that was killed."""
    process = subprocess.Popen(["sleep", "60"])
    write_json(tmp_path / "run/processes.json", [{"node": "encode", "pid": process.pid, "born": files.birth(process.pid)}])
    yield process
    process.kill()
    process.wait()


def test_a_launch_on_slurm_stops_what_a_local_one_left_running(drawn: Path, tmp_path: Path, left_running: subprocess.Popen[bytes],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    alive = f"grep -q sleep /proc/{left_running.pid}/cmdline && touch {tmp_path}/both"
    programs(tmp_path / "bin", monkeypatch, squeue="", srun="", sbatch=f"{alive}; echo Submitted batch job 7")
    told = Console(file=io.StringIO(), width=200)
    launches.launch(config.load("configs/demo.yaml", [*overrides(drawn, tmp_path), "cluster=slurm"]), told, until="prepare")
    assert f"stopping what an earlier launch left running: process {left_running.pid}" in told.file.getvalue()  # type: ignore[attr-defined]
    assert len(slurm.submitted(RunDir(tmp_path / "run"))) > 0
    assert not (tmp_path / "both").exists()


def test_what_a_killed_launch_left_running_is_cancelled(tmp_path: Path, left_running: subprocess.Popen[bytes]) -> None:
    run, told = RunDir(tmp_path / "run"), Console(file=io.StringIO(), width=200)
    run.create(config.load("configs/demo.yaml", [f"run={run.path}"]))
    launches.cancel(run, "finetune", told)
    assert left_running.poll() is None, "it does encode"
    launches.cancel(run, None, told)
    assert left_running.poll() is not None
    assert f"stopping what a launch that was killed left running: process {left_running.pid}" in told.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("refused", [True, False])
def test_why_a_stage_failed_is_told_until_it_is_submitted_again(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = ("grep -q prepare $1 || { echo full >&2; exit 1; }; " if refused else "") + "echo Submitted batch job 7"
    programs(tmp_path / "bin", monkeypatch, squeue="", scancel="", srun="", sbatch=sbatch)
    run = RunDir(tmp_path / "run")
    for node in ("prepare", "encode"):
        write_json(run.failed_path(node), {"node": node, "message": "no room"})
    cfg = config.load("configs/demo.yaml", [*overrides(drawn, tmp_path), "cluster=slurm"])
    with pytest.raises(UserError, match="encode could not be submitted; sbatch: full") if refused else contextlib.nullcontext():
        launches.launch(cfg, Console(quiet=True), until="encode")
    assert [run.failures(node) for node in ("prepare", "encode")] == [{0: "no room"} if refused else {}] * 2


def test_a_task_that_is_submitted_anew_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did its share once, what it made was deleted: where it is lost before it begins, the next launch must submit it again."""
    (tmp_path / "bin").mkdir()
    programs(tmp_path / "bin", monkeypatch, sbatch="echo Submitted batch job 7", srun="")
    run, cfg = RunDir(tmp_path / "run"), config.load("configs/demo.yaml", [f"run={tmp_path / 'run'}", "cluster=slurm"])
    run.create(cfg)
    for task in (0, 1, 2):
        Progress(run, "generate", task, 10, "images").set(10)
        run.finish_task("generate", Task(task, 3))
    assert run.unfinished("generate", 3) == []
    assert len(slurm.submit(cfg, run, "generate", [Task(1, 3), Task(2, 3)], [])) == 2
    assert run.unfinished("generate", 3) == [1, 2]
    assert files.read_json(run.progress_path("generate", 1))["done"] == 10, "what it told stays for the watcher"
    run.begin_anew("generate", 1)  # nothing is left to forget
    run.begin_anew("screen", 0)
    assert not run.progress_path("screen", 0).exists()


def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir(blocker / "run").create(Config())


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes.txt is a file: give the run's folder"):
        launches.launch(config.load("configs/demo.yaml", [f"run={tmp_path / 'notes.txt'}"]), Console(quiet=True))


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: config.yaml is missing"):
        RunDir(tmp_path).config()


def test_progress_is_a_file_that_a_watcher_reads(tmp_path: Path) -> None:
    from skinsynth.status import duration, progress_of

    run = RunDir(tmp_path)
    assert progress_of(run, "generate") is None
    for task in (0, 1):
        Progress(run, "generate", task, 10, "images").set(10 if task else 0)
    found = progress_of(run, "generate")
    assert found is not None
    assert (found["done"], found["total"], found["unit"]) == (10, 20, "images")
    assert [duration(s) for s in (None, 0.2, 95, 3725)] == ["-", "0:00", "1:35", "1:02:05"]
    Progress(run, "screen", 0, 10, "images", of=40).set(5)
    assert (progress_of(run, "screen") or {})["total"] == 40, "of three more tasks that have not begun"
    early = Progress(run, "screen", 1, 10, "images", of=40)
    early.set(7)
    early.end()
    assert (progress_of(run, "screen") or {})["total"] == 37, "of which one has ended three before its time"


def test_what_was_saved_inside_a_unit_counts_as_got_further_and_not_as_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that takes longer than the time limit is made in several turns, each of which saves some batches."""
    run, patience = RunDir(tmp_path), 2

    def turn(restart: int, saved: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        run.begin_task("generate", 0, patience)
        progress = Progress(run, "generate", 0, 1000, "images")
        progress.written = 0.0  # the networks were loaded meanwhile
        progress.go_on(saved)
        assert (progress.state["done"], progress.state["begun_at"]) == (saved, saved)

    for restart in range(8):
        turn(restart, 5 * restart)
    found = status.progress_of(run, "generate")
    assert found is not None
    assert (found["done"], found["rate"]) == (35, 0)
    for restart in range(8, 9 + patience):
        turn(restart, 35)
    with pytest.raises(UserError, match="without getting any further"):
        turn(9 + patience, 35)


@pytest.mark.parametrize("torn", ["", '{"done": 3, "to', "\0" * 40])
def test_torn_progress_is_none_and_stops_nobody(tmp_path: Path, torn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a power cut may leave what is not fsynced."""
    run = RunDir(tmp_path)
    for path in (run.progress_path("generate", 0), run.failed_path("generate", 1)):
        path.parent.mkdir(parents=True)
        path.write_text(torn)
    assert run.unfinished("generate", 2) == [0, 1]
    assert run.failures("generate") == {}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.begin_task("generate", 0, patience=3)
    run.finish_task("generate", Task(0, 2))
    assert run.unfinished("generate", 2) == [1]


def test_a_log_that_is_no_utf_8_can_be_read(tmp_path: Path) -> None:
    """Whatever a driver or another program's progress bar put there."""
    run = RunDir(tmp_path)
    run.create(config.load("configs/demo.yaml"))
    folder = run.node("finetune") / "submit"
    folder.mkdir(parents=True)
    (folder / "7_0_log.out").write_bytes(b"step 1\n\xff\xfe loss 0.3 \xc3\nstep 2\n")
    text = "".join(status.read_log(run, "finetune", None, False))
    assert text.startswith("step 1\n")
    assert " loss 0.3 " in text
    assert text.endswith("step 2\n")


def test_progress_of_more_tasks_than_there_are_now_does_not_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for task in range(8):
        Progress(run, "generate", task, 125, "images").set(125)
    for task in range(4):
        run.begin_task("generate", task, 3, of=4)
        Progress(run, "generate", task, 250, "images").set(250)
    found = status.progress_of(run, "generate")
    assert found is not None
    assert (found["done"], found["total"]) == (1000, 1000)


def test_a_task_that_tells_nothing_any_more_counts_for_no_speed(tmp_path: Path) -> None:
    from skinsynth.status import progress_of

    run = RunDir(tmp_path)
    for task, ago in ((0, 0.0), (1, 10_000.0)):
        now = time.time() - ago
        write_json(run.progress_path("generate", task), {"done": 60, "total": 100, "unit": "images", "begun_at": 0, "start": now - 60, "now": now})
    found = progress_of(run, "generate")
    assert found is not None
    assert found["rate"] == pytest.approx(1.0, rel=0.01)
    assert found["left"] == pytest.approx(80, rel=0.01)


def test_a_misspelt_path_is_told_at_once_and_not_kept(drawn: Path, tmp_path: Path) -> None:
    good = overrides(drawn, tmp_path)
    for wrong, said in (("data.metadata=nowhere.csv", "data.metadata: nowhere.csv does not exist"), ("data.images=nowhere", "is not a folder"),
                        ("data.duplicates=nowhere.csv", "data.duplicates: nowhere.csv does not exist"), ("data.synthetic=nowhere", "is not a folder"),
                        (f"data.instance_data_dir={tmp_path}", "not both")):
        with pytest.raises(UserError, match=said):
            launches.launch(config.load("configs/demo.yaml", [*good, "cluster=debug", wrong]), Console(quiet=True), until="prepare")
        assert not (tmp_path / "run/config.yaml").exists(), wrong
    launches.launch(config.load("configs/demo.yaml", [*good, "cluster=debug"]), Console(quiet=True), until="prepare")
    assert RunDir(tmp_path / "run").is_done("prepare")


def test_data_that_changed_since_they_were_prepared_stop_the_next_launch(drawn: Path, tmp_path: Path) -> None:
    """Although prepare is done; without its tables, as where a run was moved to, nobody can tell."""
    source = tmp_path / "source"
    shutil.copytree(drawn, source)
    late, *names = sorted(path.name for path in (source / "images").iterdir())
    (source / "images" / late).rename(tmp_path / late)
    for number, place in enumerate(("benign", "benign", "malignant", "malignant")):
        (source / "synthetic" / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / names[number], source / "synthetic" / place)
    cfg = config.load("configs/demo.yaml", [*overrides(source, tmp_path), "cluster=debug", f"data.synthetic={source / 'synthetic'}"])

    def said() -> str:
        console = Console(file=io.StringIO(), width=200)
        try:
            launches.launch(cfg, console, until="prepare")
        except UserError as error:
            return str(error)
        return console.file.getvalue()  # type: ignore[attr-defined]

    said()
    assert said() == f"prepare of {tmp_path / 'run'} is done already\n"
    (source / "images/more").mkdir()
    (tmp_path / late).rename(source / "images/more" / late)
    assert said().startswith(f"1 images that were missing when small was prepared are there now (first: {Path(late).stem}). They are not taken")
    removed = source / "synthetic/malignant" / names[3]
    removed.rename(tmp_path / names[3])
    assert f"1 of 4 images of data.synthetic are gone since it was prepared (first: {removed}). They are used all the same" in said()
    (tmp_path / names[3]).rename(removed)
    added = source / "synthetic/malignant" / names[4]
    shutil.copy(source / "images" / names[4], added)
    assert f"1 images of data.synthetic are new since it was prepared (first: {added}). They are not taken: for them, prepare in another" in said()
    added.unlink()
    for name in ("metadata", "duplicates"):
        table = source / f"{name}.csv"
        before = table.read_bytes()
        table.write_bytes(before + b"\n")
        assert re.search(rf"small-train was made from other data than there are now:\n  data.{name}: {table} has changed since \(its", said())
        table.write_bytes(before)
    source.rename(tmp_path / "elsewhere")
    assert said() == f"prepare of {tmp_path / 'run'} is done already\n"


def test_both_the_run_and_its_datasets_may_be_moved(drawn: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    launches.launch(config.load("configs/demo.yaml", [*overrides(drawn, old), "cluster=debug"]), Console(quiet=True), until="prepare")
    old.rename(new)
    cfg, run = config.load("configs/demo.yaml", overrides(drawn, new)), RunDir(new / "run")
    run.check(cfg)
    assert run.is_done("prepare")


def test_another_users_launch_is_not_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    run.create(config.load("configs/demo.yaml", [f"run={run.path}"]))

    def kill(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    with run.lock(), pytest.raises(UserError, match="is being launched by another user"):
        launches.cancel(run, None, Console(quiet=True))
