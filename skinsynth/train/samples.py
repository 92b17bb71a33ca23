"""The samples of fine-tuning, by position: latents or pixels, noise, timestep and conditioning, each from the sample's own seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from skinsynth import cpu
from skinsynth.data import concepts, descent, views
from skinsynth.data.cache import open_dataset
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.data.order import sample_rng
from skinsynth.data.stream import Source
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_of
from skinsynth.knobs import Config
from skinsynth.models import diffusion
from skinsynth.run import RunDir
from skinsynth.train.engine import Batch


@dataclass
class Prompts:
    """What ``encode`` made of the prompts; or their ``tokens``, where the text encoder trains."""

    rows: dict[str, int]
    values: dict[str, np.ndarray]  # as ``diffusion.encode_prompts``; or int64 (prompts, tokens)

    @classmethod
    def of(cls, cfg: Config, run: RunDir, pipe: Any) -> Prompts:
        texts = read_json(run.node("encode") / "prompts.json")
        if texts is None:
            raise UserError(f"{run.node('encode')} has no prompts.json: run encode first")
        values = load_file(run.node("encode") / "prompts.safetensors")
        if cfg.finetune.train_text_encoder:
            values = {**diffusion.tokens(pipe, texts), **{name: values[name] for name in values.keys() & {"time_ids"}}}
        return cls({text: row for row, text in enumerate(texts)}, {name: tensor.numpy() for name, tensor in values.items()})


class Samples:
    """``batch`` gives, for n positions: ``latents`` and ``noise`` float32 (n, channels, h, w), ``timestep`` int64 (n,), ``weight`` float32 (n,),
    and what ``diffusion.encode_prompts`` gives, or ``tokens``. Without a latent cache, instead of ``latents``: ``pixels`` uint8
    (n, height, width, 3) and ``draw`` float32 (n, channels, h, w), the normal numbers with which the VAE's posterior is drawn from.

    Raises:
        UserError: latents of another base or other views; images or prompts that were not encoded.
    """

    def __init__(self, cfg: Config, run: RunDir, pipe: Any, base_sha256: str):
        self.cfg, self.seed, self.base_sha256, self.workers = cfg, cfg.seed, base_sha256, cpu.loaders(cfg.data.workers)
        skip = cfg.data.on_error == "skip"
        self.train = open_dataset(cfg, run, "train", skip)
        self.sources = concepts.sources(cfg, self.train)
        self.mixture = concepts.mixture(cfg, self.sources)
        self.feeds = [Source(self.train, source.samples, cfg.data.on_error) for source in self.sources]
        self.prompt_of = [dict(zip(source.samples, source.prompts, strict=True)) for source in self.sources]
        self.prompts = Prompts.of(cfg, run, pipe)
        self.shape = diffusion.latent_shape(pipe, cfg.prepare.size)
        self.scale, self.timesteps = pipe.vae.config.scaling_factor, pipe.scheduler.config.num_train_timesteps
        self.latents = self._open_latents(run, skip) if cfg.finetune.cache_latents else None

    def _open_latents(self, run: RunDir, skip: bool) -> Dataset:
        latents = Dataset.open(run.dataset(self.cfg, "latents"), skip)
        self.where = {key: i for i, key in enumerate(latents.keys)}
        if latents.manifest["base_sha256"] != self.base_sha256:
            raise UserError(f"{latents.folder} was encoded with another base model than {self.cfg.model.base}: delete it and encode again")
        absent = [self.train.keys[i] for source in self.sources for i in source.samples if self.train.keys[i] not in self.where]
        if absent and not skip:
            raise UserError(f"{latents.folder} lacks {len(absent)} images of the concepts (first: {absent[0]}): delete it and encode again")
        return latents

    def batch(self, positions: range) -> Batch:
        rows = [self._one(position) for position in positions]
        prompts = [row.pop("prompt") for row in rows]
        # numpy alone: a loader thread that had torch's threads work for it would make all of them sleep between the operations of a step
        found = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        found |= {name: values[prompts] for name, values in self.prompts.values.items()}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def keys(self, positions: range) -> list[str]:
        places = [self.mixture.at(position) for position in positions]
        return [self.train.keys[self.sources[number].samples[index]] for number, index in places]

    @property
    def bad(self) -> list[BadSample]:
        return [error for feed in self.feeds for error in feed.bad]

    def _one(self, position: int) -> dict[str, Any]:
        number, index = self.mixture.at(position)
        source, cfg, rng = self.sources[number], self.cfg.finetune, sample_rng(self.seed, position)
        view = int(rng.integers(views.count(self.cfg.encode)))
        draw = rng.standard_normal(self.shape, np.float32)
        noise = rng.standard_normal(self.shape, np.float32)
        timestep = rng.integers(self.timesteps)
        dropped = rng.random() < cfg.caption_dropout
        if cfg.noise_offset:
            noise += cfg.noise_offset * rng.standard_normal((self.shape[0], 1, 1), np.float32)
        # instance and prior losses are means of their own in the paper: where a concept has both, each is half of what it draws
        weight = (cfg.prior_weight if source.prior else 1.0) / source.share
        image, found = self.feeds[number].read(index, lambda train, image: (image, self._image(train, image, view, draw)))
        prompt = "" if dropped else self.prompt_of[number][image]
        return {**found, "noise": noise, "timestep": np.int64(timestep), "weight": np.float32(weight), "prompt": self.prompts.rows[prompt]}

    def _image(self, train: Dataset, image: int, view: int, draw: np.ndarray) -> dict[str, Any]:
        key = train.keys[image]
        if self.latents is None:
            return {"pixels": views.views(train.image(image), key, self.cfg.encode, self.seed)[view], "draw": draw}
        if key not in self.where:  # encode could not read the image
            raise train.bad(image, "has no latents")
        mean, std = self.latents.array(self.where[key], "moments.npy")[view]
        return {"latents": ((mean + std * draw) * self.scale).astype(np.float32)}

    def sha256(self) -> str:
        """Which images with which prompts: a checkpoint of others must not be gone on from."""
        lines = (f"{self.train.keys[i]} {prompt}\n" for s in self.sources for i, prompt in zip(s.samples, s.prompts, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def images_sha256(self) -> str:
        """Of these images themselves, and the views of them that are drawn from; latents differ in their last bits between kinds of devices."""
        return sha256_of([self.train.content_sha256, self.cfg.encode.flip, self.cfg.encode.crops, self.cfg.encode.crop_scale])

    def names(self) -> descent.Names:
        """Those of the images that are trained on, their patients, lesions and groups."""
        return descent.names(self.train, (i for source in self.sources for i in source.samples))
