"""One optimizer step over all ranks, through accelerate and DeepSpeed; the same for both models.

ZeRO stage 0, or a single rank, is plain data parallel (accelerate alone); stages 1 to 3 are DeepSpeed's (Rajbhandari
et al. 2020). The learning rate is set from outside as a function of the step: a schedule has no state to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skinsynth.config import Training
from skinsynth.errors import UserError
from skinsynth.world import World

Batch = dict[str, torch.Tensor]


def micro_batch(cfg: Training, world: World, section: str) -> int:
    """Samples per rank and pass. The global batch never changes with the number of ranks.

    Raises:
        UserError: the ranks do not divide it; the message says which numbers do.
    """
    per_rank, rest = divmod(cfg.global_batch, world.size)
    if rest:
        fit = [n for n in range(1, cfg.global_batch + 1) if cfg.global_batch % n == 0]
        raise UserError(f"{section}.global_batch={cfg.global_batch} cannot be shared by {world.size} ranks; {fit} ranks can")
    micro = cfg.micro_batch or per_rank
    if per_rank % micro:
        raise UserError(f"{section}.micro_batch={micro} does not divide the {per_rank} samples of a rank")
    return micro


class Engine:
    """Holds the model, its optimizer and the distributed machinery.

    ``topology`` says what a checkpoint of this engine can be read by.
    """

    def __init__(self, cfg: Training, world: World, model: torch.nn.Module, section: str):
        self.cfg, self.world = cfg, world
        self.micro = micro_batch(cfg, world, section)
        self.accumulation = cfg.global_batch // world.size // self.micro
        self.sharded = cfg.zero > 0 and world.size > 1
        self.topology = {"ranks": world.size if self.sharded else 1, "zero": cfg.zero if self.sharded else 0}
        self.accelerator = self._accelerator()
        if self.accelerator.num_processes != world.size:
            raise RuntimeError(f"accelerate sees {self.accelerator.num_processes} processes, the gang has {world.size}")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        plugin, cpu = None, not torch.cuda.is_available()
        if self.sharded:
            if cpu:  # its shared-memory all-reduce serves inference only, and would be compiled on the node
                import deepspeed.ops

                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            plugin = DeepSpeedPlugin(hf_ds_config={
                "train_micro_batch_size_per_gpu": self.micro,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": self.cfg.max_grad_norm,
                "zero_optimization": {"stage": self.cfg.zero},
                "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's own: nothing is compiled on the node
                "bf16": {"enabled": self.cfg.precision == "bf16"},
                "fp16": {"enabled": self.cfg.precision == "fp16"},
                "steps_per_print": 10**9,
            })
        return Accelerator(
            mixed_precision={"fp32": "no"}.get(self.cfg.precision, self.cfg.precision),
            gradient_accumulation_steps=self.accumulation,
            deepspeed_plugin=plugin,
            cpu=cpu and not self.sharded,  # with DeepSpeed, cpu=True would silently fall back to DDP
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if cpu and self.world.size > 1 else None,
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def bare(self) -> Any:
        """The model without what wraps it."""
        return self.accelerator.unwrap_model(self.model)

    def step(self, lr: float, batches: Iterable[Batch], loss: Callable[[Any, Batch], torch.Tensor]) -> torch.Tensor:
        """Forward, backward over the micro batches, one update. Returns this rank's mean loss, on the device, not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
            with self.accelerator.accumulate(self.model):
                value = loss(self.model, batch)
                self.accelerator.backward(value)
                if not self.sharded and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += value.detach() / self.accumulation
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks. A collective."""
        return self.accelerator.reduce(values, "mean")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole weights on the CPU, float32. A collective under ZeRO-3."""
        state = self.accelerator.get_state_dict(self.model)
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """A collective: under ZeRO every rank writes its share."""
        if self.sharded:
            self.model.save_checkpoint(str(folder), tag="zero")
        elif self.world.is_main:
            save_file(self.state_dict(), folder / "model.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        if self.sharded:
            self.model.load_checkpoint(str(folder), tag="zero")
            return
        self.bare.load_state_dict(load_file(folder / "model.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
