"""One optimizer step over all ranks, through accelerate and DeepSpeed; the same for both models.

ZeRO stage 0, or a single rank that offloads nothing, is plain data parallel (accelerate alone); stages 1 to 3 are DeepSpeed's
(Rajbhandari et al. 2020). The learning rate is set from outside as a function of the step: a schedule has no state to lose.

What there is to save is, per trained parameter, the float32 master weight and the optimizer's states: ``held`` gives a rank's piece of
one and where it lies in the whole, ``full`` and ``_set`` the whole, by DeepSpeed's tensor fragments; so a checkpoint knows neither ranks
nor ZeRO stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from skinsynth.cpu import importing
from skinsynth.errors import UserError
from skinsynth.knobs import Training
from skinsynth.train.optimizer import build_optimizer, groups
from skinsynth.world import World, join_alone

Batch = dict[str, torch.Tensor]
WEIGHT = "weight"


class Saved(Protocol):
    """What an engine goes on from (``checkpoint.Checkpoint``)."""

    step: int
    state: dict[str, Any]

    def tensor(self, key: str, name: str) -> torch.Tensor: ...

    def keys(self, name: str) -> list[str]: ...


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


def forget_accelerate() -> None:
    """accelerate keeps the first plugin and precision for the life of a process, which may hold several trainings (seeds, debug)."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        del os.environ[name]


class Engine:
    """Holds the model, its optimizer and the distributed machinery.

    ``scales``: of some parameters the share of the learning rate that they get; the others get all of it.
    ``found``: what to go on from. Its weights are put in place before anything is wrapped, so that all copies of them agree.
    """

    def __init__(self, cfg: Training, world: World, model: torch.nn.Module, section: str, found: Saved | None = None,
                 scales: dict[str, float] | None = None):
        self.cfg, self.world, self.section = cfg, world, section
        self.micro = micro_batch(cfg, world, section)
        self.accumulation = cfg.global_batch // world.size // self.micro
        self.sharded = cfg.zero > 0 and (world.size > 1 or cfg.offload != "none")
        self.topology = {"ranks": world.size, "zero": cfg.zero if self.sharded else 0}
        self.bare: Any = model  # without what wraps it; accelerate's unwrapping imports all of DeepSpeed, where that is installed
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: list(p.shape) for name, p in self.trained.items()}  # ZeRO 3 leaves the parameters none
        if found:
            for name, p in self.trained.items():
                p.data.copy_(found.tensor(WEIGHT, name))
        if not self.sharded:  # ZeRO flattens the weights
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # DeepSpeed casts the weights first and makes its float32 masters of those, which would begin rounded
        exact = {name: p.detach().float().cpu() for name, p in self.trained.items()} if self.sharded and cfg.precision != "fp32" and not found else {}
        self.adam = build_optimizer(cfg, groups(self.trained, scales or {}))
        self.accelerator = self._accelerator()
        model.train()  # before it is wrapped: what is loaded is in inference mode, and its wrapper would say of itself that it is not
        with self._advised():
            self.model, self.optimizer = self.accelerator.prepare(model, self.adam)
        if self.sharded:  # accelerate told transformers to shard, with collectives, whatever is loaded from now on: on rank 0 alone it would hang
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
        self._linked = not self.sharded or cfg.zero == 3 or len(self.adam.param_groups) == 1
        with self._advised():
            if found:
                self._go_on(found)
            for name, value in exact.items():
                self._set(WEIGHT, name, value)

    @importing()
    def _accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

        forget_accelerate()
        plugin, cpu = None, not torch.cuda.is_available()
        if cpu and self.cfg.precision == "fp16":
            raise UserError(f"{self.section}.precision=fp16 needs a GPU, and none is seen here: take bf16 or fp32")
        if self.sharded:
            if self.world.size == 1:
                join_alone(self.world)
            if cpu:  # its shared-memory all-reduce serves inference only, and would be compiled on the node
                import deepspeed.ops

                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            plugin = DeepSpeedPlugin(hf_ds_config={
                "train_micro_batch_size_per_gpu": self.micro,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": self.cfg.max_grad_norm,
                "zero_optimization": self._zero(cpu),
                "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's own: nothing is compiled on the node
                "zero_allow_untested_optimizer": True,  # ours is torch's with one more state
                # else ZeRO 1 and 2 wait for the device in every step, to leave out an update that is not finite; here one stops the training
                "bf16": {"enabled": self.cfg.precision == "bf16", "check_grad_overflow": False},
                "fp16": {"enabled": self.cfg.precision == "fp16"},
                "steps_per_print": 10**9,
            })
        kwargs: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if cpu and (self.sharded or self.world.size > 1) else []
        # gradients lie where the ranks sum them: else data parallelism holds them twice, 3.4 GB more for Stable Diffusion 1.5's UNet
        kwargs.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(self.cfg.precision, self.cfg.precision),
            gradient_accumulation_steps=self.accumulation,
            deepspeed_plugin=plugin,
            cpu=cpu and not self.sharded,  # with DeepSpeed, cpu=True would silently fall back to DDP
            kwargs_handlers=kwargs,
        )
        if accelerator.num_processes != self.world.size:
            raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes, the gang has {self.world.size}")
        return accelerator

    def _zero(self, cpu: bool) -> dict[str, Any]:
        place = {"device": "cpu", "pin_memory": not cpu}
        parts = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[self.cfg.offload]
        # on GPUs gradients are summed beside the backward pass, in pieces as small as data parallelism's are: its own would be two for all of SD 1.5
        buckets = {} if cpu else {"overlap_comm": True, "reduce_bucket_size": 50_000_000}
        return {"stage": self.cfg.zero, **buckets, **{f"offload_{part}": place for part in parts}}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def step(self, lr: float, ema_decay: float, batches: Iterable[Batch], loss: Callable[[Any, Batch], torch.Tensor]) -> torch.Tensor:
        """Forward, backward over the micro batches, one update. Returns this rank's mean loss, on the device, not waited for.

        Raises:
            UserError: out of memory; the message says what to turn on.
        """
        for group in self.adam.param_groups:
            group["lr"], group["ema_decay"] = lr * group.get("scale", 1.0), ema_decay
        total = torch.zeros((), device=self.device)
        with self._advised():
            for batch in batches:
                batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
                with self.accelerator.accumulate(self.model):
                    value = loss(self.model, batch)
                    self.accelerator.backward(value)
                    if self.cfg.max_grad_norm and not self.sharded and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                total += value.detach() / self.accumulation
        self._link()
        return total

    @contextmanager
    def _advised(self) -> Iterator[None]:
        """Where memory is out, says what to turn on."""
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the host's memory has only words
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise UserError(self._memory_advice(str(error).splitlines()[0])) from None

    def _link(self) -> None:
        """DeepSpeed (ZeRO 1 and 2) notes where the optimizer's states lie after the first group's first step, when those of the other groups
        are not there yet; so it is told to note them once more."""
        if not self._linked and all(self.adam.state.get(flat) for flat in self._flat()):  # none yet where fp16 overflowed
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def _memory_advice(self, words: str) -> str:
        s, cfg = self.section, self.cfg
        smaller = max((n for n in range(1, self.micro) if self.micro % n == 0), default=0)
        ways = [f"{s}.micro_batch={smaller} (it is {self.micro}; the global batch stays)"] if smaller else []
        if getattr(cfg, "gradient_checkpointing", True) is False:
            ways.append(f"{s}.gradient_checkpointing=true")
        if cfg.precision == "fp32":
            ways.append(f"{s}.precision=bf16 (in a new run)")
        if cfg.zero < 3 and cfg.optimizer != "adamw8bit":
            ways.append(f"{s}.zero={cfg.zero + 1} over more ranks")
        if cfg.offload == "none" and cfg.zero:
            ways.append(f"{s}.offload=optimizer")
        if getattr(cfg, "lora_rank", 1) == 0:
            ways.append(f"{s}.lora_rank=16 (in a new run)")
        ways = ways or ["more ranks, or GPUs with more memory"]
        return f"out of memory ({words}): turn on {'; or '.join(ways)}; then launch again: it goes on from the last checkpoint"

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks. A collective."""
        return self.accelerator.reduce(values, "mean")

    # ---- the whole state, parameter by parameter ----

    def full(self, key: str, name: str) -> torch.Tensor:
        """``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema`` of a trained parameter: float32, in its shape. A collective under ZeRO."""
        p = self.trained[name]
        if self.sharded:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            value = safe_get_full_fp32_param(p) if key == WEIGHT else safe_get_full_optimizer_state(p, key)
        else:
            value = p if key == WEIGHT else self.adam.state[p][key]
        return value.detach().float() if value.is_floating_point() else value.detach()  # 8-bit states are not

    def held(self, key: str, name: str) -> tuple[int, torch.Tensor]:
        """Under ZeRO: where this rank's piece of what ``full`` gives begins in it when it is flattened, and the piece, float32 (n,); n may be 0. No
        collective."""
        p: Any = self.trained[name]
        if self.cfg.zero < 3:
            piece = p._hp_mapping
            if piece is None:
                return 0, torch.empty(0)
            return piece.lp_fragment_address.start, piece.get_hp_fragment(None if key == WEIGHT else key).detach()
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        value = safe_get_local_fp32_param(p) if key == WEIGHT else safe_get_local_optimizer_state(p, key)
        begin = self.world.rank * p.ds_tensor.numel()
        return begin, value.detach()[:max(0, p.ds_numel - begin)]  # the last ones are filled up

    def keys_of(self, name: str) -> list[str]:
        """What there is to save of a trained parameter, once a step was done."""
        if self.sharded:
            return [WEIGHT, "exp_avg", "exp_avg_sq", *(["ema"] if self.cfg.ema_decay else [])]
        state = self.adam.state[self.trained[name]]
        return [WEIGHT, *(key for key, value in state.items() if torch.is_tensor(value) and key != "step")]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights by name, float32, one after the other, since a host may not hold all of them for each of its ranks: their moving
        average where there is one. Under ZeRO a collective, which every rank must go through to its end."""
        key = "ema" if self.cfg.ema_decay else WEIGHT
        return ((name, self.full(key, name)) for name in self.trained)

    def state_bytes(self) -> dict[str, int]:
        """What this rank holds between steps: the model's weights, float32 masters beside them, the optimizer's states."""
        parameters: list[Any] = list(self.bare.parameters())
        held = [getattr(p, "ds_tensor", p) for p in parameters]  # ZeRO 3 keeps a share of each
        masters = self._flat() if self.sharded else []
        states = [t for state in self.adam.state.values() for t in state.values() if torch.is_tensor(t)]
        return {name: sum(t.numel() * t.element_size() for t in tensors)
                for name, tensors in (("weights", held), ("masters", masters), ("optimizer", states))}

    @property
    def skipped(self) -> bool:
        """Whether DeepSpeed left out an update since its gradients were not finite, which is usual at fp16 alone. The same on all ranks."""
        return self.sharded and self.cfg.precision != "fp16" and self.model.skipped_steps > 0

    def scaler(self) -> dict[str, Any]:
        """fp16's loss scale, the steps since it last changed, and the ``updates`` that the optimizer counts, fewer than steps where some overflowed;
        {} at other precisions."""
        if self.cfg.precision != "fp16":
            return {}
        updates = {"updates": max((int(state["step"]) for state in self.adam.state.values()), default=0)}
        if self.sharded:
            own = self.model.optimizer.loss_scaler
            return {"scale": float(own.cur_scale), "since": own.cur_iter - 1 - own.last_overflow_iter, "hysteresis": own.cur_hysteresis, **updates}
        own = self.accelerator.scaler
        return {"scale": own.get_scale(), "since": own.state_dict()["_growth_tracker"], **updates}

    def _set_scaler(self, saved: dict[str, Any]) -> None:
        """As ``scaler`` gave it, by whichever of the two scalers."""
        if self.sharded:
            own = self.model.optimizer.loss_scaler
            own.cur_scale, own.last_overflow_iter = saved["scale"], own.cur_iter - 1 - saved["since"]
            own.cur_hysteresis = saved.get("hysteresis", own.cur_hysteresis)
        else:
            own = self.accelerator.scaler
            own.load_state_dict({**own.state_dict(), "scale": saved["scale"], "_growth_tracker": saved["since"]})

    def _go_on(self, found: Saved) -> None:
        """Puts the saved states in place, of which every rank takes what it holds."""
        updates = (found.state.get("scaler") or {}).get("updates", found.step)
        if self.sharded:
            for flat in self._flat():
                keys = self.keys_of(next(iter(self.trained)))[1:]
                self.adam.state[flat] = {**self._step(flat, updates), **{key: torch.zeros_like(flat) for key in keys}}
            if self.cfg.zero < 3:
                self.model.optimizer._lazy_init_hp_params_optimizer_state()  # else done after the first step
        else:
            for p in self.trained.values():
                self.adam.state[p] = self._step(p, updates)
        for name in self.trained:
            for key in self.keys_of(name) if self.sharded else found.keys(name):
                self._set(key, name, found.tensor(key, name))
        if found.state.get("scaler"):
            self._set_scaler(found.state["scaler"])

    def _flat(self) -> list[torch.Tensor]:
        """This rank's flat float32 shares, which DeepSpeed gives to the optimizer in place of the parameters."""
        zero = self.model.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.cfg.zero == 3 else zero.single_partition_of_fp32_groups)

    def _step(self, like: torch.Tensor, step: int) -> dict[str, Any]:
        """The optimizer's own count of steps, in the form that it wants."""
        if self.cfg.optimizer == "adamw8bit":
            return {"step": step}
        return {"step": torch.tensor(float(step), device=like.device if self.adam.param_groups[0].get("fused") else "cpu")}

    def _set(self, key: str, name: str, value: torch.Tensor) -> None:
        p: Any = self.trained[name]
        if not self.sharded and key == WEIGHT:
            p.data.copy_(value)
            return
        if not self.sharded:
            # in the parameter's own memory format: the fused kernels go through both as they lie
            same = value.shape == p.shape
            self.adam.state[p][key] = torch.empty_like(p, dtype=value.dtype).copy_(value) if same else value.to(p.device)
            return
        import deepspeed.utils as ds

        if self.cfg.zero < 3:
            value = value.to(p.device)
            ds.safe_set_full_fp32_param(p, value) if key == WEIGHT else ds.safe_set_full_optimizer_state(p, value, key)
        else:  # its own share: safe_set_full_... cannot cut a parameter that the ranks do not divide
            share = p.ds_tensor.numel()
            padded = F.pad(value.flatten(), (0, share * self.world.size - value.numel()))
            mine = padded[share * self.world.rank:share * (self.world.rank + 1)].to(p.device)
            ds.safe_set_local_fp32_param(p, mine) if key == WEIGHT else ds.safe_set_local_optimizer_state(p, mine, key)
