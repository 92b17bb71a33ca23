"""A fine-tuning step beside the one of diffusers' example scripts, with the built-in model on the CPU.

The peer is the loop of ``train_text_to_image.py`` written against diffusers' public API: VAE and text encoder run in every step, the
images come from a folder through PIL in the main process (the script's default), and the loss is read after every step. Both sides train
the whole UNet with AdamW in float32, with the same batch and attention, in one process that has all cores.
``python -m benchmarks.finetune SIDE FOLDER`` is one measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import SCRATCH, alternate, in_process, report

STEPS, BATCH, WINDOW = 40, 16, 5
OURS, PEER = "skinsynth", "diffusers' example"


def prepare() -> Path:
    """300 drawn images, prepared at 64 px and encoded; kept."""
    from skinsynth import config
    from skinsynth.data.phantom import write_dataset
    from skinsynth.run import RunDir, Task
    from skinsynth.stages.encode import encode
    from skinsynth.stages.prepare import prepare as prepare_stage

    folder = SCRATCH / "training"
    if not (folder / "images" / "metadata.csv").exists():
        write_dataset(folder / "images", images=300, malignant=0.35, seed=0)
    run = make_run(folder, "base", {})
    for stage, node in ((prepare_stage, "prepare"), (encode, "encode")):
        if not run.is_done(node):
            stage(config.load(run.config_path), run, Task())
    assert RunDir(folder / "base").is_done("encode")
    return folder


def make_run(folder: Path, name: str, keys: dict[str, Any]) -> Any:
    """A run folder of the demo's configuration on the prepared images, encoded already where ``base`` is."""
    import shutil

    from skinsynth import config
    from skinsynth.run import RunDir

    values = {"run": folder / name, "data.shards": folder / "shards", "data.name": "bench", "data.metadata": folder / "images/metadata.csv",
              "data.images": folder / "images/images", "data.duplicates": folder / "images/duplicates.csv", "finetune.steps": STEPS,
              "finetune.global_batch": BATCH, "finetune.log_every": WINDOW, "finetune.checkpoint_every": 10**6, **keys}
    run = RunDir(folder / name)
    if name != "base":
        shutil.rmtree(run.path, ignore_errors=True)
    run.create(config.load("configs/demo.yaml", [f"{key}={value}" for key, value in values.items()]))
    if name != "base":
        shutil.copytree(folder / "base" / "encode", run.node("encode"))
        latents = run.dataset(run.config(), "latents")
        latents.unlink(missing_ok=True)
        latents.symlink_to(folder / "shards" / "base-latents")
    return run


def per_second(times: list[float]) -> float:
    """Samples/s from the times at which the windows ended, the first window left out."""
    return WINDOW * BATCH / statistics.median(b - a for a, b in pairwise(times))


def ours(folder: Path) -> float:
    """The stage itself, as it logs itself."""
    from skinsynth.stages.finetune import finetune
    from skinsynth.train.log import read_lines
    from skinsynth.world import World

    run = make_run(folder, "ours", {"finetune.zero": 0})
    finetune(run.config(), run, World())
    rows = read_lines(run.node("finetune") / "metrics.jsonl")[WINDOW::WINDOW]
    return statistics.median(row["samples_per_second"] for row in rows)


def peer(folder: Path) -> float:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.optimization import get_scheduler
    from PIL import Image

    from skinsynth.models import tiny

    accelerator = Accelerator(cpu=True)
    pipe = StableDiffusionPipeline.from_pretrained(tiny.WEIGHTS, dtype=torch.float32)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    vae, text_encoder, unet = pipe.vae.requires_grad_(False), pipe.text_encoder.requires_grad_(False), pipe.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4, weight_decay=1e-2)
    files = sorted((folder / "images/images").glob("*.jpg"))

    class Folder(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            image = Image.open(files[index]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            ids = pipe.tokenizer("a dermoscopy image of a skin lesion", padding="max_length", truncation=True,
                                 max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids[0]
            return {"pixel_values": pixels, "input_ids": ids}

    loader = torch.utils.data.DataLoader(Folder(), batch_size=BATCH, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=20, num_training_steps=STEPS)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    times, step = [], 0
    while step < STEPS:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                loss = F.mse_loss(unet(noisy, timesteps, hidden, return_dict=False)[0].float(), noise.float())
                accelerator.gather(loss.repeat(BATCH)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            step += 1
            if step % WINDOW == 0:
                times.append(time.perf_counter())
            if step == STEPS:
                break
    return per_second(times)


SIDES: dict[str, Callable[[Path], float]] = {"ours": ours, "peer": peer}


def main() -> None:
    folder = prepare()

    def measure(side: str) -> float:
        return float(in_process("benchmarks.finetune", side, folder)["samples_per_second"])

    rounds = alternate({OURS: partial(measure, "ours"), PEER: partial(measure, "peer")}, rounds=3)
    report("finetune", rounds, OURS, PEER, "samples/s",
           f"whole UNet of the built-in model, batch {BATCH}, 64 px, float32, SDPA, {STEPS} steps, median of windows of {WINDOW} steps without the "
           "first; ours on latents and embeddings that encode made before, which is not counted")


if __name__ == "__main__":
    print(json.dumps({"samples_per_second": SIDES[sys.argv[1]](Path(sys.argv[2]))}))
