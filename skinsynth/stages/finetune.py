"""finetune: DreamBooth with prior preservation (Ruiz et al. 2023), several concepts at once, on cached latents.

The UNet is trained; VAE and text encoder stay as they are, which is why their outputs could be cached by ``encode``.
"""

from __future__ import annotations

import io
import os
import shutil
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from skinsynth.config import Config
from skinsynth.data import concepts
from skinsynth.data.order import sample_rng
from skinsynth.data.shards import Dataset, from_npy
from skinsynth.models import attention, diffusion
from skinsynth.run import RunDir, code_version, read_json, sha256_file, write_bytes, write_json
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.loop import read_lines, train
from skinsynth.world import World

NODE = "finetune"
PREVIEWS = 6  # images per prompt in the before-and-after picture


def finetune(cfg: Config, run: RunDir, world: World) -> None:
    """Trains, then writes ``finetune/weights`` (a diffusers folder with ``lineage.json``) and before-and-after pictures.

    Raises:
        UserError: latents of another base, a base that does not fit, ranks that do not divide the global batch.
        Stopped: a stop signal; the same command goes on.
    """
    pipe = diffusion.load_base(cfg.model)
    attention.apply(pipe.unet, attention.choose(cfg.model.attention, world.device))
    pipe.unet.requires_grad_(True)
    if cfg.finetune.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    samples = Samples(cfg, run, pipe)
    engine = Engine(cfg.finetune, world, pipe.unet, NODE)
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)  # the forward process; samplers' own add_noise loops in Python
    train(engine, run, NODE, samples.batch, lambda unet, batch: diffusion.diffusion_loss(
        unet, noise_schedule, batch, cfg.finetune.snr_gamma, cfg.finetune.snr_floor))
    state = engine.state_dict()
    if world.is_main:
        pipe = diffusion.load_base(cfg.model)  # a fresh one, free of wrappers and trained dtypes
        draw_previews(cfg, run, pipe.to(world.device), "base")
        pipe.unet.load_state_dict(state)
        draw_previews(cfg, run, pipe, "tuned")
        export(cfg, run, pipe.to("cpu"), samples)
        losses = [row["loss"] for row in read_lines(run.node(NODE) / "metrics.jsonl")]
        tail = losses[-max(1, len(losses) // 10):]
        run.finish(NODE, {"steps": len(losses), "loss": sum(tail) / len(tail)}, [run.weights / "lineage.json"])
    world.barrier()


class Samples:
    """Batches of cached latents by position. All randomness is the sample's own: (seed, position)."""

    def __init__(self, cfg: Config, run: RunDir, pipe: Any):
        self.cfg, self.seed = cfg, cfg.seed
        self.train = Dataset.open(run.dataset(cfg, "train"))
        self.latents = Dataset.open(run.dataset(cfg, "latents"))
        self.sources = concepts.sources(cfg, self.train)
        self.mixture = concepts.mixture(self.sources, cfg.seed)
        self.where = {key: i for i, key in enumerate(self.latents.keys)}
        self.texts = read_json(run.node("encode") / "prompts.json")
        self.embeddings = load_file(run.node("encode") / "prompts.safetensors")  # name -> (prompts, ...): all that the UNet is told
        self.scale, self.timesteps = pipe.vae.config.scaling_factor, pipe.scheduler.config.num_train_timesteps
        # instance and prior losses are means of their own in the paper: halves of the batch, so each counts double
        self.factor = 2.0 if any(s.prior for s in self.sources) else 1.0

    def batch(self, positions: range) -> Batch:
        """latents, noise float32 (n, c, h, w); timestep int64 (n,); weight float32 (n,); and what ``diffusion.encode_prompts`` gives."""
        rows = [self._one(position) for position in positions]
        told = {name: values[[r[3] for r in rows]] for name, values in self.embeddings.items()}
        return {"latents": torch.from_numpy(np.stack([r[0] for r in rows])), "noise": torch.from_numpy(np.stack([r[1] for r in rows])),
                "timestep": torch.tensor([r[2] for r in rows]), "weight": torch.tensor([r[4] for r in rows], dtype=torch.float32), **told}

    def _one(self, position: int) -> tuple[np.ndarray, np.ndarray, int, int, float]:
        number, index = self.mixture.at(position)
        source, rng = self.sources[number], sample_rng(self.seed, position)
        key = self.train.keys[source.samples[index]]
        moments = from_npy(self.latents.read(self.where[key], "moments.npy"))
        mean, std = moments[rng.integers(len(moments))]
        latents = (mean + std * rng.standard_normal(mean.shape, np.float32)) * self.scale
        noise = rng.standard_normal(mean.shape, np.float32)
        timestep = int(rng.integers(self.timesteps))
        prompt = "" if rng.random() < self.cfg.finetune.caption_dropout else source.prompt
        weight = self.factor * (self.cfg.finetune.prior_weight if source.prior else 1.0)
        return latents.astype(np.float32), noise, timestep, self.texts.index(prompt), weight

    def groups(self) -> list[str]:
        """The patient or lesion groups whose images are trained on."""
        return sorted({self.train.columns["group"][i] for source in self.sources for i in source.samples})


def export(cfg: Config, run: RunDir, pipe: Any, samples: Samples) -> None:
    """The diffusers folder, whole or not there; its lineage says what it descends from."""
    temp = run.weights.with_name(".weights.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    for name in {"tokenizer", "tokenizer_2"} & pipe.components.keys():
        pipe.components[name].init_kwargs.pop("local_files_only", None)  # whether the hub could be reached must not be in the weights' hash
    pipe.save_pretrained(temp, safe_serialization=True)
    lineage = {"base": cfg.model.base, "base_sha256": samples.latents.manifest["base_sha256"], "weights_sha256": diffusion.weights_sha256(temp),
               "train": samples.train.folder.name, "train_sha256": sha256_file(samples.train.folder / "manifest.json"),
               "group_ids": samples.groups(), "code": code_version()}
    write_json(temp / "lineage.json", lineage)
    shutil.rmtree(run.weights, ignore_errors=True)
    os.replace(temp, run.weights)


def draw_previews(cfg: Config, run: RunDir, pipe: Any, name: str) -> None:
    """``finetune/previews/<name>.png``: one row per generation prompt, the same noise in every row and before and after."""
    trained_with = pipe.scheduler
    diffusion.set_scheduler(pipe, cfg.generate.scheduler)
    prompts = list(dict.fromkeys(p for g in cfg.generate.classes.values() for p in g.prompts))
    shape = diffusion.latent_shape(pipe, cfg.prepare.size)
    noise = np.stack([sample_rng(cfg.seed, 2**40 + i).standard_normal(shape, np.float32) for i in range(PREVIEWS)])
    negative = diffusion.encode_prompts(pipe, [cfg.generate.negative_prompt], cfg.prepare.size)
    rows = [diffusion.sample(pipe, diffusion.encode_prompts(pipe, [p], cfg.prepare.size), negative, noise, cfg.generate.steps,
                             cfg.generate.guidance) for p in prompts]
    pipe.scheduler = trained_with  # it goes into the exported folder
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    write_bytes(run.node(NODE) / "previews" / f"{name}.png", _png(sheet))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


