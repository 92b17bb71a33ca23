"""AdamW, with a moving average of the weights among its states; its rate and decay as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch

from skinsynth.errors import UserError
from skinsynth.knobs import Training


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter 2019). Where a group's ``ema_decay`` is above zero, ``state[p]["ema"]`` follows the weights:
    as a state of the optimizer it is sharded, offloaded, gathered and saved by ZeRO like the moments, from the float32 masters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            decay = group.get("ema_decay", 0.0)
            updated = [p for p in group["params"] if p in self.state] if decay else []
            for p in updated:
                if "ema" not in self.state[p]:
                    self.state[p]["ema"] = p.detach().clone()
            if updated:
                torch._foreach_lerp_([self.state[p]["ema"] for p in updated], [p.detach() for p in updated], 1 - decay)
        return result


def groups(trained: dict[str, torch.nn.Parameter], scales: dict[str, float]) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: one for each share of the learning rate (``scale``), the lowest first."""
    found: dict[float, list[torch.nn.Parameter]] = {}
    for name, p in trained.items():
        found.setdefault(scales.get(name, 1.0), []).append(p)
    return [{"params": found[scale], "scale": scale} for scale in sorted(found)]


def build_optimizer(cfg: Training, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """``parameters``: as ``groups`` gives them. Raises ``UserError`` where adamw8bit is asked for and bitsandbytes is not to be had."""
    if cfg.optimizer == "adamw":
        return AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)  # on CPUs and offloaded, too
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"optimizer=adamw8bit needs bitsandbytes, which cannot be imported here ({error}): pip install bitsandbytes, or take "
                        "optimizer=adamw") from None
    return bitsandbytes.optim.AdamW8bit(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def learning_rate(cfg: Training, step: int) -> float:
    """The rate of a step (0 .. steps-1): linear warm-up, then constant, or linearly or by a cosine to zero."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    left = 1 - (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * (left if cfg.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def ema_decay(cfg: Training, step: int) -> float:
    """The decay at a step (0 ...): low at first, so that the average forgets the beginning (as in diffusers' ``EMAModel``)."""
    return min(cfg.ema_decay, (1 + step) / (10 + step))
