"""A feature space for distances between sets of images: the encoder of the base model's VAE.

The usual Inception network was trained on photographs and cannot be fetched where there is no internet; the VAE's
encoder is there in every run. Distances in one feature space say nothing about another, so its name goes beside every
number, and a reader judges them against the distance between two sets of real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from skinsynth.knobs import Model
from skinsynth.models.diffusion import load_vae


def space_name(base: str) -> str:
    """``builtin-vae``, or ``<model>-vae`` for another base model; of a folder its last part only."""
    return f"{Path(base).name}-vae"


class Extractor:
    """uint8 (n, height, width, 3) -> float32 (n, d): mean and standard deviation over the picture of each channel, at every level of
    the VAE's encoder. Images always pass ``batch`` at a time, the last batch filled up, so a feature does not depend on its neighbours
    or on how the work was cut."""

    def __init__(self, model: Model, batch: int, device: Any = "cpu"):
        """Raises ``UserError`` where there is no VAE that can be loaded."""
        vae = load_vae(model)
        self.encoder, self.batch, self.device = vae.encoder.float().to(device).eval(), batch, device
        self.pooled: list[torch.Tensor] = []
        for level in (self.encoder.conv_in, *self.encoder.down_blocks, self.encoder.mid_block):
            level.register_forward_hook(self._pool)

    def _pool(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        std, mean = torch.std_mean(output.float(), dim=(2, 3), correction=0)
        self.pooled += [mean, std]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(images), self.batch):
            part = images[start:start + self.batch]
            full = np.concatenate([part, np.repeat(part[:1], self.batch - len(part), axis=0)])
            self.pooled.clear()
            self.encoder(torch.from_numpy(full).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1)
            found.append(torch.cat(self.pooled, 1)[:len(part)].cpu().numpy())
        return np.concatenate(found)
