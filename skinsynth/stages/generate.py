"""generate: the plan, cut into units of one output shard each; every image drawn from its own seed.

What a unit holds depends on the configuration and the weights alone, so any number of tasks and restarts gives the
same bytes (on one kind of device: kernels of different devices round differently).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skinsynth.data.order import Mixture, sample_rng
from skinsynth.data.shards import ShardWriter, claim, encode_jpeg, missing_parts, write_manifest
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.models import attention, diffusion
from skinsynth.run import Progress, RunDir, Task
from skinsynth.world import World

NODE = "generate"


@dataclass(frozen=True)
class Planned:
    """One image of the plan."""

    number: int
    key: str
    name: str  # class name
    target: int
    prompt: str
    seed: int


def plan(cfg: Config) -> list[Planned]:
    """All images, classes mixed in proportion so that every shard holds all of them; a function of the configuration.

    Raises:
        UserError: nothing to generate.
    """
    classes = {name: c for name, c in cfg.generate.classes.items() if c.count}
    if not classes:
        raise UserError("generate.classes asks for no image: give at least one class a count")
    names, counts = list(classes), tuple(c.count for c in classes.values())
    mixed, drawn, images = Mixture(counts, tuple(map(float, counts)), cfg.seed), dict.fromkeys(names, 0), []
    for number in range(sum(counts)):
        name = names[mixed.cycle[number % len(mixed.cycle)]]
        c, turn = classes[name], drawn[name]
        drawn[name] += 1
        seed = int(np.random.SeedSequence([cfg.seed, number]).generate_state(1)[0])
        images.append(Planned(number, f"syn-{number:08d}", name, c.target, c.prompts[turn % len(c.prompts)], seed))
    return images


def generate(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``<run>-synthetic``: per image ``jpg`` and ``json`` (prompt, seed, class, weights hash ...).

    Raises:
        UserError: the weights are not those of the run's fine-tuning, or the dataset was begun with others.
    """
    images, folder = plan(cfg), run.dataset(cfg, "synthetic")
    units = -(-len(images) // cfg.generate.shard_size)
    lineage, settings = diffusion.read_lineage(run.weights), _settings(cfg)
    if diffusion.weights_sha256(run.weights) != lineage["weights_sha256"]:
        raise UserError(f"{run.weights} is not what finetune wrote: its files give {diffusion.weights_sha256(run.weights)}, lineage.json says "
                        f"{lineage['weights_sha256']}; delete {run.node('finetune')} to make it again")
    classes = {name: {"target": c.target, "count": c.count, "prompts": c.prompts} for name, c in cfg.generate.classes.items()}
    claim(folder, {"weights_sha256": lineage["weights_sha256"], "seed": cfg.seed, "settings": settings, "classes": classes})
    mine = task.mine(missing_parts(folder, units))
    cut = {unit: images[unit * cfg.generate.shard_size:(unit + 1) * cfg.generate.shard_size] for unit in mine}
    progress = Progress(run, NODE, task.index, sum(map(len, cut.values())), "images")
    painter = Painter(cfg, run) if cut else None
    for unit, planned in cut.items():
        assert painter is not None
        with ShardWriter(folder, unit) as shard:
            for batch, count in diffusion.padded(planned, cfg.generate.batch):
                for image, pixels in zip(batch[:count], painter.paint(batch), strict=False):
                    record = {**settings, "prompt": image.prompt, "seed": image.seed, "class": image.name, "target": image.target,
                              "number": image.number, "weights_sha256": lineage["weights_sha256"], "origin": "synthetic"}
                    shard.add(image.key, {"jpg": encode_jpeg(pixels, cfg.generate.quality), "json": json.dumps(record).encode()},
                              **{"target": image.target, "class": image.name, "seed": image.seed})
                progress.advance(count)
    if not missing_parts(folder, units):
        manifest = write_manifest(folder, units, kind="synthetic", lineage=lineage, planned=len(images), settings=settings, class_names=classes)
        run.finish(NODE, {"images": manifest["count"], "classes": manifest["classes"]}, [folder / "manifest.json"])


def _settings(cfg: Config) -> dict[str, Any]:
    g = cfg.generate
    return {"size": cfg.prepare.size, "steps": g.steps, "guidance": g.guidance, "scheduler": g.scheduler, "negative_prompt": g.negative_prompt,
            "batch": g.batch, "quality": g.quality, "precision": g.precision}


class Painter:
    """The run's own weights, ready to draw; prompts are encoded once."""

    def __init__(self, cfg: Config, run: RunDir):
        self.cfg, device = cfg, World().device
        self.pipe = diffusion.load_pipeline(run.weights, cfg.generate.precision).to(device)
        attention.apply(self.pipe.unet, attention.choose(cfg.model.attention, device))
        for network in (self.pipe.unet, self.pipe.vae):  # convolutions are faster so, on CPUs and GPUs
            network.to(memory_format=torch.channels_last)
        diffusion.set_scheduler(self.pipe, cfg.generate.scheduler)
        prompts = sorted({p for c in cfg.generate.classes.values() for p in c.prompts})
        self.where = {prompt: i for i, prompt in enumerate(prompts)}
        self.texts = diffusion.encode_prompts(self.pipe, prompts, cfg.prepare.size)
        self.negative = diffusion.encode_prompts(self.pipe, [cfg.generate.negative_prompt], cfg.prepare.size)
        self.shape = diffusion.latent_shape(self.pipe, cfg.prepare.size)

    def paint(self, batch: list[Planned]) -> np.ndarray:
        """uint8 (n, height, width, 3)."""
        noise = np.stack([sample_rng(image.seed, 0).standard_normal(self.shape, np.float32) for image in batch])
        rows = [self.where[image.prompt] for image in batch]
        texts = {name: values[rows] for name, values in self.texts.items()}
        return diffusion.sample(self.pipe, texts, self.negative, noise, self.cfg.generate.steps, self.cfg.generate.guidance)
