"""Checkpoints that are whole or not there: written beside, marked complete, renamed; torn ones are passed over.

::

    checkpoints/step-00000200/   the engine's files, one set per rank where ZeRO shards them
                    complete.json   step, sizes of all files, topology: written last, before the rename
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from skinsynth.errors import UserError
from skinsynth.run import read_json, sync, write_json
from skinsynth.train.engine import Engine
from skinsynth.world import World

log = logging.getLogger(__name__)


def save(folder: Path, step: int, engine: Engine, world: World, keep: int, state: dict[str, Any]) -> None:
    """A collective: every rank calls it at the same step. ``state``: small JSON values of the loop."""
    final, temp = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if world.is_main:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
    world.barrier()
    engine.save(temp)
    world.barrier()
    if world.is_main:
        sizes = {str(p.relative_to(temp)): p.stat().st_size for p in sorted(temp.rglob("*")) if p.is_file()}
        for name in sizes:
            sync(temp / name)
        write_json(temp / "complete.json", {"step": step, "files": sizes, "topology": engine.topology, "state": state})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temp, final)
        sync(folder)
        _prune(folder, keep)
    world.barrier()


def restore(folder: Path, engine: Engine, world: World) -> tuple[int, dict[str, Any]]:
    """Loads the newest whole checkpoint; (0, {}) where there is none. A collective.

    Raises:
        UserError: the checkpoint was written by another number of ranks or at another ZeRO stage.
    """
    path = world.gather(str(_latest(folder) or ""))[0]  # rank 0 decides: file systems may show a new folder at different times
    if not path:
        return 0, {}
    found = read_json(Path(path) / "complete.json")
    if found["topology"] != engine.topology:
        raise UserError(f"checkpoint {path} was written with {found['topology']}, this job has {engine.topology}: start it with the same "
                        f"number of ranks and ZeRO stage, or delete {folder} to begin again")
    engine.load(Path(path))
    log.info("resumed from %s", path)
    return found["step"], found["state"]


def _latest(folder: Path) -> Path | None:
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _torn(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def _torn(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        found = read_json(path / "complete.json")
    except ValueError:
        return "complete.json cannot be read"
    if found is None:
        return "complete.json is missing"
    for name, size in found["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    return None


def _prune(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".step-*.tmp"):  # left by a gang that died while it saved
        shutil.rmtree(stale, ignore_errors=True)
