"""The one training loop: batches by position, steps, checkpoints, stop signals.

A loop that is started again goes on from the last whole checkpoint, at the very sample where it was. The ranks talk once
a step, before it: whether one has heard a signal, or could not read its batch. Then all save, or leave, at the same step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from skinsynth.run import Progress, RunDir
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import TrainLog
from skinsynth.train.optimizer import ema_decay, learning_rate
from skinsynth.world import Stopped

Evaluate = Callable[[int, dict[str, Any]], dict[str, np.ndarray] | None]  # (steps done, state) -> pictures for TensorBoard


class Data(Protocol):
    """What a training reads."""

    def batch(self, positions: range) -> Batch:
        """Positions of the run -> a micro batch, on the CPU. Called from other threads."""

    def keys(self, positions: range) -> list[str]:
        """The names of those samples."""


def train(engine: Engine, run: RunDir, node: str, checkpoints: Checkpoints, data: Data, loss: Callable[[Any, Batch], torch.Tensor],
          evaluate: Evaluate | None = None, evaluate_every: int = 0) -> dict[str, Any]:
    """Trains to ``cfg.steps``; returns the loop's small state, which ``evaluate(step, state)`` may write to (JSON values).

    ``evaluate`` is called on all ranks each ``evaluate_every`` steps and at the end.

    Raises:
        Stopped: a stop signal came to any rank; the state is saved, the same command goes on.
        UserError: the loss is no finite number or explodes, memory is out, a sample cannot be read; the last good checkpoint stays.
    """
    cfg, world, found = engine.cfg, engine.world, checkpoints.found
    begin, state = (found.step, dict(found.state)) if found else (0, {})
    log = TrainLog(run.node(node), engine, begin, data.keys)
    progress = Progress(run, node, 0, cfg.steps, "steps", begin) if world.is_main else None
    feed = Prefetch(engine, data.batch, begin)
    for step in range(begin, cfg.steps):
        batches, error = feed.next()
        talk = world.max(2 if error else int(world.stop))
        if talk and step > begin:
            log.flush(feed.waited)
            checkpoints.save(step, engine, state)
            checkpoints.wait()
        if talk > 1:
            world.together(error)
        if talk:
            raise Stopped(f"{node} stopped at step {step} of {cfg.steps}; the same command goes on from there")
        log.add(step, engine.step(learning_rate(cfg, step), ema_decay(cfg, step), batches, log.counted(loss)))
        done = step + 1
        save = done % cfg.checkpoint_every == 0 or done == cfg.steps
        if save or done % cfg.log_every == 0:
            log.flush(feed.waited)
        if evaluate and (done == cfg.steps or (evaluate_every and done % evaluate_every == 0)):
            log.pictures(done, evaluate(done, state))
        if save:
            checkpoints.save(done, engine, state)
        if progress:
            progress.set(done)
    checkpoints.wait()
    return state


class Prefetch:
    """Makes the next steps' batches in a thread while the device computes."""

    def __init__(self, engine: Engine, make_batch: Callable[[range], Batch], begin: int, ahead: int = 2):
        self.engine, self.make_batch, self.begin, self.waited = engine, make_batch, begin, 0.0
        self.queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(ahead)
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
                self.queue.put([self.make_batch(positions) for positions in self._positions(step)])
        except BaseException as error:  # handed over, so that the loop fails where it waits
            self.queue.put(error)

    def next(self) -> tuple[list[Batch], BaseException | None]:
        """The micro batches of the next step, or why there are none."""
        since = time.perf_counter()
        item = self.queue.get()
        self.waited += time.perf_counter() - since
        return ([], item) if isinstance(item, BaseException) else (item, None)
