"""Loading in a process of its own, as on a GPU: the same batches and errors as from threads, and nobody is left behind or waited for without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, until

from skinsynth.data.dataset import BadSample
from skinsynth.data.loader import LoaderProcess, _sendable
from skinsynth.data.stream import Feed
from skinsynth.errors import UserError
from skinsynth.train import loop

TODO = [(step, [range(8 * step, 8 * step + 4), range(8 * step + 4, 8 * step + 8)]) for step in range(9)]


class Pictures:
    """Position p's picture is full of p; ``at`` tells what happens at a position."""

    workers = 2

    def __init__(self, **at: Any):
        self.at, self.bad = {int(name[1:]): what for name, what in at.items()}, list[BadSample]()

    def batch(self, positions: range) -> dict[str, torch.Tensor]:
        for position in positions:
            found = self.at.get(position)
            if isinstance(found, BadSample):
                self.bad.append(found)
            elif found:
                found()
        pictures = np.stack([np.full((5, 5, 3), p, np.uint8) for p in positions])
        return {"images": torch.from_numpy(pictures).permute(0, 3, 1, 2), "target": torch.tensor([p / 3 for p in positions]),
                "label": torch.tensor(list(positions))}


def pid_of(reader: LoaderProcess) -> int:
    return int(reader._process.pid or 0)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_it_gives_what_threads_give(ahead: int) -> None:
    with Feed(Pictures().batch, TODO) as feed:
        expected = list(feed)
    with LoaderProcess(Pictures(), iter(TODO), ahead) as reader:
        found = list(reader)  # each is a copy: the slots were filled anew meanwhile
        assert reader.waited > 0
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.keys() == other.keys()
            for name, values in one.items():
                assert torch.equal(values, other[name]), name
                assert (values.dtype, values.stride()) == (other[name].dtype, other[name].stride()), name
    assert not alive(pid_of(reader))


@pytest.mark.parametrize(("error", "kind"), [(BadSample("set", "00000.tar", "k", "is damaged"), BadSample), (UserError("no space"), UserError),
                                             (ValueError("what"), ValueError)])
def test_an_error_rises_at_its_own_step_as_what_it_was(error: Exception, kind: type[Exception]) -> None:
    def fail() -> None:
        raise error

    with LoaderProcess(Pictures(p42=fail), TODO) as reader:
        given = iter(reader)
        assert [next(given)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(kind) as caught:
            next(given)
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)


def test_an_error_that_does_not_travel_is_told_in_words() -> None:
    class Own(Exception):
        def __init__(self, one: int, other: int):
            super().__init__(f"{one} and {other}")

    assert str(_sendable(Own(1, 2))) == "Own: 1 and 2"
    assert str(_sendable(BadSample("set", "tar", "k", "is damaged"))) == str(BadSample("set", "tar", "k", "is damaged"))


def test_bad_samples_are_told_with_the_batch_that_met_them() -> None:
    one, other = BadSample("set", "a.tar", "k1", "is damaged"), BadSample("set", "b.tar", "k2", "is damaged")
    data = Pictures(p3=one, p60=other)
    with LoaderProcess(data, TODO, ahead=1) as reader:
        given = iter(reader)
        next(given)
        assert [bad.key for bad in reader.bad] == ["k1"]
        assert len(list(given)) == 8
        assert [bad.key for bad in reader.bad] == ["k1", "k2"]
    assert data.bad == [], "the process has a copy"


def test_a_process_that_is_killed_is_missed() -> None:
    with LoaderProcess(Pictures(p40=lambda: time.sleep(60)), TODO, ahead=1) as reader:
        given = iter(reader)
        next(given)
        os.kill(pid_of(reader), signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"the process that loads the data has ended \(killed by signal 9"):
            list(given)


def test_signals_to_the_whole_job_are_the_ranks_affair() -> None:
    with LoaderProcess(Pictures(p0=lambda: time.sleep(0.5)), TODO) as reader:
        time.sleep(0.2)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(pid_of(reader), number)
        assert len(list(reader)) == 9


def test_leaving_early_does_not_wait_for_a_read_that_hangs() -> None:
    since = time.monotonic()
    with LoaderProcess(Pictures(p16=lambda: time.sleep(100)), TODO) as reader:
        next(iter(reader))
    assert time.monotonic() - since < 30
    assert not alive(pid_of(reader))


ORPHAN = """
import sys, time
sys.path.insert(0, "tests")
from test_loader import LoaderProcess, Pictures, TODO, pid_of
reader = LoaderProcess(Pictures(p40=lambda: time.sleep(100)), TODO)
next(iter(reader))
print(pid_of(reader), flush=True)
time.sleep(100)
"""


def test_of_a_rank_that_is_killed_it_does_not_stay() -> None:
    """Its connections to the other ranks would stay open with it, and none of them would notice."""
    with subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout
        pid = int(rank.stdout.readline())
        assert alive(pid)
        rank.kill()
    until("its end", lambda: not alive(pid), 20)


WITH_THREADS = """
import sys
sys.path.insert(0, "tests")
import cv2, numpy as np
from test_loader import LoaderProcess, Pictures, TODO
cv2.setNumThreads(4)
cv2.GaussianBlur(np.zeros((4000, 4000, 3), np.uint8), (31, 31), 5)
with LoaderProcess(Pictures(), TODO) as reader:
    assert len(list(reader)) == 9
"""


def test_where_opencv_has_had_threads_it_does_not_wait_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", WITH_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_without_closing_it_does_not_hang() -> None:
    script = ORPHAN.replace("print(", "assert reader is not None and ").replace(", flush=True)", "").replace("\ntime.sleep(100)\n", "\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_training_reads_the_same_from_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient accumulation, a stop, and a sample that is skipped."""
    sys.path.insert(0, str(Path(__file__).parent / "train"))
    from test_loop import Numbers, go, losses, square

    plain, _ = go(tmp_path / "plain", micro_batch=2)
    made: list[LoaderProcess] = []

    def apart(data: Any, todo: Any, gpu: bool) -> LoaderProcess:
        made.append(LoaderProcess(data, todo))
        return made[-1]

    monkeypatch.setattr(loop, "reader", apart)
    bad = BadSample("set", "00000.tar", "k", "is damaged")

    def batch(self: Numbers, positions: range) -> dict[str, torch.Tensor]:
        if 20 in positions:
            self.bad = [bad]
        return Numbers.batch(self, positions)

    skipping = type("Skipping", (Numbers,), {"batch": batch})
    monkeypatch.setattr("test_loop.Numbers", skipping)
    run, state = go(tmp_path / "apart", square, micro_batch=2)
    assert losses(run) == losses(plain)
    assert state["bad_samples"] == 1
    assert "00000.tar" in (run.node("it") / "bad-samples.csv").read_text()
    assert not any(alive(pid_of(reader)) for reader in made)
