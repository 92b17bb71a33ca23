"""A launch on this machine that is stopped at awkward moments."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import overrides, until
from rich.console import Console

from skinsynth import config, local, stages
from skinsynth.chain import StageJob, chain
from skinsynth.errors import UserError
from skinsynth.files import birth, read_json
from skinsynth.knobs import Resources
from skinsynth.local import Local, stop_processes
from skinsynth.run import RunDir


@pytest.fixture
def launch(drawn: Path, tmp_path: Path) -> Local:
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path))
    run = RunDir(tmp_path / "run")
    run.create(cfg)
    return Local(cfg, run, chain(cfg), Console(quiet=True))


def interrupt(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The jobs that were submitted. Ctrl-C comes as soon as one is, to any thread: on a terminal the table has one of its own."""
    from submitit import LocalExecutor

    found, submit = [], LocalExecutor.submit

    def submit_and_press(self: Any, job: Any) -> Any:
        found.append(submit(self, job))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return found[-1]

    monkeypatch.setattr(LocalExecutor, "submit", submit_and_press)
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    yield found
    over.set()


def test_a_ctrl_c_while_a_job_is_started_stops_that_job(launch: Local, started: list[Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        launch.run_all()
    assert len(started) == 1
    assert birth(int(started[0].job_id)) is None
    assert not (launch.run.path / "processes.json").exists()


def test_a_second_ctrl_c_leaves_the_list_to_the_next_launch(launch: Local, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(local, "stop_processes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            launch.run_all()
    assert [job["pid"] for job in read_json(launch.run.path / "processes.json")] == [int(started[0].job_id)]
    stop_processes(launch.run, Console(quiet=True), "stopping")
    assert birth(int(started[0].job_id)) is None


def test_under_nohup_neither_the_launch_nor_its_jobs_heed_a_terminal_that_is_closed() -> None:
    code = """
import signal, subprocess
from skinsynth import signals
signals.listen()
with signals.undisturbed():
    print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
    subprocess.run(["sh", "-c", "kill -HUP $$; echo alive"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert done.stdout.split() == ["True", "alive"]


class Pressing(Console):
    """Ctrl-C comes as soon as anything is told."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if "stopping" in str(objects[0]):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_a_ctrl_c_that_comes_twice_stops_the_job_too(launch: Local, started: list[Any]) -> None:
    launch.console = Pressing(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        launch.run_all()
    pid = int(started[0].job_id)
    assert f"told to stop, but still running: process {pid}" in launch.console.file.getvalue()
    assert [job["pid"] for job in read_json(launch.run.path / "processes.json")] == [pid], "for the next launch"
    until("the job ends by itself", lambda: birth(pid) is None, local.GRACE)


def test_each_job_has_gpus_of_its_own_and_waits_for_them(launch: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    from submitit import LocalExecutor

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5ab3")
    launch.cfg.cluster.stages = {"prepare": Resources(array=3, gpus_per_node=1)}
    given: list[tuple[int, str]] = []
    submit = LocalExecutor.submit

    def note(self: Any, job: Any) -> Any:
        given.append((job.task, job.gpus))
        assert len(launch.held.keys() & {j.job_id for jobs in launch.jobs.values() for j in jobs if not j.done()}) < 2
        return submit(self, job)

    monkeypatch.setattr(LocalExecutor, "submit", note)
    Local.__post_init__(launch)
    launch.nodes = launch.nodes[:1]
    launch.run_all()
    assert launch.run.is_done("prepare")
    assert given[:2] == [(0, "4"), (1, "GPU-5ab3")]
    assert given[2] in [(2, "4"), (2, "GPU-5ab3")]


def test_the_minutes_of_a_stage_are_no_limit_here(launch: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit would stop a job that takes longer, and on this machine nobody would start it anew."""
    from submitit import LocalExecutor

    launch.cfg.cluster.stages = {"prepare": Resources(minutes=1)}
    submit, limits = LocalExecutor.submit, []

    def note(self: Any, job: Any) -> Any:
        begun = submit(self, job)
        limits.append(int(psutil.Process(int(begun.job_id)).environ()["SUBMITIT_LOCAL_TIMEOUT_S"]))
        return begun

    monkeypatch.setattr(LocalExecutor, "submit", note)
    launch.nodes = launch.nodes[:1]
    launch.run_all()
    assert launch.run.is_done("prepare")
    assert min(limits) > 365 * 24 * 3600


def test_more_gpus_than_there_are_is_told_at_once(launch: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.cfg.cluster.stages = {"finetune": Resources(gpus_per_node=4, tasks_per_node=4)}
    for shown, words in (("0,1", "shows 2"), ("", "shows none")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(UserError, match=rf"finetune asks for 4 GPUs, this machine {words}: set cluster.stages.finetune.gpus_per_node"):
            Local(launch.cfg, launch.run, launch.nodes, Console(quiet=True))


def test_a_job_sees_the_gpus_that_it_was_given(launch: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(stages, "run_node", lambda *_: stages.OK)
    StageJob("prepare", str(launch.run.path), gpus="2,3")()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    StageJob("prepare", str(launch.run.path))()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_the_gpus_of_the_machine_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert local.machine_gpus() == ["0", "1"]


@pytest.mark.parametrize(("shown", "found"), [("2,-1,3", ["2"]), ("-1", []), ("GPU-5ab3, 1", ["GPU-5ab3", "1"])])
def test_after_a_gpu_that_is_none_cuda_takes_none(shown: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert local.machine_gpus() == found


@pytest.mark.parametrize(("script", "words"), [("echo 'NVIDIA-SMI has failed, so.'\nexit 9", "fails: NVIDIA-SMI has failed"),
                                               ("exec sleep 60", "does not answer within 0.5 s")])
def test_an_nvidia_smi_that_lists_no_gpus_is_told(script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says when it fails stands where the list would."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "SMI_SILENT", 0.5)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=f"nvidia-smi {words}.*; so this machine's GPUs cannot be listed: mend its driver"):
        local.machine_gpus()
