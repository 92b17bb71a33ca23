"""What a job says and leaves behind when something goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, overrides

from skinsynth import config, stages
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.run import RunDir, Task
from skinsynth.stages.generate import generate


def test_errors_are_explained() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "shards/x/.00003.tar.tmp")
    assert "no space left" in stages.explain(full)
    assert "shards/x/.00003.tar.tmp" in stages.explain(full)
    assert "start the same command again" in stages.explain(full)
    assert stages.explain(UserError("say this")) == "say this"
    assert stages.explain(PermissionError(errno.EACCES, "Permission denied", "a/b")) == "Permission denied: a/b"
    assert stages.explain(KeyError("k")) == "KeyError: 'k'"


def test_a_job_on_no_run_folder_says_so_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.encode", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "config.yaml is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a name that was misspelt has become a folder"


def test_a_wrong_task_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.generate", str(tmp_path), "--task", "3/3"], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 2
    assert "--task 3/3: expected INDEX/COUNT" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_in_mid_shard_leaves_nothing_half_done(chain: Path, drawn: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "tmpfs", str(small)], capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"data.shards": small}))
        run = RunDir(tmp_path / "run")
        run.create(cfg)
        shutil.copytree(chain / "run/finetune/weights", run.weights, copy_function=os.link)
        assert stages.run_node("generate", str(run.path)) == stages.FAILED
        message = read_json(run.failed_path("generate"))["message"]
        assert "no space left" in message
        assert "start the same command again" in message
        folder = small / "run-synthetic"
        assert not list(folder.glob(".*.tmp"))
        assert len(list(folder.glob("*.tar"))) == len(list(folder.glob("parts/*.json"))) < 3
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        generate(cfg, run, Task())
        assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == {
            p.name: p.read_bytes() for p in (chain / "shards/run-synthetic").glob("*.tar")}
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_what_nothing_needs_is_not_imported(optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    code = f"""
import sys
from pathlib import Path
from skinsynth import config, stages
from skinsynth.run import RunDir
cfg = config.load("configs/demo.yaml", ["finetune.optimizer={optimizer}", "finetune.zero=0"])
stages.before_torch(cfg, RunDir(Path("runs/x")), "finetune")
from diffusers import StableDiffusionPipeline
import peft
print(bool(sys.modules.get("bitsandbytes")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [str(optimizer == "adamw8bit")], done.stderr


def test_what_is_compiled_is_kept_in_the_run() -> None:
    """torch sets the folder by itself to one of the node, at an import that finds it unset."""
    code = """
import os
from pathlib import Path
from skinsynth import config, stages
from skinsynth.run import RunDir
stages.before_torch(config.load("configs/demo.yaml", ["model.compile=true"]), RunDir(Path("runs/x")), "generate")
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(os.path.relpath(cache_dir()))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["runs/x/compiled"], done.stderr
