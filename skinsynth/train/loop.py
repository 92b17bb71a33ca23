"""The one training loop: batches by position, steps, checkpoints, stop signals.

A loop that is started again goes on from the last whole checkpoint, at the very sample where it was. The ranks talk once
a step, before it: whether one has heard a signal, or could not read its batch, or not write its part of a checkpoint. Then all save, or
leave, at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from skinsynth.data.loader import LoaderProcess
from skinsynth.data.order import share
from skinsynth.data.stream import Feed
from skinsynth.run import Progress, RunDir
from skinsynth.train.checkpoint import Checkpoints, NotFinite
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import Clock, Data, TrainLog
from skinsynth.train.optimizer import ema_decay, learning_rate
from skinsynth.world import Stopped

Judge = Callable[[int, dict[str, Any]], None]  # of (steps done, state)
Reader = Feed[range, Batch] | LoaderProcess
Show = Callable[[int], dict[str, np.ndarray] | None]  # steps done -> pictures for TensorBoard


@dataclass(frozen=True)
class Place:
    """One of a node's ``of`` trainings: where it keeps its files, and its number, under which its progress is told."""

    folder: Path
    number: int = 0
    of: int = 1


def train(engine: Engine, run: RunDir, node: str, checkpoints: Checkpoints, clock: Clock, data: Data, loss: Callable[[Any, Batch], torch.Tensor],
          judge: Judge | None = None, show: Show | None = None, every: int = 0, place: Place | None = None) -> dict[str, Any]:
    """Trains to ``cfg.steps``; returns the loop's small state.

    ``judge`` and ``show`` are called on all ranks each ``every`` steps and at the end: the one before a checkpoint, since it may write to the
    state (JSON values), and the other after it, since a checkpoint need not wait for pictures. Where the state has ``ended``, on all ranks
    alike, the training ends. ``place``: where a node has several trainings, which of them this is.

    Raises:
        Stopped: a stop signal came to any rank; the state is saved, the same command goes on.
        UserError: the loss is no finite number or explodes, an update leaves what is not finite, memory is out, a sample cannot be read; the last
            good checkpoint stays.
    """
    cfg, world, found = engine.cfg, engine.world, checkpoints.found
    begin, state = (found.step, dict(found.state)) if found else (0, {})
    if found:
        found.close()  # the engine has its state
    place = place or Place(run.node(node))
    log = TrainLog(place.folder, engine, begin, clock, data, state)
    progress = Progress(run, node, place.number, cfg.steps, "steps", begin, cfg.steps * place.of) if world.is_main else None
    left = range(begin, begin if state.get("ended") else cfg.steps)
    if progress and not left:
        progress.end()
    todo = ((step, share(step, cfg.global_batch, engine.micro, world.rank, world.size)) for step in left)
    with closing(checkpoints), reader(data, todo, engine.device.type == "cuda") as feed:
        log.reader = feed if isinstance(feed, LoaderProcess) else data
        batches, due = iter(feed), False
        for step in left:
            mine, error = _next(batches)
            error = error or checkpoints.error
            talk = world.max(2 if error else int(world.stop))
            if talk:
                _leave(node, step, log, feed, checkpoints, engine, state, error)
            log.add(step, engine.step(learning_rate(cfg, step), ema_decay(cfg, step), mine, log.counted(loss)))
            done = step + 1
            last = done == cfg.steps
            look, due = last or (every > 0 and done % every == 0), due or done % cfg.checkpoint_every == 0
            if due or look or done % cfg.log_every == 0:
                log.flush(feed.waited)
            if progress:
                progress.set(done)  # judging and pictures may take minutes, in which nothing is left of this step
            if judge and look:
                judge(done, state)
            if last or state.get("ended") or (due and not log.unusual()):
                _save(done, log, checkpoints, engine, state)
                due = False
            if show and look:
                log.pictures(done, show(done))
            if look:
                log.resume()
            if state.get("ended"):
                if progress:
                    progress.end()
                break
    checkpoints.wait()
    return state


def reader(data: Data, todo: Iterator[tuple[int, list[range]]], gpu: bool) -> Reader:
    """On a CPU loading and training take turns; a GPU is fed from another process, since here threads would keep it from its orders."""
    return LoaderProcess(data, todo, pin=True) if gpu else Feed(data.batch, todo, data.workers, turns=True)


def _next(batches: Iterator[tuple[int, list[Batch]]]) -> tuple[list[Batch], BaseException | None]:
    """The micro batches of the next step, or why there are none."""
    try:
        return next(batches)[1], None
    except Exception as error:  # told to the other ranks before anything is raised
        return [], error


def _save(done: int, log: TrainLog, checkpoints: Checkpoints, engine: Engine, state: dict[str, Any]) -> None:
    """A loss is of the weights before its step's update: what that made of them shows here first."""
    state["bad_samples"] = log.bad_samples()
    try:
        checkpoints.save(done, engine, state)
    except NotFinite as error:
        raise log.blame(done - 1, f"is finite at step {done}, but '{error}' is not after that step's update") from None


def _leave(node: str, step: int, log: TrainLog, feed: Reader, checkpoints: Checkpoints, engine: Engine, state: dict[str, Any],
           error: BaseException | None) -> NoReturn:
    """All ranks save, unless that was just done, and stop: for a signal that one has heard, a batch that one could not read, or what it could not
    write."""
    if step > checkpoints.last:
        log.flush(feed.waited)
        _save(step, log, checkpoints, engine, state)
    checkpoints.wait()
    engine.world.together(error)
    raise Stopped(f"{node} stopped at step {step} of {engine.cfg.steps}; the same command goes on from there")
