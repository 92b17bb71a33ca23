"""A launch on this machine that is stopped at awkward moments."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import overrides
from rich.console import Console

from skinsynth import config, local
from skinsynth.chain import chain
from skinsynth.local import Local, stop_processes
from skinsynth.run import RunDir, birth, read_json


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
