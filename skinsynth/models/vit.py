"""The classifier: any Hugging Face image classifier, or a small ViT built from the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from skinsynth.errors import UserError
from skinsynth.knobs import Classify

LABELS = {0: "benign", 1: "malignant"}


def build(cfg: Classify, size: int, seed: int) -> Any:
    """A ``ForImageClassification`` model with two classes; ``size``: side of the shards' images in pixels.

    Raises:
        UserError: the model is not to be had locally, or the patches do not fit the image.
    """
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)  # the new head, and all of the small ViT
    names = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    if cfg.model != "small":
        try:
            return AutoModelForImageClassification.from_pretrained(cfg.model, num_labels=2, ignore_mismatched_sizes=True, local_files_only=True,
                                                                   use_safetensors=True, **names)
        except (OSError, ValueError) as error:
            where = "" if Path(cfg.model).exists() else f"; where there is internet, run: skinsynth pull CONFIG (or: hf download {cfg.model})"
            raise UserError(f"classify.model={cfg.model} cannot be loaded: {str(error).splitlines()[0]}{where}") from None
    side = cfg.image_size or size
    if side % cfg.patch:
        raise UserError(f"classify.patch={cfg.patch} does not divide the image side of {side} pixels")
    return ViTForImageClassification(ViTConfig(
        image_size=side, patch_size=cfg.patch, hidden_size=cfg.hidden_size, intermediate_size=4 * cfg.hidden_size,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, **names))


def logits(model: Any, images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (n, 3, height, width) -> float32 (n, 2). Scaling to -1..1 (ViT's own mean and std of 0.5) and resizing run on the device."""
    pixels = images.float() / 127.5 - 1
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return model(pixel_values=pixels).logits.float()
