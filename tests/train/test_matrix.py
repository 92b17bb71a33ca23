"""Every method at every ZeRO stage on two ranks: it saves, goes on with the same losses to the same weights, and plain diffusers loads the
export. A checkpoint of any of them goes on at any other stage, and on one rank."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, overrides
from gang import main as run_gang

from skinsynth import config
from skinsynth.models import tiny
from skinsynth.run import RunDir, Task
from skinsynth.train.log import read_lines
from skinsynth.world import World

METHODS = ("dreambooth", "text-to-image")
PARTS = {"unet": {}, "unet and text": {"train_text_encoder": True}, "lora": {"lora_rank": 4, "lr": 1e-3},
         "lora and text": {"lora_rank": 4, "lr": 1e-3, "train_text_encoder": True}}
MATRIX = [(method, part, zero) for method in METHODS for part in PARTS for zero in range(4)]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with random weights, of Stable Diffusion's kind, as small as may be; VAE, text encoder and tokenizer are the built-in ones."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("base") / "small"
    pipe = StableDiffusionPipeline.from_pretrained(tiny.WEIGHTS)
    torch.manual_seed(0)
    old = pipe.unet.config
    pipe.unet = UNet2DConditionModel(
        in_channels=old.in_channels, out_channels=old.out_channels, cross_attention_dim=old.cross_attention_dim, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=8)
    pipe.save_pretrained(folder)
    return folder


def name_of(method: str, part: str, zero: int) -> str:
    return f"{method}-{part}-{zero}".replace(" ", "-")


@pytest.fixture(scope="module")
def maker(drawn: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """``make(name, method, **finetune keys)`` -> a run folder where everything before fine-tuning is done."""
    from skinsynth.stages.encode import encode
    from skinsynth.stages.prepare import prepare

    folder = tmp_path_factory.mktemp("matrix")
    first = RunDir(folder / "first")
    first.create(config.load("configs/demo.yaml", overrides(drawn, folder, "first")))
    prepare(first.config(), first, Task())

    def make(name: str, method: str, **keys: object) -> RunDir:
        values = {"steps": 4, "checkpoint_every": 2, "log_every": 2, "global_batch": 4, "warmup_steps": 0, "method": method, **keys}
        more = {"model.base": small_base, "generate.steps": 2, **{f"finetune.{k}": v for k, v in values.items()}}
        cfg = config.load("configs/demo.yaml", [i for i in overrides(drawn, folder, name, **more) if not i.startswith("finetune.") or i.split(
            "=")[0].removeprefix("finetune.") in values])
        run = RunDir(folder / name)
        run.create(cfg)
        encoded = folder / f"encoded-{method}"
        if not encoded.exists():
            encode(cfg, run, Task())
            shutil.copytree(run.node("encode"), encoded)
            os.rename(run.dataset(cfg, "latents"), folder / f"latents-{method}")
        else:
            shutil.copytree(encoded, run.node("encode"))
        run.dataset(cfg, "latents").symlink_to(folder / f"latents-{method}")
        return run

    return make


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_two_ranks(runs: list[RunDir], folder: Path, seconds: float = 600) -> None:
    (folder / "list.json").write_text(json.dumps([str(run.path) for run in runs]))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    with open(folder / "gang.log", "wb") as log:
        ranks = [subprocess.Popen([sys.executable, str(Path(__file__).with_name("gang.py")), str(folder / "list.json")], cwd=ROOT, stdout=log,
                                  stderr=log, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    try:
        codes = [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (folder / "gang.log").read_text()[-4000:]


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in read_lines(run.node("finetune") / "metrics.jsonl")]


def from_checkpoint(other: RunDir, step: int, run: RunDir) -> RunDir:
    """``run`` as if it had been stopped at that step of ``other``."""
    node, theirs = run.node("finetune"), other.node("finetune")
    shutil.copytree(theirs / f"checkpoints/step-{step:08d}", node / f"checkpoints/step-{step:08d}", copy_function=os.link)
    lines = (theirs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (node / "metrics.jsonl").write_text("".join(lines[:step]))
    return run


@pytest.fixture(scope="module")
def matrix(maker, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Each of the matrix run through, and again from the checkpoint at half its way; ``{(method, part, zero): (whole, resumed)}``."""
    found, order = {}, []
    for method, part, zero in MATRIX:
        name, keys = name_of(method, part, zero), {**PARTS[part], "zero": zero, "ema_decay": 0.5 if part == "unet" else 0.0, "keep": 9}
        whole, resumed = (maker(f"{name}-{kind}", method, **keys) for kind in ("whole", "resumed"))
        found[method, part, zero] = whole, resumed
        order.append(whole)
    folder = tmp_path_factory.mktemp("gang")
    on_two_ranks(order, folder)
    on_two_ranks([from_checkpoint(whole, 2, resumed) for whole, resumed in found.values()], folder)
    return found


@pytest.mark.parametrize(("method", "part", "zero"), MATRIX, ids=[name_of(*m) for m in MATRIX])
def test_saves_resumes_and_exports(matrix, method: str, part: str, zero: int) -> None:  # type: ignore[no-untyped-def]
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    whole, resumed = matrix[method, part, zero]
    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)
    theirs, mine = (load_file(run.weights / "unet/diffusion_pytorch_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    pipe = StableDiffusionPipeline.from_pretrained(resumed.weights)
    base = StableDiffusionPipeline.from_pretrained(resumed.config().model.base)
    trained = ["unet", "text_encoder"] if "text" in part else ["unet"]
    for model in ("unet", "text_encoder", "vae"):
        before, after = getattr(base, model).state_dict(), getattr(pipe, model).state_dict()
        assert any(not torch.equal(before[n], after[n]) for n in before) == (model in trained), model
    if "lora" in part:
        apart = base.unet.state_dict()
        base.load_lora_weights(resumed.weights / "lora")
        base.fuse_lora()
        base.unload_lora_weights()
        merged = base.unet.state_dict()
        assert merged.keys() == apart.keys()
        assert all(torch.allclose(merged[n], after, atol=1e-6) for n, after in pipe.unet.state_dict().items())


def test_the_stages_and_one_rank_agree(matrix, maker) -> None:  # type: ignore[no-untyped-def]
    """The same losses at every ZeRO stage, and on one rank."""
    for part in PARTS:
        runs = [matrix["dreambooth", part, zero][0] for zero in range(4)]
        for run in runs[1:]:
            assert losses(run) == pytest.approx(losses(runs[0]), abs=1e-4)
    alone = maker("alone", "dreambooth", ema_decay=0.5)
    run_gang([str(alone.path)], World())
    assert losses(alone) == pytest.approx(losses(matrix["dreambooth", "unet", 2][0]), abs=1e-4)


def test_elastic(maker, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Twenty losses after a change of ranks and stage are those without it: 2 ranks -> 1, 1 -> 2, and from each stage to another."""
    keys = {"steps": 23, "checkpoint_every": 3, "keep": 99, "ema_decay": 0.9, "schedule": "cosine"}
    alone = maker("elastic-alone", "dreambooth", **keys)
    run_gang([str(alone.path)], World())
    whole = {zero: maker(f"elastic-{zero}", "dreambooth", zero=zero, **keys) for zero in range(4)}
    back = from_checkpoint(alone, 3, maker("elastic-1-to-2", "dreambooth", zero=3, **keys))
    on_two_ranks([*whole.values(), back], tmp_path)
    turned = {(a, b): from_checkpoint(whole[a], 3, maker(f"elastic-{a}-to-{b}", "dreambooth", zero=b, **keys))
              for a, b in ((0, 1), (1, 3), (3, 2), (2, 0))}
    on_two_ranks(list(turned.values()), tmp_path)
    shrunk = [from_checkpoint(whole[a], 3, maker(f"elastic-{a}-to-alone", "dreambooth", **keys)) for a in (2, 3)]
    run_gang([str(run.path) for run in shrunk], World())
    expected = losses(alone)
    assert len(expected) == 23
    for run in (*whole.values(), back, *turned.values(), *shrunk):
        assert losses(run)[3:] == pytest.approx(expected[3:], abs=1e-4), run.path.name
