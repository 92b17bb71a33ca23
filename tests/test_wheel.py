"""Installed from a wheel, away from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_a_wheel_has_the_clusters_and_the_scripts_of_jobs(tmp_path: Path) -> None:
    """Made of a copy, since setuptools leaves its folders where it builds."""
    source, site, away = (tmp_path / name for name in ("source", "site", "away"))
    away.mkdir()
    for name in ("skinsynth", "jobs", "slurm", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(away, "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source))
    wheel = next(tmp_path.glob("*.whl"))
    run(away, "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    shutil.copy(ROOT / "configs/demo.yaml", away)  # cluster: local, which is read before cluster=slurm is
    shown = run(away, "skinsynth", "launch", "demo.yaml", "cluster=slurm", "--dry-run", PYTHONPATH=str(site))
    for script in ("env.sh", "requeue.sh"):
        assert f"source {site}/skinsynth/scripts/{script}" in shown
    (site / "skinsynth/scripts/requeue.sh").unlink()
    assert "requeue.sh is not there" in run(away, "skinsynth", "launch", "demo.yaml", "cluster=slurm", "--dry-run", status=1, PYTHONPATH=str(site))


def run(where: Path, *arguments: str, status: int = 0, **env: str) -> str:
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=where, env={**keep, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
