"""Fine-tuning on real ranks: checkpoints, resume, the same losses on one and two ranks, an export that diffusers loads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, overrides, until
from rich.console import Console

from skinsynth import config, knobs
from skinsynth import launch as launches
from skinsynth.data import descent
from skinsynth.data.codec import from_npy
from skinsynth.data.dataset import Dataset
from skinsynth.doctor import check
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Model
from skinsynth.models import diffusion, hub, tiny
from skinsynth.run import RunDir
from skinsynth.stages.finetune import _descent, finetune
from skinsynth.train.engine import micro_batch
from skinsynth.train.log import read_lines
from skinsynth.train.optimizer import learning_rate
from skinsynth.withdraw import withdraw
from skinsynth.world import World


def begin(chain: Path, drawn: Path, folder: Path, **more: object) -> RunDir:
    """A run folder where everything before fine-tuning is done, by hard links to the shared chain."""
    folder.mkdir()
    run = RunDir(folder / "run")
    shutil.copytree(chain / "shards", folder / "shards", copy_function=os.link)
    cfg = config.load("configs/demo.yaml", overrides(drawn, folder, **more))
    run.create(cfg)
    shutil.copytree(chain / "run" / "encode", run.node("encode"), copy_function=os.link)
    return run


def start(run: RunDir, ranks: int) -> list[subprocess.Popen[bytes]]:
    """``python -m jobs.finetune`` as torchrun would start it."""
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with open(run.path / "finetune.log", "ab") as log:
        return [subprocess.Popen([sys.executable, "-m", "jobs.finetune", str(run.path)], cwd=ROOT, stdout=log, stderr=log,
                                 env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]


def finish(run: RunDir, ranks: int) -> None:
    codes = [p.wait(150) for p in start(run, ranks)]
    assert codes == [0] * ranks, (run.path / "finetune.log").read_text()[-3000:]


def losses(run: RunDir | Path) -> list[float]:
    path = run.node("finetune") if isinstance(run, RunDir) else run / "finetune"
    return [row["loss"] for row in read_lines(path / "metrics.jsonl")]


@pytest.mark.timeout(600)
def test_killed_and_stopped_gangs_go_on_with_the_same_losses(chain: Path, drawn: Path, tmp_path: Path) -> None:
    run = begin(chain, drawn, tmp_path / "a")
    gang = start(run, 2)
    until("the first checkpoint", (run.node("finetune") / "checkpoints/step-00000004/complete.json").exists)
    gang[1].kill()  # one rank dies without a word: the other must not hang
    assert gang[0].wait(60) != 0
    torn = run.node("finetune") / "checkpoints/step-00000006"
    torn.mkdir()
    (torn / "model.pt").write_bytes(b"half")  # as a writer that died between its files would leave it, were it not for the rename
    gang = start(run, 2)
    until("the resume", lambda: len(losses(run)) >= 4 and b"is passed over" in (run.path / "finetune.log").read_bytes())
    gang[1].send_signal(signal.SIGTERM)  # to any rank: both save at one step and leave
    assert {p.wait(60) for p in gang} <= {75, 0}
    finish(run, 2)
    assert "complete.json is missing" in (run.path / "finetune.log").read_text()
    assert losses(run) == losses(chain / "run")
    assert diffusion.weights_sha256(run.weights) == diffusion.weights_sha256(chain / "run/finetune/weights")


def test_export_loads_with_plain_diffusers_and_was_trained(chain: Path) -> None:
    from diffusers import StableDiffusionPipeline

    weights = chain / "run/finetune/weights"
    tuned = StableDiffusionPipeline.from_pretrained(weights)
    base = StableDiffusionPipeline.from_pretrained(hub.find_base(Model()).weights)
    assert tuned("a dermoscopy image", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    moved = [not torch.equal(a, b.float()) for a, b in zip(tuned.unet.state_dict().values(), base.unet.state_dict().values(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(a, b.float()) for a, b in zip(tuned.vae.state_dict().values(), base.vae.state_dict().values(), strict=True))


def test_lineage_names_the_groups_that_were_trained_on(chain: Path) -> None:
    lineage = read_json(chain / "run/finetune/weights/lineage.json")
    train = Dataset.open(chain / "shards/small-train")
    assert set(lineage["group_ids"]) <= set(train.columns["group"])
    assert len(lineage["group_ids"]) > 5
    plan, known = read_json(chain / "shards/small-train/plan.json")["samples"], lineage["trained_on"]
    assert known["groups"] == lineage["group_ids"]
    assert set(known["images"]) <= set(train.keys)
    for kind, field in (("groups", "group"), ("patients", "patient_id"), ("lesions", "lesion_id")):
        assert set(known[kind]) == {plan[key][field] for key in known["images"]} - {None}, kind
    assert known["patients"]
    assert lineage["weights_sha256"] == diffusion.weights_sha256(chain / "run/finetune/weights")


@pytest.mark.parametrize("published", [False, True])
def test_of_a_base_of_unknown_descent_the_weights_are_so_too(chain: Path, drawn: Path, tmp_path: Path, published: bool) -> None:
    """What is known of them is compared all the same."""
    base = tmp_path / "published"
    shutil.copytree(hub.find_base(Model()).weights, base)
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **({"model.base": base} if published else {})))
    train = Dataset.open(chain / "shards/small-train")
    lineage = _descent(cfg, descent.names(train, range(4)))
    assert lineage["group_ids"] == (None if published else sorted(set(train.columns["group"][:4])))
    assert descent.seen(train, lineage).keys() == set(train.columns["group"][:4])
    count = len(set(train.columns["group"][:4]))
    assert descent.told(lineage) == (f"at least {count}" if published else str(count))


def test_latent_cache_holds_what_the_vae_gives(chain: Path) -> None:
    latents, train = Dataset.open(chain / "shards/run-latents"), Dataset.open(chain / "shards/small-train")
    vae = diffusion.load_pipeline(hub.find_base(Model()).weights).vae
    image = train.image(train.keys.index(latents.keys[3]))
    cached = from_npy(latents.read(3, "moments.npy"))
    for variant, pixels in ((0, image), (1, image[:, ::-1].copy())):
        assert cached[variant] == pytest.approx(diffusion.encode_images(vae, pixels[None])[0], abs=1e-4)


@pytest.mark.parametrize(("missing", "said"), [
    ("unet/diffusion_pytorch_model.safetensors", "unet/*.safetensors"), ("vae/config.json", "vae/config.json"),
    ("model_index.json", "model_index.json"), ("tokenizer/tokenizer_config.json", "tokenizer")])
def test_a_base_model_with_a_file_missing(tmp_path: Path, missing: str, said: str) -> None:
    shutil.copytree(hub.find_base(Model()).weights, tmp_path / "base")
    (tmp_path / "base" / missing).unlink()
    with pytest.raises(UserError) as caught:
        hub.find_base(Model(base=str(tmp_path / "base")))
    assert "not complete" in str(caught.value)
    assert said in str(caught.value)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        hub.find_base(Model(base=str(tmp_path / "none")))
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        hub.find_base(Model(base="nobody/nothing"))


def test_an_image_size_that_the_base_cannot_take() -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        diffusion.latent_shape(diffusion.load_pipeline(hub.find_base(Model()).weights), 72)


def test_it_is_told_before_anything_is_begun(drawn: Path, tmp_path: Path) -> None:
    items = overrides(drawn, tmp_path, **{"prepare.size": 72})
    cfg = config.load("configs/demo.yaml", items)
    with pytest.raises(UserError, match=r"prepare\.size=72 does not fit the base model: it must be a multiple of 16"):
        launches.launch(cfg, Console(quiet=True))
    assert not (tmp_path / "run").exists()
    [told] = check.size(cfg)
    assert (told.state, told.name) == ("fail", "prepare.size")
    assert list(check.size(config.load("configs/demo.yaml", [*items, "model.base=nobody/nothing"]))) == [], "which is told as such"
    assert list(check.size(config.load("configs/demo.yaml", [*items, f"data.synthetic={tmp_path}"]))) == [], "nothing is drawn then"


def test_ranks_that_do_not_divide_the_global_batch() -> None:
    with pytest.raises(UserError, match=r"3 ranks; \[1, 2, 4, 8\] ranks can"):
        micro_batch(knobs.Finetune(global_batch=8), World(0, 3), "finetune")


def test_learning_rate_schedules() -> None:
    cfg = knobs.Finetune(steps=110, warmup_steps=10, lr=1.0, schedule="linear")
    assert [learning_rate(cfg, s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    cfg.schedule = "cosine"
    assert [learning_rate(cfg, s) for s in (10, 60, 109)] == pytest.approx([1.0, 0.5, 0.000247], abs=1e-5)
    cfg.schedule = "constant"
    assert learning_rate(cfg, 109) == 1.0


def test_min_snr_weights_follow_the_paper() -> None:
    from diffusers import DDPMScheduler

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, batch: object) -> torch.Tensor:
            return torch.zeros_like(x)

    scheduler, t = DDPMScheduler(), torch.tensor([10, 900])
    batch = {"latents": torch.randn(2, 4, 4, 4), "noise": torch.ones(2, 4, 4, 4), "timestep": t, "text": torch.zeros(2, 1, 1),
             "weight": torch.ones(2)}
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    expected = (snr.clamp(max=5) / snr).mean().item()  # the error itself is one everywhere
    assert diffusion.diffusion_loss(Zero(), scheduler, batch, 5.0).item() == pytest.approx(expected, rel=1e-5)
    assert diffusion.diffusion_loss(Zero(), scheduler, batch, None).item() == pytest.approx(1.0)
    assert snr[1] < 0.1 < 5 < snr[0]
    expected = (5 / snr[0] + 10).item() / 2
    assert diffusion.diffusion_loss(Zero(), scheduler, batch, 5.0, 1.0).item() == pytest.approx(expected, rel=1e-5)
    whole = DDPMScheduler(rescale_betas_zero_snr=True)
    batch["timestep"] = torch.tensor([999, 999])  # pure noise, of which the least a weight can be is the limit before it
    assert diffusion.diffusion_loss(Zero(), whole, batch, 5.0).item() == pytest.approx(1.0)


def test_a_vae_takes_a_batch_of_large_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs of a device's memory is bounded, and the parts follow from the size of the images alone."""
    assert [diffusion.at_once(side, side) for side in (64, 512, 1024)] == [512, 8, 2]
    vae = diffusion.load_vae(Model(base="builtin"))
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    whole = diffusion.encode_images(vae, images)
    monkeypatch.setattr(diffusion, "at_once", lambda height, width: 2)
    seen: list[int] = []
    vae.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    assert np.allclose(diffusion.encode_images(vae, images), whole, atol=1e-5)
    assert seen == [2, 2, 1]


def test_a_vae_that_overflows_in_half_precision_decodes_in_single() -> None:
    """Image-to-image pipelines bring SDXL's back to the half after each use."""
    vae = diffusion.load_vae(Model(base="builtin")).half()
    vae.register_to_config(force_upcast=True)
    diffusion.decode_latents(vae, torch.zeros(1, vae.config.latent_channels, 8, 8, dtype=torch.float16))
    assert vae.dtype == torch.float32


def test_a_base_that_descends_from_somebody_who_withdrew_is_not_trained_on(drawn: Path, tmp_path: Path) -> None:
    """Hours of training would end in weights that nobody may use."""
    shutil.copytree(tiny.WEIGHTS, tmp_path / "base")
    write_json(tmp_path / "base/lineage.json", {"group_ids": ["IP_1"], "trained_on": {"groups": ["IP_1"], "images": ["a"], "patients": ["IP_1"]}})
    cfg = config.load("configs/demo.yaml", overrides(drawn, tmp_path, **{"model.base": tmp_path / "base"}))
    withdraw("IP_1", [], Path(cfg.data.shards))
    with pytest.raises(UserError, match="base is withdrawn: it was trained on IP_1"):
        finetune(cfg, RunDir(tmp_path / "run"), World())
