"""A fine-tuning step beside the one of diffusers' example scripts: the built-in model on a CPU; where there is a GPU, Stable Diffusion 1.5's size.

The peer is the loop of ``train_text_to_image.py`` written against diffusers' public API: VAE and text encoder run in every step, the
images come from a folder through PIL (in the main process on a CPU, which is the script's default), and the loss is read after every step.
Both sides train the whole UNet with AdamW, with the same batch, precision and attention, in one process that has the GPU, or all cores.
On a CPU it is measured with real images of 256 px, and with drawn ones: as small as the demo's, and as large as cameras make them. Large ones
cost the peer time in every step, and us none: ``prepare`` and ``encode`` were there before, which is not counted.
``python -m benchmarks.finetune SIDE [SETTING]`` is one measurement.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import REAL, SCRATCH, alternate, gpu, in_process, medians, report


@dataclass(frozen=True)
class Setting:
    """``size``: width and height of the images in the folder, ``side`` of those that the model sees, in pixels; ``window``: steps that are timed
    together; ``workers`` of the peer's loader; ``real``: images of ISIC 2017 where they are, instead of drawn ones; ``lora``: its rank, 0
    for the whole UNet."""

    folder: Path
    model: str
    images: int
    size: tuple[int, int]
    side: int
    batch: int
    steps: int
    window: int
    precision: str
    workers: int
    rounds: int = 5
    real: bool = False
    lora: int = 0

    @property
    def tables(self) -> Path:
        """Where the metadata are."""
        return self.folder / "images"

    @property
    def files(self) -> list[Path]:
        """The images that the metadata name."""
        with open(self.tables / "metadata.csv") as f:
            return [self.pictures / f"{row['image_name']}.jpg" for row in csv.DictReader(f)]

    @property
    def pictures(self) -> Path:
        return REAL / "isic2017" / "images" if self.real else self.tables / "images"


SMALL = Setting(SCRATCH / "training", "the built-in model", 300, (192, 144), 64, 16, 40, 5, "fp32", 0)
LARGE = replace(SMALL, folder=SCRATCH / "training-large", size=(1024, 768))
CPU = replace(SMALL, folder=SCRATCH / "training-256", size=(256, 256), real=(REAL / "isic2017").is_dir())
NO_PREVIEWS = {f"generate.classes.{name}.count": 0 for name in ("benign", "malignant")}  # of drawn weights: on a CPU they would take an hour
SD15 = "Stable Diffusion 1.5's size, drawn weights"
GPU = Setting(SCRATCH / "training-512", SD15, 120, (640, 480), 512, 16, 60, 10, "bf16", 8)
# On a CPU a step takes many seconds, and the whole UNet's optimizer more memory than a workstation has.
SD15_CPU = Setting(SCRATCH / "training-512-cpu", SD15, 24, (640, 480), 512, 1, 6, 1, "fp32", 0, rounds=3, lora=16)
ENCODED = "base"  # the run that prepared and encoded
OURS, PEER = "skinsynth", "diffusers' example"


def settings() -> dict[str, Setting]:
    """The name of a result, and its setting; the first is the one that is meant where none is named."""
    return {"finetune": GPU} if gpu() else {"finetune": CPU, "finetune-small-images": SMALL, "finetune-large-images": LARGE,
                                              "finetune-sd15": SD15_CPU}


def model(s: Setting) -> Path:
    """The model's folder; of the large one the weights are drawn, which a step does not notice."""
    from skinsynth.models import tiny

    if s.model != SD15:
        return tiny.WEIGHTS
    folder = s.folder / "model"
    if not (folder / "model_index.json").exists():
        import torch
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        pipe = StableDiffusionPipeline.from_pretrained(tiny.WEIGHTS)
        pipe.register_modules(
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),  # the rest is diffusers' default
            vae=AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                              block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
            text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)))
        pipe.save_pretrained(folder)
    return folder


def prepare(s: Setting) -> None:
    """Images, prepared and encoded; kept."""
    from skinsynth import config
    from skinsynth.data.phantom import write_dataset
    from skinsynth.run import Task
    from skinsynth.stages.encode import encode
    from skinsynth.stages.prepare import prepare as prepare_stage

    table = s.tables / "metadata.csv"
    if not table.exists() and s.real:
        head, *rows = (REAL / "isic2017" / "metadata.csv").read_text().splitlines()
        table.parent.mkdir(parents=True)
        table.write_text("\n".join([head, *rows[::len(rows) // s.images]][: s.images + 1]) + "\n")
    elif not table.exists():
        write_dataset(s.tables, images=s.images, malignant=0.35, seed=0, width=s.size[0], height=s.size[1])
    run = make_run(s, ENCODED, {})
    for stage, node in ((prepare_stage, "prepare"), (encode, "encode")):
        if not run.is_done(node):
            stage(config.load(run.config_path), run, Task())


def make_run(s: Setting, name: str, keys: dict[str, Any]) -> Any:
    """A run folder of the demo's configuration on the prepared images, encoded already but for the first."""
    from skinsynth import config
    from skinsynth.run import RunDir

    values = {"run": s.folder / name, "data.shards": s.folder / "shards", "data.name": "bench", "data.metadata": s.tables / "metadata.csv",
              "data.images": s.pictures, "data.duplicates": "null" if s.real else s.tables / "duplicates.csv", "prepare.size": s.side,
              "finetune.steps": s.steps, "finetune.precision": s.precision, "finetune.global_batch": s.batch, "finetune.log_every": s.window,
              "finetune.checkpoint_every": 10**6, "model.attention": "sdpa",  # as the peer has
              "finetune.lora_rank": s.lora,
              **({"model.base": model(s), **NO_PREVIEWS} if s.model == SD15 else {}), **keys}
    run = RunDir(s.folder / name)
    if name != ENCODED:
        shutil.rmtree(run.path, ignore_errors=True)
    run.create(config.load("configs/demo.yaml", [f"{key}={value}" for key, value in values.items()]))
    if name != ENCODED:
        shutil.copytree(s.folder / ENCODED / "encode", run.node("encode"))
        latents = run.dataset(run.config(), "latents")
        latents.unlink(missing_ok=True)
        latents.symlink_to(s.folder / "shards" / f"{ENCODED}-latents")
    return run


def per_second(s: Setting, times: list[float]) -> float:
    """Samples/s from the times at which the windows ended, the first window left out."""
    return s.window * s.batch / statistics.median(b - a for a, b in pairwise(times))


def ours(s: Setting, compiled: bool = False) -> dict[str, float]:
    """The stage itself as a job runs it, and as it logs itself."""
    from skinsynth import stages

    run = make_run(s, "ours", {"finetune.zero": 0, "model.compile": compiled, "cluster.stages.finetune.tasks_per_node": 1})
    if stages.run_node("finetune", str(run.path)) != stages.OK:
        raise SystemExit("finetune failed")
    from skinsynth.train.log import read_lines  # it imports torch, which is the stage's to do

    rows = read_lines(run.node("finetune") / "metrics.jsonl")[s.window::s.window]
    return medians(rows, "samples_per_second", "data_wait", "mfu", "peak_memory_gb")


def peer(s: Setting) -> dict[str, float]:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from PIL import Image

    cuda = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda, mixed_precision=s.precision.replace("fp32", "no"))
    pipe = StableDiffusionPipeline.from_pretrained(model(s), dtype=torch.float32)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    frozen = {"device": accelerator.device, "dtype": torch.bfloat16 if s.precision == "bf16" else torch.float32}
    vae, text_encoder = (part.requires_grad_(False).to(**frozen) for part in (pipe.vae, pipe.text_encoder))
    unet = pipe.unet.train()
    if s.lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=s.lora, lora_alpha=s.lora, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=1e-2)
    files = s.files

    class Folder(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            image = Image.open(files[index]).convert("RGB").resize((s.side, s.side), Image.Resampling.BILINEAR)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            ids = pipe.tokenizer("a dermoscopy image of a skin lesion", padding="max_length", truncation=True,
                                 max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids[0]
            return {"pixel_values": pixels, "input_ids": ids}

    data = Folder()  # drawn from without end: a set as small as this one would have its loader's workers begin anew every few steps
    drawn = torch.utils.data.RandomSampler(data, replacement=True, num_samples=s.steps * s.batch)
    loader = torch.utils.data.DataLoader(data, batch_size=s.batch, sampler=drawn, num_workers=s.workers)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=20, num_training_steps=s.steps)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    times, step = [], 0
    while step < s.steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(frozen["dtype"])).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                loss = F.mse_loss(unet(noisy, timesteps, hidden, return_dict=False)[0].float(), noise.float())
                accelerator.gather(loss.repeat(s.batch)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            step += 1
            if step % s.window == 0:
                times.append(time.perf_counter())
            if step == s.steps:
                break
    return {"samples_per_second": per_second(s, times)}


SIDES: dict[str, Callable[[Setting], Any]] = {"ours": ours, "compiled": partial(ours, compiled=True), "peer": peer, "model": lambda s: str(model(s))}


def main() -> None:
    for name, s in settings().items():
        compare(name, s)


def compare(name: str, s: Setting) -> None:
    last: dict[str, Any] = {}
    prepare(s)

    def measure(side: str) -> float:
        last[side] = in_process("benchmarks.finetune", side, name, env={"TORCHINDUCTOR_CACHE_DIR": str(s.folder / "compiled")})
        return float(last[side]["samples_per_second"])

    sides = {OURS: "ours", **({f"{OURS}, compiled": "compiled"} if name == "finetune" else {}), PEER: "peer"}
    rounds = alternate({side: partial(measure, word) for side, word in sides.items()}, s.rounds)
    pictures = f"{'ISIC 2017' if s.real else 'drawn'} JPEGs of {s.size[0]} x {s.size[1]}"
    report(name, rounds, OURS, PEER, "samples/s",
           f"{f'LoRA of rank {s.lora}' if s.lora else 'whole UNet'}, {s.model}, batch {s.batch}, {s.side} px, {s.precision}, SDPA, {s.steps} steps, "
           f"median of windows of {s.window} steps, the first left out; {pictures}, "
           "which the peer decodes in the step; ours on latents and embeddings that encode made before, "
           "which is not counted", device=gpu() or "cpu", last=last)


if __name__ == "__main__":
    side, name = [*sys.argv[1:], "finetune"][:2]
    print(json.dumps(SIDES[side](settings()[name])))
