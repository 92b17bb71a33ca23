"""Checkpoints that are whole or not there, and that any number of ranks at any ZeRO stage reads.

::

    checkpoints/step-00000200/   rank-00000.safetensors ...   float32 tensors, ``weight/<parameter>``, ``exp_avg/<parameter>``: whole ones, dealt
                                                              to the ranks; under ZeRO ``weight/<parameter>/<offset>``, what the rank held of
                                                              the flattened one
                    complete.json   step, sizes and hashes of all files, shapes, state of the loop: written last, before the rename

Each rank copies what it holds to the host's memory at a step boundary, without a word to the others; writing goes on in a thread while they train.
Who reads asks for whole tensors. DeepSpeed's own format is not used: it is pickled, and another number of ranks reads it only after a conversion.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skinsynth.errors import UserError
from skinsynth.files import mode_by_umask, read_hint, read_json, sha256_file, sync, write_json
from skinsynth.world import World

if TYPE_CHECKING:
    from skinsynth.train.engine import Engine

log = logging.getLogger(__name__)

UNSAID = ("images_sha256",)  # what checkpoints of earlier versions do not say of themselves, which go on all the same
PATIENCE = 120.0  # seconds until rank 0 sees what the other ranks have written, on a file system between nodes


class NotFinite(UserError):
    """A tensor that was to be saved is not; the message is its name."""


@dataclass
class Checkpoint:
    """A whole one, on disk."""

    path: Path
    step: int
    state: dict[str, Any]
    files: list[str]
    shapes: dict[str, list[int]]  # of the parameters that are there in pieces

    @cached_property
    def _index(self) -> dict[str, dict[str, list[tuple[int, str, Any]]]]:
        """Parameter -> ``weight``, ``exp_avg`` ... -> its pieces: offset, name in the file, the file."""
        found: dict[str, dict[str, list[tuple[int, str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for file in [safe_open(self.path / name, "pt") for name in self.files]:
            for full in file.keys():  # noqa: SIM118 (it is no dict)
                key, name, *offset = full.split("/")
                found[name][key].append((int(offset[0]) if offset else 0, full, file))
        return found

    def tensor(self, key: str, name: str) -> torch.Tensor:
        """float32, whole, on the CPU. Raises ``UserError`` where the checkpoint has no such tensor."""
        found = sorted(self._index.get(name, {}).get(key, []), key=lambda piece: piece[0])
        pieces = [file.get_tensor(full) for _, full, file in found]
        if not pieces:
            raise UserError(f"checkpoint {self.path} has no '{key}' of '{name}': it was made by another model or method; delete it to begin again")
        return torch.cat(pieces).view(self.shapes[name]) if name in self.shapes else pieces[0]

    def keys(self, name: str) -> list[str]:
        """What is there of a parameter: ``weight``, ``exp_avg`` ..."""
        return list(self._index.get(name, {}))

    def close(self) -> None:
        """Lets go of the files, which are mapped while they are read from: deleted, they would take their room on the disk until the end."""
        self.__dict__.pop("_index", None)


@dataclass
class Checkpoints:
    """The folder of a training. ``identity``: what a checkpoint must have been made with; ``found``: the one to go on from.

    Constructing it is a collective.

    Raises:
        UserError: the newest checkpoint was made with another ``identity``; the differences are listed.
    """

    folder: Path
    world: World
    identity: dict[str, Any]
    keep: int = 2
    keep_every: int = 0
    found: Checkpoint | None = field(init=False, default=None)
    last: int = field(init=False, default=0)  # the step of which the newest was made, or is being made
    _passed: set[str] = field(init=False, default_factory=set)  # names of the damaged ones that are newer than ``found``
    _part: threading.Thread | None = field(init=False, default=None)  # writes this rank's part
    _whole: threading.Thread | None = field(init=False, default=None)  # rank 0's: waits for all parts and makes a checkpoint of them
    _until: float = field(init=False, default=math.inf)  # when that one is tired of it (``time.monotonic``)
    error: BaseException | None = field(init=False, default=None)  # of this rank's threads, not told to the others yet

    def __post_init__(self) -> None:
        self.identity = json.loads(json.dumps(self.identity))  # as it will be read back
        self.found = self._find()
        self.last = self.found.step if self.found else 0

    # ---- reading ----

    def _find(self) -> Checkpoint | None:
        names = self.world.gather([p.name for p in sorted(self.folder.glob("step-*"), reverse=True)])[0]  # as rank 0 sees the folder
        for name in names:
            path = self.folder / name
            problems = [p for p in self.world.gather(self._problem(path)) if p]
            if not problems:
                return self._read(path)
            self._passed.add(name)
            if self.world.is_main:
                log.warning("checkpoint %s is passed over: %s", path, problems[0])
        return None

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; None when it is whole. The ranks share the hashing."""
        try:
            found = read_json(path / "complete.json")
        except ValueError:
            return "complete.json cannot be read"
        if found is None:
            return "complete.json is missing"
        for number, (name, facts) in enumerate(found["files"].items()):
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != facts["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {facts['bytes']}"
            if number % self.world.size == self.world.rank and sha256_file(path / name) != facts["sha256"]:
                return f"{name} has changed since it was written (its checksum differs)"
        return None

    def _read(self, path: Path) -> Checkpoint:
        found = read_json(path / "complete.json")
        mine = self.identity
        theirs = {name: mine[name] for name in UNSAID if name in mine} | found["identity"]
        differing = [f"{k}: {theirs.get(k, '(not set)')} -> {mine.get(k, '(not set)')}" for k in sorted(theirs.keys() | mine.keys())
                     if theirs.get(k) != mine.get(k)]
        if differing:
            raise UserError(f"checkpoint {path} was made with another configuration or of other images:\n  " + "\n  ".join(differing) +
                            f"\ntake another run folder, or delete {self.folder} to begin again")
        log.info("going on from %s (written by %s)", path, found["topology"])
        return Checkpoint(path, found["step"], found["state"], list(found["files"]), found.get("shapes", {}))

    # ---- writing ----

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """A collective: every rank calls it at the same step. Returns when the state is in the host's memory; a thread writes it.

        ``state``: small JSON values of the loop.

        Raises:
            NotFinite: on all ranks; nothing is written, and the one before stays the newest.
            UserError: the one before could not be written (on any rank).
        """
        self.wait()
        mine, odd = {}, None
        for name, value in self._held(engine):
            odd = odd or (None if _finite(value) else "/".join(name.split("/")[:2]))
            mine[name] = value.to("cpu", copy=True)
        for name in filter(None, self.world.gather(odd)):  # each looked at what it writes
            raise NotFinite(name)
        temp = self.folder / f".step-{step:08d}.tmp"
        self.world.together(self._room(temp) if self.world.is_main else None)  # the folder is there
        facts = {"step": step, "topology": engine.topology, "identity": self.identity, "state": {**state, "scaler": engine.scaler()},
                 "shapes": engine.shapes if engine.sharded else {}}
        self._until, self.last = math.inf, step
        self._part = self._thread(self._write, temp / f"rank-{self.world.rank:05d}.safetensors", mine)
        self._whole = self._thread(self._commit, self.folder / f"step-{step:08d}", temp, facts) if self.world.is_main else None

    def _room(self, temp: Path) -> OSError | None:
        """Makes the folder that is written to. What a gang left that died, or found the disk full, takes no room from it."""
        try:
            for stale in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            temp.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Begun. Its error is told where all ranks are together."""
        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self.error = error

        thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        thread.start()
        return thread

    def _held(self, engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share, on its device, one after the other (of what is offloaded, each is a copy): under ZeRO what it holds, else whole tensors,
        the parameters dealt out in turn."""
        for number, name in enumerate(engine.trained):
            if engine.sharded:
                for key in engine.keys_of(name):
                    offset, value = engine.held(key, name)
                    if value.numel():
                        yield f"{key}/{name}/{offset}", value
            elif number % self.world.size == self.world.rank:
                for key in engine.keys_of(name):
                    yield f"{key}/{name}", engine.full(key, name)

    def _write(self, file: Path, mine: dict[str, torch.Tensor]) -> None:
        for name in mine:  # convolutions are channels-last; one after the other, so that none is held twice for long
            mine[name] = mine[name].contiguous()
        try:
            save_file(mine, file)
            mode_by_umask(file)
        except SafetensorError as error:  # its words for a full disk: "I/O error: No space left on device (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) if number else error from None
        sync(file)
        write_json(file.with_suffix(".json"), {"bytes": file.stat().st_size, "sha256": sha256_file(file)})

    def _commit(self, final: Path, temp: Path, facts: dict[str, Any]) -> None:
        """Rank 0, in its thread, where no collective may run: it sees by their files that all have written."""
        names = [f"rank-{rank:05d}" for rank in range(self.world.size)]
        while lacking := [name for name in names if not (temp / f"{name}.json").exists()]:
            if self.error:
                return
            if time.monotonic() > self._until:
                raise UserError(f"rank 0 does not see in {temp} what {', '.join(lacking)} wrote: all nodes must see the same run folder")
            time.sleep(0.02)
        files = {f"{name}.safetensors": read_json(temp / f"{name}.json") for name in names}
        for name in names:
            (temp / f"{name}.json").unlink()
        write_json(temp / "complete.json", {**facts, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temp, final)
        sync(self.folder)
        self._prune(final)

    def wait(self) -> None:
        """A collective: returns when the last save is on disk. A rank waits for its own part, and rank 0 for the whole only where all have told
        each other that theirs are written.

        Raises:
            UserError, OSError: it could not be written, on any rank.
        """
        if not self._part:
            return
        try:
            self._part.join()
            self._tell()
            self._until = time.monotonic() + PATIENCE
            if self._whole:
                self._whole.join()
            self._tell()
        finally:
            self._until = 0.0
            if self._whole:
                self._whole.join()
            self._part = self._whole = self.error = None

    def _tell(self) -> None:
        error, self.error = self.error, None
        self.world.together(error)

    def close(self, patience: float = 15) -> None:
        """Lets a write that is under way end, where the ranks leave without being together; one that waits for a lost rank is given up."""
        thread = self._whole or self._part
        if thread:
            thread.join(patience)

    def _prune(self, newest: Path) -> None:
        """``newest`` is on disk: so none that is damaged is needed any more, and none must count as one of those that are kept."""
        self._passed.discard(newest.name)
        for name in self._passed:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        whole = sorted(path for path in self.folder.glob("step-*") if path.name not in self._passed)
        for old in whole[:-self.keep]:
            if not self.keep_every or int(old.name[5:]) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)


def states(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> state of the loop, of the checkpoints that are on disk now, as far as can be told without reading their tensors."""
    found = {path: read_hint(path / "complete.json") for path in folder.glob("step-*")}
    return {int(path.name[5:]): facts["state"] for path, facts in found.items() if facts}


def _finite(tensor: torch.Tensor) -> bool:
    """At the speed of the memory that it lies in: ``isfinite`` makes tensors as large."""
    return not tensor.is_floating_point() or not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor))
