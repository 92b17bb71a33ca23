"""slurm/devcluster itself: what the other tests in this folder stand on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DEVCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "devcluster"
pytestmark = pytest.mark.slurm

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(slurm: dict[str, str]) -> Run:
    """Runs a command against the devcluster; skips on a site's own Slurm, which these tests are not about."""
    if "SKINSYNTH_DEVCLUSTER" not in slurm:
        pytest.skip("this is a site's own Slurm, not slurm/devcluster")

    def call(*argv: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(part) for part in argv], env=slurm, capture_output=True, text=True, timeout=60, check=False)

    return call


def wait_for(text: str, run: Run, *argv: str) -> str:
    """What the command prints as soon as `text` is in it, or at the end of the time."""
    end = time.monotonic() + 60
    while text not in (printed := run(*argv).stdout) and time.monotonic() < end:
        time.sleep(0.2)
    return printed


def test_status_says_that_all_is_up(run: Run) -> None:
    status = run(DEVCLUSTER, "status")
    assert status.returncode == 0, status.stdout
    assert status.stdout.count("alive") == 8
    assert "dead" not in status.stdout
    for partition in ("main*", "short", "scavenge"):
        assert partition in status.stdout


def test_a_second_up_changes_nothing(run: Run) -> None:
    before = run(DEVCLUSTER, "status").stdout
    again = run(DEVCLUSTER, "up")
    assert again.returncode == 0
    assert "already" in again.stdout
    assert run(DEVCLUSTER, "status").stdout == before


def test_up_starts_what_died(run: Run, slurm: dict[str, str]) -> None:
    run("kill", "-9", (Path(slurm["SKINSYNTH_DEVCLUSTER"]) / "run" / "slurmctld.pid").read_text().split()[0])
    assert wait_for("dead", run, str(DEVCLUSTER), "status").count("dead") == 1
    again = run(DEVCLUSTER, "up")
    assert again.returncode == 0, again.stderr
    assert "slurmctld" in again.stdout
    assert run(DEVCLUSTER, "status").returncode == 0


def test_env_names_this_cluster(run: Run, slurm: dict[str, str]) -> None:
    printed = run("sh", "-ec", f'eval "$({DEVCLUSTER} env)"; echo $SLURM_CONF $MASTER_ADDR; sinfo -h -p main -o %D')
    assert printed.stdout.split() == [f"{slurm['SKINSYNTH_DEVCLUSTER']}/slurm.conf", "127.0.0.1", "4"]


def test_a_job_sees_its_gpus_and_is_accounted_for(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "echo on $SLURMD_NODENAME gpus $CUDA_VISIBLE_DEVICES"
    job = run("sbatch", "--parsable", "--gres=gpu:2", f"--output={out}", "--wrap", script).stdout.strip()
    # the controller tells the data base of new jobs every 5 s
    assert "COMPLETED" in wait_for("COMPLETED", run, "sacct", "-X", "-n", "-j", job, "-o", "state")
    assert out.read_text().startswith("on node")
    assert out.read_text().endswith("gpus 0,1\n")


@pytest.mark.parametrize(("option", "complaint"), [("--account=nobody", "Invalid account"), ("--time=20", "time limit")])
def test_what_cannot_run_is_refused_at_once(run: Run, option: str, complaint: str) -> None:
    refused = run("sbatch", "--partition=short", option, "--output=/dev/null", "--wrap", "true")
    assert refused.returncode != 0
    assert complaint in refused.stderr


def test_a_crashed_node_loses_its_job_and_comes_back(run: Run) -> None:
    job = run("sbatch", "--parsable", "--requeue", "--nodelist=node3", "--output=/dev/null", "--wrap", "sleep 60").stdout.strip()
    assert "RUNNING" in wait_for("RUNNING", run, "squeue", "-h", "-j", job, "-o", "%T")
    assert run(DEVCLUSTER, "node-kill", "node3").returncode == 0
    status = run(DEVCLUSTER, "status")
    assert status.returncode == 1
    assert status.stdout.count("dead") == 1
    assert run(DEVCLUSTER, "node-start", "node3").returncode == 0
    assert "PENDING" in wait_for("PENDING", run, "squeue", "-h", "-j", job, "-o", "%T")
    run("scancel", job)
    # sinfo may show the lost job's processors as taken for a while after: a new job is the better witness
    assert run("srun", "--nodelist=node3", "printenv", "SLURMD_NODENAME").stdout == "node3\n"
    assert run(DEVCLUSTER, "status").returncode == 0


def test_an_unknown_node_is_a_sentence(run: Run) -> None:
    answer = run(DEVCLUSTER, "node-kill", "node9")
    assert answer.returncode == 1
    assert answer.stderr == "devcluster: there is no node node9: the nodes are node1, node2, node3, node4\n"


def test_a_folder_that_is_not_ours_is_left_alone(run: Run, slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    for command in (["up"], ["down", "--wipe"]):
        answer = run("env", f"SKINSYNTH_DEVCLUSTER={tmp_path}", DEVCLUSTER, *command)
        assert "Traceback" not in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
