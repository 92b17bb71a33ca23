"""Which attention kernel is taken: xformers where it works on this device, else torch's own (SDPA)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

from skinsynth.errors import UserError

log = logging.getLogger(__name__)


def choose(wanted: str, device: torch.device) -> str:
    """``sdpa`` or ``xformers``. ``auto`` tests xformers forward and backward on the device and falls back with a line that says so.

    Raises:
        UserError: ``xformers`` was asked for by name and does not work here.
    """
    if wanted == "sdpa" or (wanted == "auto" and device.type != "cuda"):
        return "sdpa"
    problem = xformers_problem(device)
    if problem is None:
        return "xformers"
    if wanted == "xformers":
        raise UserError(f"model.attention=xformers cannot be used on {device}: {problem}; take model.attention=auto or sdpa")
    log.warning("attention: xformers does not work here (%s), taking sdpa", problem)
    return "sdpa"


def xformers_problem(device: torch.device) -> str | None:
    """None when xformers' attention and its gradient agree with SDPA on this device, else what is wrong. Asked for in the forms that Stable
    Diffusion has: heads as a part of the batch, 40 to 160 wide (of wide ones, some devices have no gradient), in both half precisions."""
    if device.type != "cuda":  # its import warns and its call raises there
        return "it needs a CUDA device"
    try:
        from xformers.ops import memory_efficient_attention

        torch.manual_seed(0)
        for dtype in (torch.float16, torch.bfloat16) if torch.cuda.is_bf16_supported() else (torch.float16,):
            for width in (40, 160):
                if not _agree(memory_efficient_attention, torch.randn(3, 8, 64, width, device=device, dtype=dtype)):
                    return f"its results differ from SDPA's (heads {width} wide, {dtype})"
    except Exception as error:  # any failure of a foreign binary means: do not use it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _agree(kernel: Any, values: torch.Tensor) -> bool:
    """``values``: (3, batch, tokens, width): query, key, value. Compares outputs and gradients."""
    ours, theirs = ([t.clone().requires_grad_() for t in values] for _ in range(2))
    got, want = kernel(*ours), F.scaled_dot_product_attention(*theirs)
    got.float().square().sum().backward()
    want.float().square().sum().backward()
    pairs = [(got, want)] + [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    return all(a is not None and b is not None and torch.allclose(a, b, atol=5e-2, rtol=5e-2) for a, b in pairs)


def apply(module: Any, kind: str) -> None:
    """Sets the kernel on a diffusers module; SDPA is diffusers' own default."""
    if kind == "xformers":
        module.enable_xformers_memory_efficient_attention()


def apply_to_classifier(model: Any, kind: str) -> None:
    """Sets the kernel on a transformers model. SDPA is transformers' own default; a ConvNeXt, which has no attention, is left as it is."""
    if kind != "xformers" or not getattr(model, "_supports_attention_backend", False):
        return
    from transformers import AttentionInterface

    AttentionInterface.register("xformers", _xformers_for_transformers)
    model.set_attn_implementation("xformers")


def _xformers_for_transformers(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
                               scaling: float | None = None, dropout: float = 0.0, **more: Any) -> tuple[torch.Tensor, None]:
    """(batch, heads, tokens, width) each -> (batch, tokens, heads, width). Attention with a bias (Swin's) is left to SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from xformers.ops import memory_efficient_attention

    if attention_mask is not None or more.get("position_bias") is not None:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
        return found, None
    return memory_efficient_attention(*(t.transpose(1, 2) for t in (query, key, value)), p=dropout, scale=scaling), None
