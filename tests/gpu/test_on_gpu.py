"""The chain on a GPU, where there is one (``pytest -m gpu``). All other tests run on CPUs everywhere, so that they give the same on every machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, overrides, until
from safetensors.numpy import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def start(gpu: dict[str, str], images: Path, folder: Path, **more: object) -> subprocess.Popen[str]:
    """The whole small chain in one process, which has the GPU."""
    command = [sys.executable, "-m", "skinsynth", "launch", "configs/demo.yaml", "cluster=debug", *overrides(images, folder, **more)]
    return subprocess.Popen(command, cwd=ROOT, env=gpu, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def rows(folder: Path, node: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / node / "metrics.jsonl").read_text().splitlines()]


def test_float32_is_nearly_what_cpus_make(gpu: dict[str, str], chain: Path, drawn: Path, tmp_path: Path) -> None:
    """Same samples, noise and augmentation; cuDNN's convolutions are TF32."""
    finish(start(gpu, drawn, tmp_path))
    for node in ("finetune", "classify/baseline/seed-0"):
        mine, theirs = ([row["loss"] for row in rows(folder, node)] for folder in (tmp_path, chain))
        assert mine == pytest.approx(theirs, rel=0.05), node
    assert rows(tmp_path, "finetune")[-1]["peak_memory_gb"] < 20
    mine, theirs = (load_file(folder / "run/encode/prompts.safetensors") for folder in (tmp_path, chain))
    assert all(np.allclose(mine[name], theirs[name], atol=1e-2) for name in theirs)
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    assert report["unfinished"] == {}
    assert report["synthetic"]["generated"] == 27


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_it_goes_on_after_a_stop(gpu: dict[str, str], drawn: Path, tmp_path: Path, precision: str) -> None:
    more = {f"{section}.precision": precision for section in ("finetune", "generate", "classify")} | {"finetune.steps": 60, "finetune.lora_rank": 4}
    process = start(gpu, drawn, tmp_path, **more)
    until("a checkpoint", lambda: list(tmp_path.glob("run/finetune/checkpoints/step-*")), process=process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    finish(start(gpu, drawn, tmp_path, **more))
    losses = [row["loss"] for row in rows(tmp_path, "finetune")]
    assert len(losses) == 60
    assert np.isfinite(losses).all()
    assert json.loads((tmp_path / "run/report/report.json").read_text())["unfinished"] == {}


XFORMERS = """
import torch
from skinsynth.knobs import Model
from skinsynth.models import attention, diffusion

cuda = torch.device("cuda")
unet = diffusion.load_base(Model(), "fp16").unet.to(cuda)
torch.manual_seed(0)
asked = (torch.randn(2, 4, 16, 16, device=cuda).half(), torch.tensor([5, 900], device=cuda), torch.randn(2, 77, 128, device=cuda).half())
plain = unet(*asked).sample
attention.apply(unet, attention.choose("auto", cuda))
assert torch.allclose(unet(*asked).sample, plain, atol=1e-2)
"""


def test_a_unet_draws_the_same_with_what_auto_takes(gpu: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", XFORMERS], cwd=ROOT, env=gpu, text=True, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_suite_itself_sees_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
