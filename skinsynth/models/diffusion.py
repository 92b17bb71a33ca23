"""Stable Diffusion: find it, load it, encode with it, its training loss, sampling from it. All through diffusers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from skinsynth import cpu
from skinsynth.data.withdrawn import withdrawn_keys
from skinsynth.errors import UserError
from skinsynth.files import sha256_file, sha256_files, sha256_folder
from skinsynth.knobs import Model
from skinsynth.models import hub

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LACKS = "base model {} lacks weights that its configuration asks for: take a whole checkpoint, and a model.config of the same kind"


def load_base(model: Model, precision: str = "fp32") -> Any:
    """The base model of a configuration, as ``load_pipeline``; also from one ``.safetensors`` file (LDM layout).

    Raises:
        UserError: as ``hub.find_base``, or what was found cannot be loaded.
    """
    base = hub.find_base(model)
    pipe = load_pipeline(base.weights, precision) if base.weights.is_dir() else _from_one_file(base, precision)
    if model.lora:
        merge_lora(pipe, Path(model.lora), model.lora_scale)
    return pipe


def _from_one_file(base: hub.Base, precision: str) -> Any:
    pipe = _load(base.config, base.weights, lambda kind, extras: kind.from_single_file(
        str(base.weights), config=str(base.config), dtype=DTYPES[precision], local_files_only=True, **extras))
    text = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    if any(value.is_meta for part in text for value in part.parameters()):  # of these, diffusers leaves what the file lacks without a value
        raise UserError(LACKS.format(base.weights))
    return pipe


def merge_lora(pipe: Any, path: Path, scale: float) -> None:
    """Adds a LoRA file (or folder with one) to the weights of a pipeline, for good.

    Raises:
        UserError: no such file, or it was made for a base of another shape.
    """
    file = hub.lora_file(path)
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True)
    except (IndexError, KeyError):  # of what diffusers looks for in vain where a text encoder's layers are not the base's
        raise UserError(f"LoRA {path} does not fit the base model: it has layers that the base has not; take one that was made for this kind of "
                        "base") from None
    except (OSError, ValueError) as error:
        raise UserError(f"LoRA {path} cannot be loaded: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:  # torch's "size mismatch for ..."
        line = next((row.strip() for row in str(error).splitlines() if "size mismatch" in row), str(error).splitlines()[0])
        raise UserError(f"LoRA {path} does not fit the base model, which has another shape: {line}") from None
    _check_taken(pipe, file, path)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()


def _check_taken(pipe: Any, file: Path, path: Path) -> None:
    """diffusers passes over what it finds no place for, with a warning at most.

    Raises:
        UserError: some of the file's layers are none of the base's, or all.
    """
    with safe_open(file, "pt") as found:
        names = [name for name in found.keys() if re.search(r"lora_A|lora_down|lora\.down", name)]  # noqa: SIM118 (it is no dict)
    parts = [pipe.components[name] for name in ("unet", "text_encoder", "text_encoder_2") if pipe.components.get(name) is not None]
    taken = sum(".lora_A." in name for part in parts for name, _ in part.named_parameters())
    if taken < max(1, len(names)):
        raise UserError(f"LoRA {path} does not fit the base model: {taken} of its {len(names)} layers have a place there (the first is "
                        f"{min(names, default='none')}); take one that was made for this kind of base, in the names of diffusers or kohya")


@cpu.importing()
def load_vae(model: Model) -> Any:
    """The base model's VAE alone, float32. Raises as ``load_base``."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    base = hub.find_base(model)
    try:
        if base.weights.is_dir():
            return AutoencoderKL.from_pretrained(base.weights, subfolder="vae", local_files_only=True, use_safetensors=True,
                                                 variant=hub.variant(base.weights, "vae"))
        return AutoencoderKL.from_single_file(str(base.weights), config=str(base.config), subfolder="vae", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise UserError(f"the VAE in {base.weights} cannot be loaded: {str(error).splitlines()[0]}") from None


def load_pipeline(folder: Path, precision: str = "fp32") -> Any:
    """A ``StableDiffusionPipeline`` (or XL) from a diffusers folder, in eval mode, without safety checker (it is trained on web
    photographs, not on skin)."""
    return _load(folder, folder, lambda kind, extras: kind.from_pretrained(
        folder, dtype=DTYPES[precision], local_files_only=True, use_safetensors=True, variant=hub.variant(folder), **extras))


@cpu.importing()
def _load(config: Path, weights: Path, load: Callable[[Any, dict[str, Any]], Any]) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    name = hub.pipeline_name(config)
    extras: dict[str, Any] = {"add_watermarker": False} if "XL" in name else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = load(getattr(diffusers, name), {"feature_extractor": None, **extras})
    except NotImplementedError:  # from torch, on a weight without a value
        raise UserError(LACKS.format(weights)) from None
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise UserError(f"base model {weights} cannot be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe, pipe.unet, pipe.vae):  # where the base lay on this machine must not be in the weights made from it, nor in their hash
        part.register_to_config(_name_or_path="")
    return pipe


def weights_sha256(path: Path) -> str:
    """One hash over all files of a diffusers folder but its lineage, which says when and by what it was made; or over one file."""
    return sha256_folder(path, "*/*") if path.is_dir() else sha256_file(path)


def base_sha256(model: Model) -> str:
    """The hash of the base model of a configuration; of one file together with the configurations that it is loaded with, and of what is
    merged into it with that."""
    own = _base_sha256(hub.find_base(model))
    if not model.lora:
        return own
    return hashlib.sha256(f"{own} {weights_sha256(hub.lora_file(Path(model.lora)))} {model.lora_scale}".encode()).hexdigest()


def _base_sha256(base: hub.Base) -> str:
    if base.weights.is_dir():
        return sha256_files(base.weights, hub.read_files(base.weights))
    small = sorted(p for part in hub.PIPELINES[base.pipeline] for p in (base.config / part).iterdir() if p.suffix in (".json", ".txt"))
    lines = [f"{p.relative_to(base.config)} {sha256_file(p)}\n" for p in small]
    return hashlib.sha256("".join([f"{sha256_file(base.weights)}\n", *lines]).encode()).hexdigest()


def latent_shape(pipe: Any, size: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a square image of ``size`` pixels.

    Raises:
        UserError: the side is no multiple of what the model needs.
    """
    hub.check_size(size, *(len(getattr(pipe, part).config.block_out_channels) for part in hub.LEVELS))
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
    found = [vae.encode(part).latent_dist for part in pixels.split(at_once(*images.shape[1:3]))]
    return torch.cat([torch.stack([posterior.mean, posterior.std], 1) for posterior in found]).float().cpu().numpy()


def at_once(height: int, width: int, pixels: int = 2**21) -> int:
    """How many images of a batch go through a VAE's encoder together: its first layers hold 128 numbers a pixel, several times over. A
    function of their size alone, since the batch shape decides the last bits of a result."""
    return max(1, pixels // (height * width))  # 64 px: 512; 512 px: 8; 1,024 px: 2


@torch.no_grad()
def draw_latents(vae: Any, pixels: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """uint8 (n, height, width, 3) and normal numbers (n, c, h, w) -> scaled latents, as drawn from the cached moments."""
    pixels, some = pixels.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1, at_once(*pixels.shape[1:3])
    found = [vae.encode(part).latent_dist for part in pixels.split(some)]
    drawn = [posterior.mean + posterior.std * part for posterior, part in zip(found, draw.split(some), strict=True)]
    return torch.cat(drawn) * vae.config.scaling_factor


@torch.inference_mode()
def encode_prompts(pipe: Any, prompts: list[str], size: int) -> dict[str, torch.Tensor]:
    """What the UNet must be told, by name; the first dimension of each tensor counts the prompts, all are float32 on the CPU.

    ``text`` (n, tokens, width): the last hidden states, as the pipeline itself would make them. SDXL also takes ``pooled``
    (n, width of the second encoder) and ``time_ids`` (n, 6), which say that an image of ``size`` pixels is drawn uncut. One prompt at a
    time, so that a prompt's embedding does not depend on its neighbours.
    """
    device = pipe.text_encoder.device
    if not is_xl(pipe):
        text = [pipe.encode_prompt(p, device, 1, do_classifier_free_guidance=False)[0] for p in prompts]
        return {"text": torch.cat(text).float().cpu()}
    found = []
    for prompt in prompts:
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        found.append((hidden * _known(pipe, prompt), pooled * _known(pipe, prompt)))
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)  # the image's own size, its crop, the size wanted
    return {"text": torch.cat([f[0] for f in found]).float().cpu(), "pooled": torch.cat([f[1] for f in found]).float().cpu(),
            "time_ids": time_ids.repeat(len(prompts), 1)}


def _known(pipe: Any, prompt: str) -> float:
    """0 for a prompt whose embedding is to be zeros, which is what SDXL was trained with."""
    return 0.0 if prompt == "" and pipe.config.force_zeros_for_empty_prompt else 1.0


def tokens(pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What a text encoder that trains is told, as ``denoiser.Denoiser`` wants it: one row a prompt."""
    def of(tokenizer: Any) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids

    if not is_xl(pipe):
        return {"tokens": of(pipe.tokenizer)}
    return {"tokens": of(pipe.tokenizer), "tokens_2": of(pipe.tokenizer_2), "known": torch.tensor([_known(pipe, prompt) for prompt in prompts])}


def is_xl(pipe: Any) -> bool:
    """Whether the UNet wants a pooled embedding and sizes beside the text."""
    return pipe.unet.config.addition_embed_type == "text_time"


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
        snr = (alpha / (1 - alpha)).clamp(min=1e-8)  # 0 where the schedule ends in pure noise
        factor = snr.clamp(snr_floor, snr_gamma) / (snr + 1 if v_prediction else snr)
        weight = weight * factor.clamp(max=10)  # the last timesteps, nothing but noise, must not drown the others
    return (per_sample * weight).mean()


def set_scheduler(pipe: Any, name: str) -> None:
    """The sampler by its configured name, with the model's own noise schedule."""
    import diffusers

    kinds = {"dpmsolver++": diffusers.DPMSolverMultistepScheduler, "ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    pipe.scheduler = kinds[name].from_config(pipe.scheduler.config)


@torch.inference_mode()
def sample(pipe: Any, prompts: dict[str, torch.Tensor], negative: dict[str, torch.Tensor], noise: np.ndarray, steps: int,
           guidance: float) -> np.ndarray:
    """Draws images: noise float32 (n, c, h, w) -> uint8 (n, height, width, 3). ``prompts`` and ``negative`` as ``encode_prompts`` gives
    them, for n prompts or for one that all images share."""
    told = {**conditions(pipe, prompts, len(noise)), **conditions(pipe, negative, len(noise), "negative_")}
    latents = denoise(pipe, told, steps, guidance, latents=torch.from_numpy(noise).to(pipe.device, pipe.unet.dtype),
                      height=noise.shape[-2] * pipe.vae_scale_factor, width=noise.shape[-1] * pipe.vae_scale_factor)
    return decode_latents(pipe.vae, latents).cpu().numpy()


def conditions(pipe: Any, values: dict[str, torch.Tensor], count: int, kind: str = "") -> dict[str, torch.Tensor]:
    """What ``encode_prompts`` gave, as a pipeline takes it: for ``count`` images, on its device. ``kind``: "" or "negative_"."""
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}  # time_ids: the pipeline makes them of height and width
    return {f"{kind}{names[name]}": values[name].expand(count, *values[name].shape[1:]).to(pipe.device, pipe.unet.dtype)
            for name in names if name in values}


@torch.inference_mode()
def denoise(pipe: Any, told: dict[str, torch.Tensor], steps: int, guidance: float, **start: Any) -> torch.Tensor:
    """The final latents (n, c, h, w) of a pipeline, on its device. ``start``: what it begins with (noise, or images)."""
    return pipe(**told, **start, num_inference_steps=steps, guidance_scale=guidance, output_type="latent").images


@torch.inference_mode()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) -> uint8 (n, height, width, 3) on the same device, some at a time: a whole batch of large images needs more memory
    than all of the denoising. Nothing here waits for the device."""
    if vae.dtype == torch.float16 and vae.config.force_upcast:  # SDXL's overflows in half precision, which image pipelines bring it back to
        vae.float()
    some = at_once(latents.shape[-2] * 8, latents.shape[-1] * 8, pixels=2**18)  # 64 px: 64; 512 px: 1
    parts = [vae.decode(part.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0] for part in latents.split(some)]
    pixels = ((torch.cat(parts).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def read_lineage(folder: Path) -> dict[str, Any]:
    """What the weights descend from, as ``finetune`` wrote it beside them. Raises ``UserError`` where they are withdrawn."""
    withdrawn_keys(folder)
    path = folder / "lineage.json"
    if not path.is_file():
        raise UserError(f"{folder} has no lineage.json: it was not made by skinsynth finetune")
    return json.loads(path.read_text())
