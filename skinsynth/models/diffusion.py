"""Stable Diffusion: find it, load it, encode with it, its training loss, sampling from it. All through diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skinsynth.errors import UserError
from skinsynth.models import hub
from skinsynth.run import sha256_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(folder: Path, precision: str = "fp32") -> Any:
    """A ``StableDiffusionPipeline`` in eval mode, without safety checker (it is trained on web photographs, not on skin)."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=DTYPES[precision], safety_checker=None, feature_extractor=None,
                                                       requires_safety_checker=False, local_files_only=True, use_safetensors=True,
                                                       variant=hub.variant(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base model {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights_sha256(folder: Path) -> str:
    """One hash over all files of a diffusers folder but its lineage, which says when and by what it was made."""
    return sha256_folder(folder, "*/*")


def latent_shape(pipe: Any, size: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a square image of ``size`` pixels.

    Raises:
        UserError: the side is no multiple of what the model needs.
    """
    step = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if size % step:
        raise UserError(f"prepare.size={size} does not fit the base model: it must be a multiple of {step}")
    return pipe.unet.config.in_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor


def padded(items: Sequence[Any], size: int) -> Iterator[tuple[list[Any], int]]:
    """Batches of exactly ``size`` (the last one filled up with its own first item) and how many of each are real.

    The batch shape decides the last bits of a result, so it must not depend on how the work was cut.
    """
    for start in range(0, len(items), size):
        batch = list(items[start:start + size])
        yield batch + [batch[0]] * (size - len(batch)), len(batch)


@torch.inference_mode()
def encode_images(vae: Any, images: np.ndarray) -> np.ndarray:
    """uint8 (n, height, width, 3) -> float32 (n, 2, channels, h, w): mean and standard deviation of the VAE's posterior, unscaled."""
    pixels = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist
    return torch.stack([posterior.mean, posterior.std], 1).float().cpu().numpy()


@torch.no_grad()
def draw_latents(vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """uint8 (n, height, width, 3) and normal numbers (n, c, h, w) -> scaled latents, as drawn from the cached moments."""
    posterior = vae.encode(pixels.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1).latent_dist
    return (posterior.mean + posterior.std * draw) * vae.config.scaling_factor


@torch.inference_mode()
def encode_prompts(pipe: Any, prompts: list[str]) -> torch.Tensor:
    """float32 (n, tokens, width): the text encoder's last hidden state, as the pipeline itself would make it. One prompt at a time,
    so that a prompt's embedding does not depend on its neighbours."""
    found = [pipe.encode_prompt(p, pipe.device, 1, do_classifier_free_guidance=False)[0] for p in prompts]
    return torch.cat(found).float().cpu()


def diffusion_loss(model: Any, scheduler: Any, batch: dict[str, torch.Tensor], snr_gamma: float | None = None,
                   snr_floor: float = 0.0) -> torch.Tensor:
    """The weighted denoising loss of one batch, a scalar (Ho et al. 2020).

    ``snr_gamma`` caps the weight of a clean image's error (min-SNR, Hang et al. 2023), ``snr_floor`` keeps it from vanishing where
    there is nearly only noise (truncated SNR, Salimans and Ho 2022), where a picture's colours and shape are decided.

    ``model(noisy, timestep, batch)`` is a ``Denoiser``. ``batch``: latents, noise float32 (n, c, h, w); timestep int64 (n,); weight
    float32 (n,); and what the model is conditioned on.
    """
    noisy = scheduler.add_noise(batch["latents"], batch["noise"], batch["timestep"])
    predicted = model(noisy, batch["timestep"], batch)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timestep"]) if v_prediction else batch["noise"]
    per_sample = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    weight = batch["weight"]
    if snr_gamma is not None:
        alpha = scheduler.alphas_cumprod.to(noisy.device)[batch["timestep"]]
        snr = alpha / (1 - alpha)
        factor = snr.clamp(snr_floor, snr_gamma) / (snr + 1 if v_prediction else snr)
        weight = weight * factor.clamp(max=10)  # the last timesteps, nothing but noise, must not drown the others
    return (per_sample * weight).mean()


def set_scheduler(pipe: Any, name: str) -> None:
    """The sampler by its configured name, with the model's own noise schedule."""
    import diffusers

    kinds = {"dpmsolver++": diffusers.DPMSolverMultistepScheduler, "ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    pipe.scheduler = kinds[name].from_config(pipe.scheduler.config)


@torch.inference_mode()
def sample(pipe: Any, text: torch.Tensor, negative: torch.Tensor, noise: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Draws images: text (n, tokens, width), negative (1, tokens, width), noise float32 (n, c, h, w) -> uint8 (n, height, width, 3)."""
    place = {"device": pipe.device, "dtype": pipe.unet.dtype}
    images = pipe(prompt_embeds=text.to(**place), negative_prompt_embeds=negative.expand(len(text), -1, -1).to(**place),
                  latents=torch.from_numpy(noise).to(**place), num_inference_steps=steps, guidance_scale=guidance, output_type="np",
                  height=noise.shape[-2] * pipe.vae_scale_factor, width=noise.shape[-1] * pipe.vae_scale_factor).images
    return (images * 255).round().astype(np.uint8)


def read_lineage(folder: Path) -> dict[str, Any]:
    """What the weights descend from, as ``finetune`` wrote it beside them."""
    path = folder / "lineage.json"
    if not path.is_file():
        raise UserError(f"{folder} has no lineage.json: it was not made by skinsynth finetune")
    return json.loads(path.read_text())
