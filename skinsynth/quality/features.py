"""Feature spaces for distances between sets of images; which one, ``screen.features`` says.

``vae``: the encoder of the base model's VAE, there in every run. A transformers folder or hub id: a published vision model (DINO, DINOv2, CLIP,
ViT, Swin, ConvNeXt), with its own size, mean and deviation. ``classifier``: the run's own, trained on real images only. A file with the weights of
the field's FID: that Inception (``models.inception``).

Distances in one space say nothing about another, so its name goes beside every number, and a reader judges them against the distance between two
sets of real images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skinsynth.data.withdrawn import withdrawn_keys
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, sha256_folder, sha256_of
from skinsynth.knobs import Config, Model
from skinsynth.models import hub, inception
from skinsynth.models.diffusion import at_once, base_sha256, load_vae
from skinsynth.run import RunDir

PROCESSOR = "preprocessor_config.json"
MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers of the ways to resize, as processors' files have them
UNCROPPED = 384  # pixels from which on ConvNeXt's processors leave crop_pct alone


class Extractor:
    """uint8 (n, height, width, 3) -> float32 (n, d). Images always pass ``batch`` at a time, the last batch filled up, so a feature does not
    depend on its neighbours or on how the work was cut."""

    def __init__(self, batch: int, device: Any = "cpu"):
        self.batch, self.device = batch, device

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 (batch, 3, height, width), 0..1 -> (batch, d)."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(images), self.batch):
            part = images[start:start + self.batch]
            full = np.concatenate([part, np.repeat(part[:1], self.batch - len(part), axis=0)])
            pixels = torch.from_numpy(full).to(self.device).permute(0, 3, 1, 2).float() / 255
            found.append(self._features(pixels)[:len(part)].float().cpu().numpy())
        return np.concatenate(found)


class VaeFeatures(Extractor):
    """Mean and standard deviation over the picture of each channel, at every level of the VAE's encoder."""

    def __init__(self, model: Model, batch: int, device: Any = "cpu"):
        """Raises ``UserError`` where there is no VAE that can be loaded."""
        super().__init__(batch, device)
        self.encoder = load_vae(model).encoder.float().to(device).eval()
        self.pooled: list[torch.Tensor] = []
        for level in (self.encoder.conv_in, *self.encoder.down_blocks, self.encoder.mid_block):
            level.register_forward_hook(self._pool)

    def _pool(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        std, mean = torch.std_mean(output.float(), dim=(2, 3), correction=0)
        self.pooled += [mean, std]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._encoded(part) for part in pixels.split(at_once(*pixels.shape[2:]))])

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pooled.clear()
        self.encoder(pixels * 2 - 1)
        return torch.cat(self.pooled, 1)


@dataclass(frozen=True)
class Processing:
    """What a vision model wants done to its pictures: the short side brought to ``resize``, the middle ``crop`` of it, mean and deviation.
    ``crop_pct`` in its file: the share of the side that the crop is."""

    resize: int
    crop: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    mode: str = "bilinear"

    @classmethod
    def read(cls, path: Path) -> Processing:
        """From a ``preprocessor_config.json``.

        Raises:
            UserError: no such file, or without a size.
        """
        if not path.is_file():
            raise UserError(f"{path} is missing: it says which size, mean and deviation the network of screen.features wants; fetch the whole model")
        found = json.loads(path.read_text())
        resize = _side(found.get("size")) if found.get("do_resize", True) else None
        crop = _side(found.get("crop_size")) if found.get("do_center_crop") else None
        share, kind = found.get("crop_pct"), found.get("image_processor_type") or found.get("feature_extractor_type") or ""
        if share and resize and (resize < UNCROPPED or not kind.startswith("ConvNext")):
            resize, crop = int(resize / share), crop or resize
        if not (resize or crop):
            raise UserError(f"{path} gives no size that is known (expected size: a number, height and width, or shortest_edge)")
        normal = found.get("do_normalize", True)
        mean, std = (found.get("image_mean"), found.get("image_std")) if normal else ((0,) * 3, (1,) * 3)
        mode = MODES.get(found.get("resample", 2), "bilinear")
        return cls(resize or crop or 0, crop or resize or 0, tuple(mean or cls.mean), tuple(std or cls.std), mode)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 (n, 3, side, side), 0..1 -> (n, 3, crop, crop). The images here are square."""
        if pixels.shape[-1] != self.resize:
            pixels = F.interpolate(pixels, size=(self.resize, self.resize), mode=self.mode, antialias=self.mode != "nearest").clamp(0, 1)
        edge = (self.resize - self.crop) // 2
        pixels = pixels[..., edge:edge + self.crop, edge:edge + self.crop]
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        return size.get("shortest_edge") or size.get("height")
    return size


class NetworkFeatures(Extractor):
    """The class token of a transformers vision model where it has one, else what it pools to (CLIP's own, normalised class embedding)."""

    def __init__(self, folder: Path, processing: Processing | None, batch: int, device: Any = "cpu"):
        """``processing`` None: as the model's own file says.

        Raises:
            UserError: not a vision model, or not complete.
        """
        super().__init__(batch, device)
        self.processing = processing or Processing.read(folder / PROCESSOR)
        self.model = _load(folder).float().to(device).eval()
        self.has_token = any(name.endswith("cls_token") for name, _ in self.model.named_parameters())

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.model(pixel_values=self.processing(pixels))
        pooled = found.last_hidden_state[:, 0] if self.has_token else found.pooler_output
        return pooled.flatten(1)  # some pool to (n, d, 1, 1)


class InceptionFeatures(Extractor):
    """The pooled features of the Inception that the field's FID is taken with."""

    def __init__(self, path: Path, batch: int, device: Any = "cpu"):
        """Raises ``UserError`` where the file is not that network's weights."""
        super().__init__(batch, device)
        self.model = inception.Inception(inception.read(path), device)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)


def _load(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModel, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a classifier's head and an unused pooler are told of as if something were wrong
    try:
        kind = CLIPVisionModel if AutoConfig.from_pretrained(folder, local_files_only=True).model_type.startswith("clip") else AutoModel
        model, told = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"screen.features: the network in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    finally:
        logging.set_verbosity(before)
    missing = sorted(name for name in told["missing_keys"] if "pooler" not in name)
    if missing or getattr(model, "main_input_name", "") != "pixel_values":
        why = f"lacks weights that its configuration asks for ({', '.join(missing[:3])})" if missing else "is no model of images"
        raise UserError(f"screen.features: {folder} {why}: take a transformers vision model such as facebook/dinov2-base")
    return model


# ---- which one ----

def own_classifier(cfg: Config, run: RunDir) -> Path:
    """The weights of the first arm that is trained on real images only, of its first seed.

    Raises:
        UserError: there is no such arm, or it is not trained yet.
    """
    arm = cfg.real_arm
    if arm is None:
        raise UserError("screen.features=classifier needs an arm of real images only, such as classify.arms.baseline={sources: {real: 1}}")
    folder = run.seed(arm, cfg.arm_seeds[0]) / "weights"
    if not (folder / "config.json").is_file():
        raise UserError(f"screen.features=classifier: {folder} is not there yet; train that arm first (python -m jobs.classify {run.path} "
                        f"--arm {arm}), then screen, or take another screen.features")
    withdrawn_keys(folder)
    return folder


def space_name(cfg: Config) -> str:
    """``builtin-vae``, ``<model>-vae``, ``classifier``, ``inception-fid``, or the model's name; of a folder its last part only."""
    wanted = cfg.screen.features
    if wanted.endswith(hub.TENSORS):
        return "inception-fid"
    return f"{Path(cfg.model.base).name}-vae" if wanted == "vae" else Path(wanted).name


def make(cfg: Config, run: RunDir, device: Any = "cpu") -> Extractor:
    """The extractor of a configuration.

    Raises:
        UserError: it is not to be had on this machine, or cannot be loaded.
    """
    wanted, batch = cfg.screen.features, cfg.screen.batch
    if wanted == "vae":
        return VaeFeatures(cfg.model, batch, device)
    if wanted == "classifier":
        folder = own_classifier(cfg, run)
        if (folder / PROCESSOR).is_file():
            return NetworkFeatures(folder, None, batch, device)
        side = json.loads((folder / "config.json").read_text()).get("image_size") or cfg.prepare.size
        return NetworkFeatures(folder, Processing(side, side), batch, device)  # exported without it: trained on -1..1 (models.vit)
    place = hub.resolve_features(wanted)
    return InceptionFeatures(place, batch, device) if place.is_file() else NetworkFeatures(place, None, batch, device)


def network_sha256(cfg: Config, run: RunDir) -> str:
    """A hash of the network that ``make`` gives, with its configuration: features of another one are not to be taken for its own.

    Raises:
        UserError: as ``make`` where it is not to be had.
    """
    if cfg.screen.features == "vae":
        base = hub.find_base(cfg.model).weights
        return sha256_folder(base / "vae", "*") if base.is_dir() else base_sha256(cfg.model)
    place = own_classifier(cfg, run) if cfg.screen.features == "classifier" else hub.resolve_features(cfg.screen.features)
    if place.is_file():
        return sha256_file(place)
    cropped = ["crop_pct"] * ("crop_pct" in (read_json(place / PROCESSOR) or {}))  # earlier versions passed over it: their features are others
    return sha256_of([*(sha256_folder(place, pattern) for pattern in ("config.json", PROCESSOR, "*.safetensors")), *cropped])


def evens_out(cfg: Config) -> bool:
    """Whether distances are taken after every feature was brought to one scale: those of a VAE's channels mean nothing, while the published
    figures of the other networks are of their plain features."""
    return cfg.screen.features == "vae"
