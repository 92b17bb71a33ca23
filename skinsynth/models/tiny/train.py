"""Trains the built-in base model from nothing: drawings -> tokenizer -> autoencoder -> latents -> UNet and text encoder.

    python -m skinsynth.models.tiny.train runs/tiny --seed 0

The same command again goes on where it stopped; what it keeps for that lies in OUT/.cache. OUT itself is a diffusers folder.
Randomness belongs to the step, so an interrupted training and an uninterrupted one make the same weights.
"""
import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from skinsynth.models.tiny import networks
from skinsynth.models.tiny.pictures import augment, drawings, to_tensor
from skinsynth.models.tiny.tokenizer import build_tokenizer

PLAIN = "a dermoscopy image of a skin lesion"


@dataclass(frozen=True)
class Options:
    """All knobs of the training."""
    out: Path
    seed: int = 0
    drawings: int = 12_000
    vae_steps: int = 1_100
    vae_batch: int = 16
    unet_steps: int = 2_500
    unet_batch: int = 32
    minutes: float = 4.0  # between checkpoints (and between sample sheets)


def train(options: Options) -> StableDiffusionPipeline:
    """Makes or finishes OUT, and returns what it holds (in float32)."""
    cache = options.out / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    images, captions = drawings(options.drawings, options.seed, cache)
    tokenizer = build_tokenizer(captions)
    torch.manual_seed(options.seed)
    vae = train_vae(options, torch.from_numpy(images), cache)
    latents = encode(vae, torch.from_numpy(images), cache / f"latents-{options.seed}-{options.drawings}-{options.vae_steps}.pt")
    return train_unet(options, vae, tokenizer, latents, captions, cache)


def train_vae(options: Options, images: Tensor, cache: Path) -> AutoencoderKL:
    """L1, the difference of neighbouring pixels for sharpness, and a little KL, on augmented drawings."""
    vae = networks.new_vae()

    def loss(step: int) -> Tensor:
        generator = _generator(options.seed, 1, step)
        x = images[torch.randint(len(images), (options.vae_batch,), generator=generator)]
        x = augment(to_tensor(x.numpy()), generator)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        edges = sum((y.diff(dim=dim) - x.diff(dim=dim)).abs().mean() for dim in (2, 3))
        return (y - x).abs().mean() + edges + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", vae, loss, options.vae_steps, 1e-3, options.minutes, cache / "vae.pt", lambda: None)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, path: Path) -> Tensor:
    """Mean and std of every picture's latent and of its mirror image: (count, 2 flips, 8, 16, 16) float16, kept at `path`.

    Sets the VAE's scaling factor, so that scaled latents have a standard deviation of 1.
    """
    if not path.exists():
        parts = []
        for batch in images.split(64):
            x = to_tensor(batch.numpy())
            flips = [vae.encode(view).latent_dist for view in (x, x.flip(3))]
            parts.append(torch.stack([torch.cat([flip.mean, flip.std], 1) for flip in flips], 1).half())
        _save(torch.cat(parts), path)
    latents = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=round(1 / latents[:, :, :4].float().std().item(), 5))
    return latents


def train_unet(options: Options, vae: AutoencoderKL, tokenizer: CLIPTokenizer, latents: Tensor, captions: list[str],
               cache: Path) -> StableDiffusionPipeline:
    """UNet and text encoder together, epsilon prediction; one caption in ten is empty, another one says no more than PLAIN.

    The error of the picture counts with its SNR between 1 and 5 (min-SNR, and truncated below): without the lower end hardly any
    gradient comes from the noisy steps, in which the words decide, and the captions are learnt last.
    """
    text_encoder, unet = networks.new_text_encoder(tokenizer), networks.new_unet()
    nets = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    ids = tokenizer([*captions, PLAIN, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    kept = networks.new_scheduler().alphas_cumprod
    n = options.unet_batch

    def loss(step: int) -> Tensor:
        generator = _generator(options.seed, 2, step)
        which = torch.randint(len(latents), (n,), generator=generator)
        mean, std = latents[which, torch.randint(2, (n,), generator=generator)].float().chunk(2, 1)
        x = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        lot = torch.rand(n, generator=generator)
        words = torch.where(lot < 0.1, len(ids) - 1, torch.where(lot < 0.2, len(ids) - 2, which))
        noise, t = torch.randn(x.shape, generator=generator), torch.randint(1000, (n,), generator=generator)
        alpha = kept[t].view(-1, 1, 1, 1)
        predicted = unet(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, text_encoder(ids[words]).last_hidden_state).sample
        snr = kept[t] / (1 - kept[t])
        return ((predicted - noise).square().mean((1, 2, 3)) * (snr.clamp(1, 5) / snr).clamp(max=10)).mean()

    pipe = networks.pipeline(vae, text_encoder, tokenizer, unet)

    def show() -> None:
        networks.save_half(pipe, options.out)
        sample_sheet(pipe, captions[:32], cache / "samples" / f"{time.strftime('%H%M')}.png", options.seed)

    fit("unet", nets, loss, options.unet_steps, 4e-4, options.minutes, cache / "unet.pt", show)
    show()
    return pipe


def fit(name: str, model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float, minutes: float, path: Path,
        show: Callable[[], None]) -> None:
    """AdamW with warm-up and cosine, and a moving average of the weights, which `model` has at the end and during `show`.

    Every few minutes: `show`, and a checkpoint at `path`, from which the next call goes on.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, rate), betas=(0.9, 0.99), weight_decay=0.01)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    first = _restore(path, model, optimizer, average)
    begun = paused = told = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _follow(average, model, min(0.999, (1 + step) / (10 + step)))
        now = time.monotonic()
        if now - told > 15 or step + 1 == steps:
            left = (now - begun) / (step + 1 - first) * (steps - step - 1)
            print(f"{time.strftime('%H:%M:%S')} {name} step {step + 1}/{steps} loss {value.item():.4f} {left / 60:.1f} min left",
                  flush=True)
            told = now
        due = now - paused > 60 * minutes
        if due or step + 1 == steps:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            _save(state, path)
        if due:
            with_average(model, average, show)
            paused = time.monotonic()
    model.load_state_dict(average)
    model.eval().requires_grad_(False)


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """What reads the words learns three times as fast: its gradients are faint."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(rate * (3 if "text_encoder" in name or "attn2" in name else 1), []).append(parameter)
    return [{"params": parameters, "lr": peak, "peak": peak} for peak, parameters in groups.items()]


def learning_rate(step: int, steps: int) -> float:
    """Its share of the peak: linear up over a twentieth of the steps, then half a cosine down to nothing."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


def with_average(model: nn.Module, average: dict[str, Tensor], show: Callable[[], None]) -> None:
    """Calls `show` while the model has its averaged weights."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    show()
    model.load_state_dict(kept)
    model.train()


def sample_sheet(pipe: StableDiffusionPipeline, prompts: list[str], path: Path, seed: int, columns: int = 8) -> None:
    """One picture a prompt, in rows, as a PNG."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipe(prompts, num_inference_steps=20, guidance_scale=2.5, generator=generator).images
    size = images[0].width
    sheet = Image.new("RGB", (columns * size, math.ceil(len(images) / columns) * size))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * size, number // columns * size))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _generator(seed: int, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 10 + stage) * 10_000_000 + step)


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    state = model.state_dict()
    floating = [key for key, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in floating], [state[key] for key in floating], 1 - decay)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    """The number of steps that are done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.update(state["average"])
    return int(state["step"])


def _save(content: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="skinsynth.models.tiny.train", description="Train the built-in base model.")
    parser.add_argument("out", type=Path)
    for field in fields(Options)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
