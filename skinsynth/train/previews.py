"""The pictures of fine-tuning: what the weights draw before, while and after they are trained, always from the same noise.

::

    finetune/previews/00000000.png ...   by steps; a row per prompt
                      strip.png          all of them side by side, over time
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from skinsynth.data.order import sample_rng
from skinsynth.knobs import Config
from skinsynth.models import denoiser, diffusion
from skinsynth.run import RunDir, write_bytes
from skinsynth.world import World

COLUMNS = 6  # images per prompt
PROMPTS = 6  # rows at most
IN_STRIP = 2  # of each prompt's images


class Previews:
    """Draws on rank 0, with a pipeline of its own that stands on the host between times."""

    def __init__(self, cfg: Config, run: RunDir, world: World, fresh: Callable[[], Any]):
        self.cfg, self.folder, self.world, self.fresh = cfg, run.node("finetune") / "previews", world, fresh
        self.pipe: Any = None

    def draw(self, step: int, weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Draws with the weights, and with the base where that is not there yet. Returns the picture for TensorBoard."""
        self.pipe = self.pipe or self.fresh()
        if not self._path(0).exists():
            self._sheet(0)
        denoiser.put_back(self.pipe, self.cfg.finetune, weights)
        sheet = self._sheet(step)
        write_bytes(self.folder / "strip.png", _png(self._strip()))
        return {"previews": sheet}

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.png"

    def _sheet(self, step: int) -> np.ndarray:
        cfg, pipe = self.cfg, self.pipe.to(self.world.device)
        trained_with = pipe.scheduler
        diffusion.set_scheduler(pipe, cfg.generate.scheduler)
        prompts = list(dict.fromkeys(p for g in cfg.generate.classes.values() for p in g.prompts))[:PROMPTS]
        shape = diffusion.latent_shape(pipe, cfg.prepare.size)
        noise = np.stack([sample_rng(cfg.seed, 2**40 + i).standard_normal(shape, np.float32) for i in range(COLUMNS)])
        negative = diffusion.encode_prompts(pipe, [cfg.generate.negative_prompt], cfg.prepare.size)
        rows = [diffusion.sample(pipe, diffusion.encode_prompts(pipe, [p], cfg.prepare.size), negative, noise, cfg.generate.steps,
                                 cfg.generate.guidance) for p in prompts]
        pipe.scheduler = trained_with
        self.pipe = pipe.to("cpu")
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        write_bytes(self._path(step), _png(sheet))
        return sheet

    def _strip(self) -> np.ndarray:
        """Time goes to the right: the first images of each prompt, under the number of steps."""
        side, columns = self.cfg.prepare.size, []
        for path in sorted(self.folder.glob("[0-9]*.png")):
            sheet = np.asarray(Image.open(path).convert("RGB"))[:, : side * IN_STRIP]
            label = Image.new("RGB", (sheet.shape[1], 14), "white")
            ImageDraw.Draw(label).text((2, 1), f"{int(path.stem):,}", fill="black")
            columns += [np.concatenate([np.asarray(label), sheet]), np.full((sheet.shape[0] + 14, 3, 3), 255, np.uint8)]
        return np.concatenate(columns[:-1], axis=1)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
