"""The harness of the benchmarks: one side that fails costs neither the others nor an hour of waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import harness


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "failed", [])
    monkeypatch.setattr(harness, "RESULTS", tmp_path)


def side(fails: str, barrier: Barrier) -> None:
    if fails == "early":
        raise SystemExit(1)
    barrier.wait()
    if fails == "late":
        raise SystemExit(1)
    barrier.wait()


@pytest.mark.parametrize("fails", ["early", "late"])
@pytest.mark.timeout(60)
def test_who_runs_beside_one_that_fails_does_not_wait_for_it(fails: str) -> None:
    with pytest.raises(RuntimeError, match=r"test_benchmarks\.side failed"):
        harness.together(side, [("no",), (fails,)])
    assert harness.together(side, [("no",), ("no",)]) >= 0


def test_a_side_that_fails_is_left_out_and_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def broken() -> float:
        raise subprocess.CalledProcessError(1, "side")

    turns = iter((4.0, 8.0, 6.0))
    rounds = harness.alternate({"ours": lambda: next(turns), "compiled": broken, "peer": lambda: 2.0}, 3)
    assert rounds == {"ours": [4.0, 8.0, 6.0], "peer": [2.0, 2.0, 2.0]}
    assert len(harness.failed) == 1
    assert "compiled" in capsys.readouterr().err
    harness.report("one", rounds, "ours", "peer", "images/s", "of nothing")
    assert json.loads((tmp_path / "one-cpu.json").read_text())["ratio"] == 3
    with pytest.raises(RuntimeError, match="two: no result, since compiled failed"):
        harness.report("two", rounds, "ours", "compiled", "images/s", "of nothing")


def test_where_time_is_short_each_side_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROUNDS", 1)
    assert harness.alternate({"ours": lambda: 1.0, "peer": lambda: 2.0}, 5) == {"ours": [1.0], "peer": [2.0]}
