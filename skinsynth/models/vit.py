"""The classifier: any Hugging Face image classifier, or a small ViT built from the configuration."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from skinsynth import cpu
from skinsynth.errors import UserError
from skinsynth.knobs import Classify
from skinsynth.models import attention, hub

LABELS = {0: "benign", 1: "malignant"}
HALF = (0.5, 0.5, 0.5)  # ViT's own mean and deviation
BLOCK = re.compile(r"((?P<stage>.*?\.(?:stages|layers?|blocks?)\.\d+)(?P<inner>\.(?:layers?|blocks?)\.\d+)?)\.")  # by a parameter's name


@cpu.importing()
def build(cfg: Classify, size: int, seed: int, kind: str = "sdpa") -> Any:
    """A ``ForImageClassification`` model with two classes, float32; ``size``: side of the shards' images in pixels; ``kind``: its attention.

    Dropout and stochastic depth are off: their randomness would belong to the rank and not to the sample.

    Raises:
        UserError: the model is not to be had locally, is of a kind that cannot be trained here, or the patches do not fit the image.
    """
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)  # the new head, and all of the small ViT
    names = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    if cfg.model != "small":
        model = _pretrained(cfg, names)
        _freeze_unused(cfg, model, Inputs.of(cfg, model, size).side)
        attention.apply_to_classifier(model, kind)  # last: xformers runs on no CPU, where the model is still
        return model
    side = cfg.image_size or size
    if side % cfg.patch:
        raise UserError(f"classify.patch={cfg.patch} does not divide the image side of {side} pixels")
    model = ViTForImageClassification(ViTConfig(
        image_size=side, patch_size=cfg.patch, hidden_size=cfg.hidden_size, intermediate_size=4 * cfg.hidden_size,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, **names))
    attention.apply_to_classifier(model, kind)
    return model


def _pretrained(cfg: Classify, names: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        wanted = AutoConfig.from_pretrained(cfg.model, local_files_only=True, num_labels=2, **names)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if hasattr(wanted, name):
                setattr(wanted, name, 0.0)
        model = AutoModelForImageClassification.from_pretrained(cfg.model, config=wanted, ignore_mismatched_sizes=True, local_files_only=True,
                                                                use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        where = "" if Path(cfg.model).exists() else f"; where there is internet, run: skinsynth pull CONFIG (or: hf download {cfg.model})"
        raise UserError(f"classify.model={cfg.model} cannot be loaded: {str(error).splitlines()[0]}{where}") from None
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(f"classify.model={cfg.model} has batch normalization, whose statistics would depend on the number of ranks: take a ViT, "
                        "DeiT, Swin or ConvNeXt")
    if cfg.image_size and wanted.model_type in ("vit", "deit") and cfg.image_size != wanted.image_size:
        raise UserError(f"classify.image_size={cfg.image_size}: {cfg.model} takes images of {wanted.image_size} pixels; leave the key out")
    return model


def _freeze_unused(cfg: Classify, model: Any, side: int) -> None:
    """What has no part in the answer (DINOv2's mask token, a pooling head that is passed over) gets no gradient, for which data parallelism would
    wait, and no state of the optimizer, which a checkpoint would look for."""
    try:
        model(pixel_values=torch.zeros(1, 3, side, side)).logits.sum().backward()
    except (ValueError, RuntimeError) as error:  # CLIP names the side that it takes, others the shapes that do not fit
        if "allocate memory" in str(error):
            raise
        advice = f"leave classify.image_size={cfg.image_size} out" if cfg.image_size else "set classify.image_size to its own side"
        raise UserError(f"classify.model={cfg.model} cannot be given images of {side} pixels ({str(error).splitlines()[0]}): {advice}") from None
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)


def _own_side(config: Any) -> int | None:
    """The side of the images that the pretrained model takes, in pixels; CLIP and SigLIP have it one level down, Hiera for height and width."""
    for one in (config, getattr(config, "vision_config", None)):
        own = getattr(one, "image_size", None)
        own = own[0] if isinstance(own, list | tuple) and own else own
        if isinstance(own, int):
            return own
    return None


@dataclass(frozen=True)
class Inputs:
    """What a classifier wants to see: square images of ``side`` pixels, scaled to 0..1, less ``mean``, over ``std`` (of red, green, blue)."""

    side: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    @classmethod
    def of(cls, cfg: Classify, model: Any, size: int) -> Inputs:
        """The pretrained model's own, from its ``preprocessor_config.json`` where there is one; ``size``: side of the shards' images."""
        side = cfg.image_size or _own_side(model.config) or size
        folder = hub.resolve_classifier(cfg.model)
        path = folder / "preprocessor_config.json" if folder else None
        if path is None or not path.is_file():
            return cls(side)
        found = json.loads(path.read_text())
        if not found.get("do_normalize", True):
            return cls(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return cls(side, tuple(found.get("image_mean", HALF)), tuple(found.get("image_std", HALF)))

    def write(self, folder: Path) -> None:
        """``preprocessor_config.json`` beside exported weights, for ``AutoImageProcessor``."""
        (folder / "preprocessor_config.json").write_text(json.dumps({
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": self.side, "width": self.side}, "resample": 2,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": self.mean, "image_std": self.std}, indent=1) + "\n")


def logits(model: Any, images: torch.Tensor, side: int, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> torch.Tensor:
    """uint8 (n, 3, height, width) -> float32 (n, 2). Normalising and resizing run on the device."""
    if set(mean + std) == {0.5}:
        pixels = images.float() / 127.5 - 1
    else:
        pixels = (images.float() / 255 - _per_channel(mean, images.device)) / _per_channel(std, images.device)
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return model(pixel_values=pixels.to(next(model.parameters()).dtype)).logits.float()


@lru_cache(8)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(1, 3, 1, 1), brought to the device once: doing so makes the host wait for all that the device has to do."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def views(images: torch.Tensor, count: int) -> list[torch.Tensor]:
    """(n, 3, side, side) -> itself, or with ``count`` 8 its four turns and their mirror images."""
    if count == 1:
        return [images]
    turned = [images.rot90(number, (2, 3)) for number in range(4)]
    return [view for turn in turned for view in (turn, turn.flip(3))]


def rate_scales(model: Any, decay: float) -> dict[str, float]:
    """Parameter -> its share of the learning rate: 1 for the head and the last norm, ``decay`` less for each block below, the embeddings least
    (Clark et al. 2020). Blocks come in the order in which the model has them; what lies between two stages counts with the block beside it.

    Raises:
        UserError: the model has no blocks that are known by their names, so all of it would have one rate.
    """
    found = {name: BLOCK.match(name) for name, _ in model.named_parameters()}
    stages = {match["stage"] for match in found.values() if match and match["inner"]}
    blocks = list(dict.fromkeys(match[1] for match in found.values() if match and (match["inner"] or match["stage"] not in stages)))
    if not blocks:
        raise UserError(f"classify.layer_decay={decay}: {model.config.model_type} has no layers, blocks or stages by name: leave it out")
    result, below = {}, -1  # the block that was met last
    for name, match in found.items():
        if match is None:
            depth = 0 if below < 0 else len(blocks) + 1
        elif match[1] in blocks:
            depth = (below := blocks.index(match[1])) + 1
        else:
            inside = [number for number, block in enumerate(blocks) if block.startswith(f"{match['stage']}.")]
            before = below < inside[0] or "downsampling" in name  # ConvNeXt's, which comes before the stage's blocks and is named after them
            depth = (inside[0] if before else inside[-1]) + 1
        result[name] = decay ** (len(blocks) + 1 - depth)
    return result
