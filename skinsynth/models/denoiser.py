"""What fine-tuning trains: a pipeline's UNet, with its text encoder or without, whole or through LoRA adapters; and its way back
into a diffusers folder.

The names of the trained parameters (``unet.down_blocks...``) are those of the wrapped models, so that they fit a fresh pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D

from skinsynth.knobs import Finetune
from skinsynth.models import attention, diffusion

# The projections of the attention layers, as in diffusers' own LoRA scripts (Hu et al. 2022)
UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Denoiser(torch.nn.Module):
    """One module for the engine. ``batch`` has what ``diffusion.encode_prompts`` gives; or, where the text encoder trains, ``tokens`` int64
    (n, tokens), and with SDXL's two ``tokens_2`` beside it, ``time_ids``, and ``known`` float32 (n,), zero where the prompt counts as none."""

    def __init__(self, unet: Any, text_encoder: Any = None, text_encoder_2: Any = None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def train(self, mode: bool = True) -> Denoiser:
        """In training mode diffusers' residual blocks copy their input out of channels-last and back, for DDP's sake, whose warning does not come
        here: the weights lie channels-last too. They do nothing else in that mode, unless there is dropout."""
        super().train(mode)
        for block in self.unet.modules():
            if isinstance(block, ResnetBlock2D) and not block.dropout.p:
                block.training = False
        return self

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 (n, c, h, w): the predicted noise or velocity."""
        told = self._told(batch)
        dtype = self.unet.dtype  # DeepSpeed's bf16 and fp16 are the weights' own, without autocast
        more = {"added_cond_kwargs": {"text_embeds": told["pooled"].to(dtype), "time_ids": told["time_ids"]}} if "pooled" in told else {}
        noisy = noisy.to(dtype, memory_format=torch.channels_last)  # convolutions are faster so
        return self.unet(noisy, timestep, encoder_hidden_states=told["text"].to(dtype), return_dict=False, **more)[0]

    def _told(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As ``diffusion.encode_prompts``; SDXL's from the last layer but one of both encoders."""
        if self.text_encoder is None:
            return batch
        if self.text_encoder_2 is None:
            return {"text": self.text_encoder(batch["tokens"])[0]}
        one = self.text_encoder(batch["tokens"], output_hidden_states=True)
        two = self.text_encoder_2(batch["tokens_2"], output_hidden_states=True)
        known = batch["known"][:, None]
        text = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        return {"text": text * known[:, None], "pooled": two.text_embeds * known, "time_ids": batch["time_ids"]}


def wrapped(pipe: Any, cfg: Finetune) -> Denoiser:
    """The parts of a pipeline that are trained."""
    return Denoiser(pipe.unet, *(text_encoders(pipe) if cfg.train_text_encoder else ()))


def text_encoders(pipe: Any) -> list[Any]:
    return [pipe.components[name] for name in ("text_encoder", "text_encoder_2") if name in pipe.components]


def build(pipe: Any, cfg: Finetune, kind: str, seed: int) -> Denoiser:
    """The trainable part of a pipeline; ``kind``: the attention kernel.

    LoRA starts at nothing: its second matrix is zero, the first drawn from ``seed``, the same on all ranks.
    """
    model = wrapped(pipe, cfg)
    attention.apply(pipe.unet, kind)
    model.requires_grad_(not cfg.lora_rank)
    if cfg.lora_rank:
        torch.manual_seed(seed)
        add_adapters(model, cfg)
    if model.text_encoder_2 is not None:
        _freeze_end(model.text_encoder)
    if cfg.lora_rank:
        for p in model.parameters():  # what is not trained needs no master copy
            p.data = p.data.to(torch.float32 if p.requires_grad else diffusion.DTYPES[cfg.precision])
    if cfg.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        for encoder in text_encoders(pipe) if cfg.train_text_encoder else ():
            encoder.gradient_checkpointing_enable()
    return model


def _freeze_end(text_encoder: Any) -> None:
    """SDXL reads its first encoder before the last layer: what comes after has no gradient, which data parallelism would wait for."""
    text = getattr(text_encoder, "text_model", text_encoder)
    for part in (text.encoder.layers[-1], text.final_layer_norm):
        part.requires_grad_(False)


def add_adapters(model: Denoiser, cfg: Finetune) -> None:
    from peft import LoraConfig

    def config(targets: list[str]) -> Any:
        return LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha or cfg.lora_rank, init_lora_weights="gaussian", target_modules=targets)

    model.unet.add_adapter(config(UNET_TARGETS))
    for encoder in (model.text_encoder, model.text_encoder_2):
        if encoder is not None:
            encoder.add_adapter(config(TEXT_TARGETS))


def put_back(pipe: Any, cfg: Finetune, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies trained weights into a fresh pipeline of the same base; LoRA as adapters, which stay apart."""
    model = wrapped(pipe, cfg)
    if cfg.lora_rank and not getattr(pipe.unet, "peft_config", None):
        add_adapters(model, cfg)
    own = dict(model.named_parameters())
    for name, value in weights:
        own[name].data.copy_(value)


def save_lora(pipe: Any, cfg: Finetune, folder: Path) -> None:
    """``pytorch_lora_weights.safetensors``, as ``pipe.load_lora_weights(folder)`` of plain diffusers reads it."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    def layers(model: Any) -> dict[str, torch.Tensor]:
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(model))

    parts = ["unet", *(name for name in ("text_encoder", "text_encoder_2") if cfg.train_text_encoder and name in pipe.components)]
    found = {f"{part}_lora_layers": layers(pipe.components[part]) for part in parts}
    metadata = {f"{part}_lora_adapter_metadata": pipe.components[part].peft_config["default"].to_dict() for part in parts}
    type(pipe).save_lora_weights(folder, **found, safe_serialization=True, **metadata)
