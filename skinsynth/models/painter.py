"""The weights that images are generated from, and the drawing itself: a batch of the plan -> pixels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from skinsynth.data import descent
from skinsynth.data.dataset import Dataset
from skinsynth.data.lesion import WORK, lesion_mask
from skinsynth.data.order import sample_rng
from skinsynth.data.plan import Planned
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.models import attention, diffusion, hub
from skinsynth.models.compiler import compile_unet
from skinsynth.run import RunDir

GROW = 0.04  # of the image's side: the drawn region reaches that far beyond the lesion's edge


class Weights:
    """What images are generated from, watched: they must not change while they are used.

    ``lineage`` says what they descend from; ``group_ids`` None in it: nobody knows.

    Raises:
        UserError: not there, withdrawn, or not what finetune wrote.
    """

    def __init__(self, cfg: Config, run: RunDir):
        self.cfg, self.run, self.own = cfg, run, cfg.generate.weights == "finetuned"
        self.seen = self._signature()
        self.sha256 = self._hash()
        self.lineage = diffusion.read_lineage(run.weights) if self.own else self._foreign()
        self._check_withdrawn()
        if self.sha256 != self.lineage["weights_sha256"]:
            raise UserError(f"{run.weights} is not what finetune wrote: its files give {self.sha256}, lineage.json says "
                            f"{self.lineage['weights_sha256']}; delete {run.node('finetune')} to make it again")

    def _check_withdrawn(self) -> None:
        descent.check_withdrawn(self.lineage, Path(self.cfg.data.shards), str(self.run.weights) if self.own else self.cfg.model.base)

    def _hash(self) -> str:
        return diffusion.weights_sha256(self.run.weights) if self.own else diffusion.base_sha256(self.cfg.model)

    def _foreign(self) -> dict[str, Any]:
        model = self.cfg.model
        return {"base": model.base, "lora": model.lora, "lora_scale": model.lora_scale, "base_sha256": self.sha256, "weights_sha256": self.sha256,
                "train": None, **hub.descent_of(model)}

    def _files(self) -> list[Path]:
        if self.own:
            return sorted(p for p in self.run.weights.glob("*/*") if p.is_file())
        base, lora = hub.find_base(self.cfg.model), self.cfg.model.lora
        files = hub.read_files(base.weights) if base.weights.is_dir() else [base.weights]
        return [*files, *([hub.lora_file(Path(lora))] if lora else [])]

    def _signature(self) -> list[tuple[str, int, int]]:
        return [(str(path), found.st_size, found.st_mtime_ns) for path in self._files() for found in [path.stat()]]

    def check(self) -> None:
        """Cheap where no file was touched. Raises ``UserError`` where their content is another one than at the start, or they are withdrawn now."""
        self._check_withdrawn()
        now = self._signature()
        if now == self.seen:
            return
        found = self._hash()
        if found != self.sha256:
            raise UserError(f"the weights changed while they were used: {self.sha256} at the start, {found} now; put them back, or generate into "
                            "another run")
        self.seen = now

    def load(self) -> Any:
        precision = self.cfg.generate.precision
        pipe = diffusion.load_pipeline(self.run.weights, precision) if self.own else diffusion.load_base(self.cfg.model, precision)
        self.check()
        return pipe


class Painter:
    """Draws batches of the plan; each prompt is encoded once. ``train``: the images to start from, for the methods that do."""

    def __init__(self, cfg: Config, weights: Weights, device: torch.device, train: Dataset | None = None):
        self.cfg, self.train = cfg.generate, train
        pipe = ready(weights.load().to(device), cfg, attention.choose(cfg.model.attention, device))
        if cfg.model.compile:
            compile_unet(pipe.unet, device)
        self.shape, self.side = diffusion.latent_shape(pipe, cfg.prepare.size), cfg.prepare.size
        self.encoder, self.pipe = pipe, _pipeline(pipe, self.cfg.method)
        self.encode = lru_cache(4096)(lambda prompt: diffusion.encode_prompts(self.encoder, [prompt], self.side))

    def draw(self, batch: list[Planned]) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (n, height, width, 3), and bool (n,): whether the latents were finite; both on the device, which is not waited for."""
        texts = [self.encode(image.prompt) for image in batch]
        told = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        given = {**diffusion.conditions(self.pipe, told, len(batch)),
                 **diffusion.conditions(self.pipe, self.encode(self.cfg.negative_prompt), len(batch), "negative_")}
        latents = diffusion.denoise(self.pipe, given, self.cfg.steps, self.cfg.guidance, **self._start(batch))
        return diffusion.decode_latents(self.pipe.vae, latents), latents.isfinite().flatten(1).all(1)

    def _start(self, batch: list[Planned]) -> dict[str, Any]:
        if self.cfg.method == "text-to-image":
            noise = torch.from_numpy(np.stack([self.noise(image) for image in batch]))
            return {"latents": noise.to(self.pipe.device, self.pipe.unet.dtype), "height": self.side, "width": self.side}
        sources = [self._source(image) for image in batch]
        start: dict[str, Any] = {"image": np.stack(sources).astype(np.float32) / 255, "strength": self.cfg.strength,
                                 "generator": [torch.Generator().manual_seed(image.seed) for image in batch]}
        if self.cfg.method == "inpaint":
            start |= {"mask_image": np.stack([mask(image, self.cfg.redraw) for image in sources]), "height": self.side, "width": self.side}
        return start

    def noise(self, image: Planned) -> np.ndarray:
        """float32 (channels, h, w)."""
        return sample_rng(image.seed, 0).standard_normal(self.shape, np.float32)

    def _source(self, image: Planned) -> np.ndarray:
        assert self.train is not None
        assert image.source is not None
        return self.train.image(image.source)


def ready(pipe: Any, cfg: Config, kind: str) -> Any:
    """The same pipeline, made fit to draw as ``generate`` is configured to. ``kind``: the attention kernel."""
    attention.apply(pipe.unet, kind)
    for network in (pipe.unet, pipe.vae):  # convolutions are faster so, on CPUs and GPUs
        network.to(memory_format=torch.channels_last)
    diffusion.set_scheduler(pipe, cfg.generate.scheduler)
    return pipe


def _pipeline(pipe: Any, method: str) -> Any:
    """The pipeline of the method, with the same networks."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    if method == "text-to-image":
        return pipe
    made = (AutoPipelineForImage2Image if method == "image-to-image" else AutoPipelineForInpainting).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def mask(image: np.ndarray, redraw: str) -> np.ndarray:
    """uint8 (height, width, 3) -> float32 (height, width), 1 where is drawn anew: the lesion and a rim round it, or ("skin") all but the
    lesion. Where no lesion is found, the middle half of the image is taken for one."""
    side = len(image)
    found = lesion_mask(cv2.resize(image, (WORK, WORK), interpolation=cv2.INTER_CUBIC if side < WORK else cv2.INTER_AREA))
    if not found.any():
        found[WORK // 4: -WORK // 4, WORK // 4: -WORK // 4] = 1
    grow = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * round(GROW * WORK) + 1,) * 2)
    lesion = cv2.resize(cv2.dilate(found, grow), (side, side), interpolation=cv2.INTER_NEAREST)
    return (lesion if redraw == "lesion" else 1 - lesion).astype(np.float32)
