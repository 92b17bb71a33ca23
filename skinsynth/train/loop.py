"""The one training loop: batches by position, steps, losses to ``metrics.jsonl``, checkpoints, stop signals.

A loop that is started again goes on from the last whole checkpoint, at the very sample where it was.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from skinsynth.config import Training
from skinsynth.errors import UserError
from skinsynth.run import Progress, RunDir, write_text
from skinsynth.train import checkpoint
from skinsynth.train.engine import Batch, Engine
from skinsynth.world import Stopped

MakeBatch = Callable[[range], Batch]  # positions of the run -> a micro batch, on the CPU


def learning_rate(cfg: Training, step: int) -> float:
    """The rate of a step (0 .. steps-1): linear warm-up, then constant, or linearly or by a cosine to zero."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    left = 1 - (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * (left if cfg.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def train(engine: Engine, run: RunDir, node: str, make_batch: MakeBatch, loss: Callable[[Any, Batch], torch.Tensor],
          evaluate: Callable[[int, dict[str, Any]], None] | None = None, evaluate_every: int = 0) -> dict[str, Any]:
    """Trains to ``cfg.steps``; returns the loop's small state, which ``evaluate(step, state)`` may write to (JSON values).

    ``evaluate`` is called on all ranks each ``evaluate_every`` steps and at the end.

    Raises:
        Stopped: a stop signal came to any rank; the state is saved, the same command goes on.
        UserError: the loss is no finite number; the last good checkpoint stays.
    """
    cfg, world, folder = engine.cfg, engine.world, run.node(node) / "checkpoints"
    begin, state = checkpoint.restore(folder, engine, world)
    log = LossLog(run.node(node) / "metrics.jsonl", engine, begin)
    progress = Progress(run, node, 0, cfg.steps, "steps", begin) if world.is_main else None
    for step, batches in Prefetch(engine, make_batch, begin):
        log.add(step, engine.step(learning_rate(cfg, step), batches, loss))
        done = step + 1
        stop = world.any(world.stop)
        save = done % cfg.checkpoint_every == 0 or done == cfg.steps or stop
        if save or done % cfg.log_every == 0:
            log.flush()
        if evaluate and (done % evaluate_every == 0 or done == cfg.steps):
            evaluate(done, state)
        if save:
            checkpoint.save(folder, done, engine, world, cfg.keep, state)
        if progress:
            progress.set(done)
        if stop and done < cfg.steps:
            raise Stopped(f"{node} stopped at step {done} of {cfg.steps}; the same command goes on from there")
    return state


class Prefetch:
    """Makes the next steps' batches in a thread while the device computes: (step, micro batches of this rank)."""

    def __init__(self, engine: Engine, make_batch: MakeBatch, begin: int, ahead: int = 2):
        self.engine, self.make_batch, self.begin = engine, make_batch, begin
        self.queue: queue.Queue[tuple[int, list[Batch]] | BaseException] = queue.Queue(ahead)
        threading.Thread(target=self._fill, daemon=True).start()

    def _positions(self, step: int) -> Iterator[range]:
        """Micro batches of this rank: pass a of rank r takes the r-th slice of the a-th part of the global batch."""
        engine = self.engine
        for number in range(engine.accumulation):
            start = step * engine.cfg.global_batch + (number * engine.world.size + engine.world.rank) * engine.micro
            yield range(start, start + engine.micro)

    def _fill(self) -> None:
        try:
            for step in range(self.begin, self.engine.cfg.steps):
                self.queue.put((step, [self.make_batch(positions) for positions in self._positions(step)]))
        except BaseException as error:  # handed over, so that the loop fails where it waits
            self.queue.put(error)

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        for _ in range(self.begin, self.engine.cfg.steps):
            item = self.queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item


class LossLog:
    """One line per step in ``metrics.jsonl``, and TensorBoard beside it. The losses stay on the device until they are flushed."""

    def __init__(self, path: Path, engine: Engine, begin: int):
        self.path, self.engine = path, engine
        self.waiting: list[tuple[int, torch.Tensor]] = []
        self.since = time.perf_counter()
        self.board: Any = None
        if engine.world.is_main:
            keep_lines(path, begin)
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=begin + 1)

    def add(self, step: int, loss: torch.Tensor) -> None:
        self.waiting.append((step, loss))

    def flush(self) -> None:
        """A collective. Raises ``UserError`` on a loss that is no finite number."""
        if not self.waiting:
            return
        losses = self.engine.mean(torch.stack([loss for _, loss in self.waiting])).tolist()
        speed = len(losses) * self.engine.cfg.global_batch / max(1e-9, time.perf_counter() - self.since)
        rows = [{"step": step + 1, "loss": value, "lr": learning_rate(self.engine.cfg, step), "samples_per_second": round(speed, 2)}
                for (step, _), value in zip(self.waiting, losses, strict=True)]
        bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
        if bad:
            size = self.engine.cfg.global_batch
            raise UserError(f"the loss is {bad['loss']} at step {bad['step']} (samples {(bad['step'] - 1) * size} to {bad['step'] * size - 1} of the "
                            "run): lower the learning rate or the precision's speed (bf16 or fp32 instead of fp16); the last checkpoint is good")
        if self.board:
            with open(self.path, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                for name in ("loss", "lr", "samples_per_second"):
                    self.board.add_scalar(name, row[name], row["step"])
        self.waiting, self.since = [], time.perf_counter()


def keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of steps that will be done again, and a line that was torn."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= last_step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; a last line without its end is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
