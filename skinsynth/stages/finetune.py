"""finetune: DreamBooth with prior preservation (Ruiz et al. 2023), or text-to-image on captions; all weights or LoRA (Hu et al. 2022).

The VAE is never trained, and the text encoder only when asked for, which is why their outputs could be cached by ``encode``.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from skinsynth import config
from skinsynth.data import descent, plan
from skinsynth.data.cache import open_dataset
from skinsynth.files import mode_by_umask, put_in_place, sha256_file, write_json
from skinsynth.knobs import Config
from skinsynth.models import attention, denoiser, diffusion, hub, painter
from skinsynth.models.compiler import compile_unet
from skinsynth.run import RunDir, code_version
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import Clock, read_lines
from skinsynth.train.loop import train
from skinsynth.train.previews import Previews
from skinsynth.train.samples import Samples
from skinsynth.world import Stopped, World

NODE = "finetune"


def finetune(cfg: Config, run: RunDir, world: World) -> None:
    """Trains, then writes ``finetune/weights`` (a diffusers folder with ``lineage.json``, LoRA merged and, in ``lora/``, apart) and previews.

    Raises:
        UserError: latents of another base, a base that does not fit, ranks that do not divide the global batch, a loss that is no number.
        Stopped: a stop signal; the same command goes on.
    """
    clock = Clock()
    clock.lap("start and imports")
    base_sha256 = diffusion.base_sha256(cfg.model)
    descent.check_withdrawn(hub.descent_of(cfg.model), Path(cfg.data.shards), cfg.model.base)  # its weights would descend from them too
    pipe = _base(cfg)
    kind = attention.choose(cfg.model.attention, world.device)
    model = denoiser.build(pipe, cfg.finetune, kind, cfg.seed)
    if cfg.model.compile:
        compile_unet(model.unet, world.device)
    samples = Samples(cfg, run, pipe, base_sha256)
    prompts = plan.examples(cfg, open_dataset(cfg, run, "train") if plan.has_fields(cfg) else None)
    clock.lap("models and data")
    identity = {**config.binding(cfg.finetune), "base_sha256": base_sha256, "samples_sha256": samples.sha256(),
                "images_sha256": samples.images_sha256()}
    checkpoints = Checkpoints(run.node(NODE) / "checkpoints", world, identity, cfg.finetune.keep, cfg.finetune.keep_every)
    clock.lap("finding and checking the checkpoint")
    engine = Engine(cfg.finetune, world, model, NODE, checkpoints.found)
    clock.lap("engine and its state")
    previews = Previews(cfg, run, world, prompts, lambda: painter.ready(_base(cfg, cfg.generate.precision), cfg, kind))

    state = train(engine, run, NODE, checkpoints, clock, samples, _loss(cfg, pipe, world.device),
                  show=lambda step: previews.draw(step, engine.weights()), every=cfg.finetune.validate_every)
    if world.max(int(world.stop)):
        raise Stopped(f"{NODE} stopped after its last step; the same command draws the previews that lack and writes the weights")
    if not previews.there(cfg.finetune.steps):  # a stop signal came before they were drawn
        previews.draw(cfg.finetune.steps, engine.weights())
    weights = engine.weights()
    if not world.is_main:
        deque(weights, maxlen=0)  # takes part in gathering them
    else:
        pipe = _base(cfg)  # a fresh one, free of wrappers and trained dtypes
        denoiser.put_back(pipe, cfg.finetune, weights)
        export(cfg, run, pipe, samples, {"base": cfg.model.base, "base_sha256": base_sha256, "attention": kind, **config.binding(cfg.finetune)})
        losses = [row["loss"] for row in read_lines(run.node(NODE) / "metrics.jsonl")]
        tail = losses[-max(1, len(losses) // 10):]
        run.finish(NODE, {"steps": cfg.finetune.steps, "loss": sum(tail) / len(tail) if tail else None, "attention": kind,
                          "bad_samples": state["bad_samples"]}, [run.weights / "lineage.json"])
    world.barrier()


def _base(cfg: Config, precision: str = "fp32") -> Any:
    """The base on the CPU, as it is, but for what it predicts."""
    pipe = diffusion.load_base(cfg.model, precision)
    if cfg.finetune.prediction != "model":
        pipe.scheduler.register_to_config(prediction_type=cfg.finetune.prediction)
    return pipe


def _loss(cfg: Config, pipe: Any, device: torch.device) -> Callable[[Any, Batch], torch.Tensor]:
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)  # the forward process; samplers' own add_noise loops in Python
    vae = pipe.vae.requires_grad_(False).to(device) if not cfg.finetune.cache_latents else None

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        if vae is not None:
            batch = {**batch, "latents": diffusion.draw_latents(vae, batch["pixels"], batch["draw"])}
        return diffusion.diffusion_loss(model, noise_schedule, batch, cfg.finetune.snr_gamma, cfg.finetune.snr_floor)

    return loss


def export(cfg: Config, run: RunDir, pipe: Any, samples: Samples, made_by: dict[str, Any]) -> None:
    """The diffusers folder, whole or not there; its lineage says what it descends from. Not of images that are withdrawn meanwhile."""
    samples.train.check_withdrawn()
    temp = run.weights.with_name(".weights.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    if cfg.finetune.lora_rank:
        denoiser.save_lora(pipe, cfg.finetune, temp / "lora")
        pipe = _base(cfg)
        diffusion.merge_lora(pipe, temp / "lora", 1.0)
    for name in {"tokenizer", "tokenizer_2"} & pipe.components.keys():
        pipe.components[name].init_kwargs.pop("local_files_only", None)  # whether the hub could be reached must not be in the weights' hash
    pipe.save_pretrained(temp, safe_serialization=True)
    mode_by_umask(*temp.rglob("*.safetensors"))
    lineage = {**made_by, "weights_sha256": diffusion.weights_sha256(temp), "train": samples.train.folder.name,
               "train_sha256": sha256_file(samples.train.folder / "manifest.json"), "code": code_version(), **_descent(cfg, samples.names())}
    write_json(temp / "lineage.json", lineage)
    put_in_place(temp, run.weights)


def _descent(cfg: Config, names: descent.Names) -> dict[str, Any]:
    """What the weights were trained on, and the base before them: where nobody knows that of the base, nobody knows all of it of the weights."""
    base = hub.descent_of(cfg.model)
    known = descent.union(names, descent.trained_on(base))
    return {"group_ids": None if base["group_ids"] is None else known["groups"], "trained_on": known}
