"""What a training tells: one line per step in ``metrics.jsonl``, TensorBoard beside it, where the time of a start went.

The losses stay on the device until they are flushed, so that no step waits for the device. Speeds and memory are rank 0's, and the same in all
lines of a flush.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from skinsynth.data.loader import LoaderProcess, Reads
from skinsynth.errors import UserError
from skinsynth.files import write_json, write_text
from skinsynth.knobs import Training
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.optimizer import learning_rate

log = logging.getLogger(__name__)

FEW = 10  # losses whose mean is held against the usual one: a single batch may be hard
KNOWN = 20  # losses from which on there is a usual one, the median of the last ``USUAL``
USUAL = 500
# Dense bf16 peak in FLOP/s, from the vendors' data sheets; of other devices, and of parts of one (MIG), no MFU is told.
PEAK = {"H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
        "A100": 312e12, "L40S": 362e12, "A40": 150e12, "A6000": 155e12, "V100": 125e12}


class Data(Reads, Protocol):
    """What a training reads."""

    def keys(self, positions: range) -> list[str]:
        """The names of those samples."""


class Clock:
    """Where the seconds to the first step go. The first lap is counted from the start of the process, of a second training in it (debug)
    from there."""

    _begun: float | None = None  # of this process, until the first clock took it

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.time() if Clock._begun else psutil.Process().create_time()
        Clock._begun = self.last

    def lap(self, what: str) -> None:
        now = time.time()
        self.laps[what], self.last = round(now - self.last, 3), now


class TrainLog:
    """Making one, ``flush`` and ``bad_samples`` are collectives; all else is each rank's own. ``state``: the training's own, in which the
    operations of a sample are kept once they are counted."""

    def __init__(self, folder: Path, engine: Engine, begin: int, clock: Clock, data: Data, state: dict[str, Any]):
        self.path, self.engine, self.data, self.begin, self.clock, self.state = folder / "metrics.jsonl", engine, data, begin, clock, state
        self.reader: Data | LoaderProcess = data  # who has met the bad samples
        self.waiting: list[tuple[int, torch.Tensor]] = []
        self.since, self.waited = time.perf_counter(), 0.0
        before = [row["loss"] for row in read_lines(self.path) if row["step"] <= begin] if engine.world.is_main else []
        self.first, self.losses = engine.world.gather((before[:KNOWN], before[-USUAL:]))[0]  # so that all ranks judge alike
        self.board: Any = None
        if engine.world.is_main:
            keep_lines(self.path, begin)
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=begin + 1)

    def counted(self, loss: Callable[[Any, Batch], torch.Tensor]) -> Callable[[Any, Batch], torch.Tensor]:
        """The same loss; the first call of a training counts the floating-point operations of the trained model's forward pass. Not those of
        its restarts: a step that is counted is not compiled, and rounds otherwise."""

        def first(model: Any, batch: Batch) -> torch.Tensor:
            if "flops" in self.state:
                return loss(model, batch)
            with forward_flops(self.engine.bare) as counter:
                value = loss(model, batch)
            self.state["flops"] = counter.get_total_flops() / self.engine.micro
            return value

        return loss if "flops" in self.state else first

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Raises ``UserError`` where the step's gradients were not finite, as far as that is known already: else its weights tell, or the next
        loss."""
        self.waiting.append((step, loss))
        if self.engine.skipped:
            raise self.blame(step, f"may be finite, but its gradients at step {step + 1} are not")
        if step == self.begin:
            loss.item()  # waits for the device, this once
            self.clock.lap("first step")
            if self.engine.world.is_main:
                write_json(self.path.parent / "startup.json", {"step": step, "seconds": self.clock.laps, "state_bytes": self.engine.state_bytes()})

    def flush(self, waited: float) -> None:
        """``waited``: seconds that this rank has waited for data since the start.

        Raises:
            UserError: a loss that is no finite number, or many times the usual one; that steps' lines are not written.
        """
        if not self.waiting:
            return
        cfg = self.engine.cfg
        losses = self.engine.mean(torch.stack([loss for _, loss in self.waiting])).tolist()
        numbers = [step for step, _ in self.waiting]
        self._check(numbers, losses)
        self.losses += losses
        self.first += losses[:KNOWN - len(self.first)]
        seconds = max(1e-9, time.perf_counter() - self.since)
        speed = self._speed(cfg, len(losses), seconds, waited - self.waited)
        self.waiting, self.waited = [], waited
        self.resume()
        if not self.board:
            return
        rows = [{"step": step + 1, "loss": value, "lr": learning_rate(cfg, step), **speed} for step, value in zip(numbers, losses, strict=True)]
        with open(self.path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    self.board.add_scalar(name, row[name], row["step"])

    def resume(self) -> None:
        """From here on speed and memory count: what was judged or drawn since the last flush is no part of them."""
        self.since = time.perf_counter()
        if self.engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.engine.device)

    def _speed(self, cfg: Training, steps: int, seconds: float, waited: float) -> dict[str, Any]:
        """Means over the steps since the last flush, and this rank's peak memory."""
        rate, size = steps * cfg.global_batch / seconds, self.engine.world.size
        passes = 2 if getattr(cfg, "lora_rank", 0) else 3  # forward, and backward at twice its cost: LoRA has next to no gradients of weights
        flops = self.state.get("flops", 0) * passes * rate / size
        peak = peak_flops(self.engine.device)
        return {"samples_per_second": _digits(rate), "samples_per_second_per_rank": _digits(rate / size),
                "tflops_per_rank": round(flops / 1e12, 4), "mfu": round(flops / peak, 4) if peak else None,
                "data_wait": round(waited / seconds, 4), "peak_memory_gb": round(peak_memory(self.engine.device) / 1e9, 3)}

    def _check(self, numbers: list[int], losses: list[float]) -> None:
        """Of each of the new losses; how many come at once changes nothing."""
        for step, loss in zip(numbers, losses, strict=True):
            if not math.isfinite(loss):
                raise self.blame(step, f"is {loss} at step {step + 1}")
        if len(self.losses) < KNOWN:
            return
        limit, usual, last = self._limit(), self._usual(), self.losses[1 - FEW:] + losses
        for number, step in enumerate(numbers):
            few = last[number:number + FEW]  # up to this step
            if statistics.fmean(few) > limit:
                raise self.blame(step, f"explodes: {statistics.fmean(few):.4g} on average over steps {step + 2 - FEW} to {step + 1}, usually "
                                       f"{usual:.4g} (see {self.engine.section}.explode); {losses[number]:.4g} at step {step + 1}")

    def _usual(self) -> float:
        return statistics.median(self.losses[-USUAL:])

    def _limit(self) -> float:
        """Many times the usual loss, and more than that of the beginning: one that is next to nothing for most batches is, of a batch with a wrong
        label or a hard image, easily a hundred times that."""
        return max(self.engine.cfg.explode * self._usual(), statistics.fmean(self.first))

    def unusual(self) -> bool:
        """Whether the last loss alone is as high as the mean of a few may not be. The weights may have exploded: no time to save them."""
        return len(self.losses) >= KNOWN and self.losses[-1] > self._limit()

    def blame(self, step: int, what: str) -> UserError:
        """The error that names the step's samples and says what to do; ``what``: of the loss."""
        cfg = self.engine.cfg
        names = self.data.keys(range(step * cfg.global_batch, (step + 1) * cfg.global_batch))
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        return UserError(f"the loss {what} (samples {shown}): lower the learning rate, take more warm-up steps, or bf16 or fp32 instead of fp16; "
                         "the last checkpoint is from before; if this comes again at once, delete it, to go on from the one before it")

    def bad_samples(self) -> int:
        """How many samples were skipped on all ranks since the start, before a restart too; ``bad-samples.csv`` lists them."""
        path, world = self.path.with_name("bad-samples.csv"), self.engine.world
        found = _listed(path) if world.is_main else {}
        for rank in world.gather(self.reader.bad):
            found |= {(bad.key, f"{bad.folder}/{bad.shard}"): bad.reason for bad in rank}
        if found and world.is_main:
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(["key", "shard", "reason"])
            rows.writerows([*which, reason] for which, reason in sorted(found.items()))
            if not path.exists() or path.read_text() != text.getvalue():
                log.warning("%d samples cannot be read and are skipped: %s lists them", len(found), path)
                write_text(path, text.getvalue())
        return world.gather(len(found))[0]

    def pictures(self, step: int, found: dict[str, np.ndarray] | None) -> None:
        """uint8 (height, width, 3) each."""
        for name, image in (found or {}).items():
            if self.board:
                self.board.add_image(name, image, step, dataformats="HWC")


@contextmanager
def forward_flops(module: torch.nn.Module) -> Iterator[Any]:
    """A counter of the floating-point operations of that module's forward passes inside the block, and of nothing round them."""
    from torch.utils.flop_counter import FlopCounterMode

    counter, inside = FlopCounterMode(display=False), ExitStack()

    def begin(*_: Any) -> None:
        inside.enter_context(torch.compiler.set_stance("force_eager"))  # what torch.compile meets under a counter it never compiles any more
        inside.enter_context(counter)

    def end(*_: Any) -> None:
        inside.close()

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return None if "MIG" in name else next((value for known, value in PEAK.items() if re.search(rf"\b{known}\b", name)), None)  # an A4000 is no A40


def _digits(rate: float) -> float:
    """Four digits: of a large model on a CPU an image may take half a minute."""
    return float(f"{rate:.4g}")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, where there is one, since the last reset; else of the process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _listed(path: Path) -> dict[tuple[str, str], str]:
    """(key, shard) -> reason of ``bad-samples.csv``; {} where there is none."""
    if not path.exists():
        return {}
    with open(path, newline="") as f:
        return {(row["key"], row["shard"]): row["reason"] for row in csv.DictReader(f)}


def keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of steps that will be done again, and a line that was torn."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= last_step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; a last line without its end is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
