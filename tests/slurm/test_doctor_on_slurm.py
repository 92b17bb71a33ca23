"""The doctor's job on a real Slurm."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, overrides, until

pytestmark = pytest.mark.slurm


def command(drawn: Path, folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "skinsynth", "doctor", "configs/demo.yaml", *overrides(drawn, folder), "cluster=devcluster", "--submit", *more]


def queue(env: dict[str, str]) -> str:
    return subprocess.run(["squeue", "--noheader", "--format=%i %T %j"], env=env, capture_output=True, text=True, timeout=30, check=True).stdout


def test_every_rank_of_two_nodes_is_well(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(drawn, tmp_path, "--wait", "120"), env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "all-reduce" in line]
    assert len(lines) == 1, "all ranks say the same"
    assert lines[0].startswith("ok    all-reduce         4 ranks, first rank 0 on node")
    assert "gloo over 4 ranks on 2 nodes, 16 MiB" in lines[0]
    for stage in ("prepare", "encode", "finetune", "generate", "screen", "classify", "report"):
        assert any(line.startswith(f"ok    {stage} ") and "sbatch would take it" in line for line in done.stdout.splitlines()), stage
    assert " is running on node" in done.stderr
    assert not (tmp_path / "run" / "doctor").exists(), "all is well, so nothing is left to look at"


def test_a_job_that_does_not_start_is_cancelled(slurm: dict[str, str], drawn: Path, tmp_path: Path) -> None:
    everything = ["sbatch", "--parsable", "--exclusive", "--nodes=4", "--time=3", "--job-name=holds-all-nodes", "--output=/dev/null"]
    held = subprocess.run([*everything, "--wrap", "sleep 120"], env=slurm, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    try:
        until("all nodes are held", lambda: f"{held} RUNNING" in queue(slurm))
        done = subprocess.run(command(drawn, tmp_path, "--wait", "6"), env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 1
        assert " is pending: " in done.stderr
        assert "did not finish within 6 s" in done.stdout
        assert "-doctor" not in queue(slurm)
        process = subprocess.Popen(command(drawn, tmp_path), env=slurm, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "is submitted" in line, line
        process.send_signal(signal.SIGTERM)  # as Ctrl-C, also where the tests run in the background
        assert process.wait(60) == 130
        process.stderr.close()
        assert process.stdout is not None
        process.stdout.close()
        until("the doctor's job is gone", lambda: "-doctor" not in queue(slurm), 20)
    finally:
        subprocess.run(["scancel", held], env=slurm, timeout=30, check=True)
