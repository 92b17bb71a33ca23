"""The run folder: every path in it, done markers, progress, its lock, provenance. No torch here.

::

    runs/isic/            config.yaml  provenance.json  launch.lock  report/
      prepare/            submit/ (logs)  progress/0.json  failed/0.json  done.json
      finetune/           ... metrics.jsonl  checkpoints/  weights/
      classify/hybrid/    the same, one folder per arm

A *node* is a stage, or a stage and its part: ``finetune``, ``classify/hybrid``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import skinsynth
from skinsynth import config as configs
from skinsynth.errors import UserError
from skinsynth.files import birth, is_spare, owner, read_hint, read_json, sha256_file, sha256_of, sha256_or_none, write_json, write_text
from skinsynth.knobs import Config

SPLITS = ("train", "val", "test")
CARDS = ("DATASHEET.md", "MODEL_CARD.md")  # beside the synthetic set and beside the weights: what report says of them
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "deepspeed", "submitit", "webdataset", "xformers", "numpy", "opencv-python-headless")


LOCK_SILENT = 120  # seconds after which a lock of another host is taken for a dead one's


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def node(self, node: str) -> Path:
        return self.path / node

    def done_path(self, node: str) -> Path:
        return self.node(node) / "done.json"

    def failed_path(self, node: str, task: int = 0) -> Path:
        return self.node(node) / "failed" / f"{task}.json"

    def failures(self, node: str) -> dict[int, str]:
        """Task number -> why it failed the last time it ran."""
        found = {int(path.stem): read_hint(path) for path in (self.node(node) / "failed").glob("*.json")}
        return {task: why["message"] for task, why in sorted(found.items()) if why}

    def progress_path(self, node: str, task: int) -> Path:
        return self.node(node) / "progress" / f"{task}.json"

    @property
    def weights(self) -> Path:
        return self.node("finetune") / "weights"

    def seed(self, arm: str, seed: int) -> Path:
        """What an arm trained with a seed."""
        return self.node(f"classify/{arm}") / f"seed-{seed}"

    def has_seed(self, arm: str, seed: int) -> bool:
        """Whether that is finished: ``metrics.json`` is written last; what was deleted since is made again."""
        return all((self.seed(arm, seed) / name).is_file() for name in ("metrics.json", "predictions.csv", "weights/config.json"))

    @property
    def compiled(self) -> Path:
        """What torch.compile made, for all tasks of the run; may be deleted."""
        return self.path / "compiled"

    def dataset(self, cfg: Config, kind: str) -> Path:
        """``train``, ``val``, ``test`` belong to the data; ``latents``, ``synthetic`` to this run."""
        owner = cfg.data.name if kind in ("train", "val", "test") else self.name
        return Path(cfg.data.shards) / f"{owner}-{kind}"

    def config(self) -> Config:
        if not self.config_path.is_file():
            raise UserError(f"{self.path} is no run folder: config.yaml is missing (make one with 'skinsynth launch CONFIG run={self.path}')")
        return configs.load(self.config_path)

    def check(self, cfg: Config) -> None:
        """Refuses a folder that was made with another configuration.

        Cluster keys may change between launches: they change where the work is done, not what comes out.

        Raises:
            UserError: the folder holds another configuration; the differing keys are listed. Or it is a file.
        """
        if self.path.is_file():
            raise UserError(f"run={self.path} is a file: give the run's folder, which may be a new one")
        if self.config_path.exists():
            found = configs.difference(cfg, self.config())
            if found:
                raise UserError(f"{self.path} was made with another configuration:\n  " + "\n  ".join(found) +
                                f"\ntake another folder (run=..., with --reuse {self.path} for what stays the same), or delete this one")

    def make(self) -> None:
        """Makes the folder itself. Raises ``UserError`` where it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be written: {error.strerror}") from None

    def create(self, cfg: Config) -> None:
        """Writes the resolved configuration, which jobs read when they begin. Raises ``UserError`` as ``check`` and ``make`` do."""
        self.check(cfg)
        self.make()
        try:
            write_text(self.config_path, configs.dump(cfg))
            if not (self.path / "provenance.json").exists():
                write_json(self.path / "provenance.json", provenance())
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be written: {error.strerror}") from None

    def is_done(self, node: str) -> bool:
        """True when the node finished, what it made is still there, what it named as read is unchanged, and the nodes that it needs are done and
        have made nothing else since."""
        done, here = read_json(self.done_path(node)), self.path.resolve()
        # without the mark, of an older run: relative to where that was run from
        if done is None or not all((here / output if done.get("relative") else Path(output)).exists() for output in done["outputs"]):
            return False
        if any(sha256_or_none(here / path) != sha256 for path, sha256 in done.get("reads", {}).items()):
            return False
        needs = done.get("needs", {})  # None: that was not done when this was run by hand
        return all(self.made(need) == made and (made is None or self.is_done(need)) for need, made in needs.items())

    def finish(self, node: str, metrics: dict[str, Any], outputs: list[Path], reads: list[Path] | None = None) -> None:
        """The last write of a node: from now on it is skipped. ``reads``: small files, there or not, that no node of this run alone decides on;
        when one of them changes the node is done no more."""
        here = self.path.resolve()
        paths = [os.path.relpath(output.resolve(), here) for output in outputs]
        read = {os.path.relpath(path.resolve(), here): sha256_or_none(path) for path in reads or []}
        made = sha256_of([metrics, [sha256_file(path) for path in outputs if path.is_file()]])
        needs = configs.needs(self.config()).get(node, ()) if self.config_path.exists() else ()
        write_json(self.done_path(node), {"node": node, "metrics": metrics, "outputs": paths, "relative": True, "made": made, "reads": read,
                                          "needs": {need: self.made(need) for need in needs}})
        shutil.rmtree(self.node(node) / "failed", ignore_errors=True)

    def made(self, node: str) -> str | None:
        """A hash of what a node made when it finished last: made again with the same bytes it is the same, and nothing need follow. None: it
        did not finish. An older run has no such hash; one of what is noted does."""
        done = read_json(self.done_path(node))
        return None if done is None else done.get("made") or sha256_of(done)

    def begin_task(self, node: str, task: int, patience: int, of: int | None = None) -> None:
        """Forgets an earlier failure, and counts the restarts that Slurm made of this job, those in a row that got no further.

        ``of``: how many tasks tell of their progress; what is left of an earlier launch with more of them is none of this one's.

        Raises:
            UserError: more than ``patience`` of those.
        """
        self.failed_path(node, task).unlink(missing_ok=True)
        for temp in self.progress_path(node, task).parent.glob(f".{task}.json.*.tmp"):
            if is_spare(temp):
                temp.unlink(missing_ok=True)
        for old in self.progress_path(node, task).parent.glob("[0-9]*.json"):
            if of is not None and int(old.stem) >= of:
                old.unlink(missing_ok=True)
        restarts, path = int(os.environ.get("SLURM_RESTART_COUNT", 0)), self.node(node) / "restarts" / f"{task}.json"
        if not restarts:
            path.unlink(missing_ok=True)
            return
        progress, before = read_hint(self.progress_path(node, task)) or {}, read_hint(path) or {"left": None, "stalled": 0}
        left = progress["total"] - progress["begun_at"] if progress else None  # when it was last begun, so of committed work alone
        stalled = before["stalled"] + 1 if left == before["left"] else 0
        write_json(path, {"restarts": restarts, "left": left, "stalled": stalled})
        if stalled > patience:
            raise UserError(f"it was restarted {stalled} times in a row without getting any further: see why in its log (out of memory? a time limit "
                            "shorter than one checkpoint or one unit takes?), then launch again")

    def finish_task(self, node: str, task: Task) -> None:
        """One task of a unit stage did its share: a launch need not submit it again."""
        path = self.progress_path(node, task.index)
        now = time.time()
        idle = {"done": 0, "total": 0, "unit": "units", "begun_at": 0, "start": now, "now": now}
        write_json(path, {**(read_hint(path) or idle), "finished_of": task.count})

    def begin_anew(self, node: str, task: int) -> None:
        """Forgets that a task did its share once: one that is lost before it tells of any progress must not count as through."""
        path = self.progress_path(node, task)
        state = read_hint(path)
        if state and state.pop("finished_of", None):
            write_json(path, state)

    def unfinished(self, node: str, count: int) -> list[int]:
        """The tasks, of so many, that did not do their share yet."""
        states = (read_hint(self.progress_path(node, task)) for task in range(count))
        return [task for task, state in enumerate(states) if not state or state.get("finished_of") != count]

    def metrics(self, node: str) -> dict[str, Any]:
        done = read_json(self.done_path(node))
        return done["metrics"] if done else {}

    def lock_owner(self) -> tuple[str, int] | None:
        """The host and the process that launch the run just now; of another host the lock tells, which is touched all the time."""
        path = self.path / "launch.lock"
        owner = _locked_by(path)
        if not owner:
            return None
        here = owner["host"] == platform.node()
        alive = birth(owner["pid"]) == owner["born"] if here else _silent(path) <= LOCK_SILENT
        return (owner["host"], owner["pid"]) if alive else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One launch at a time. A lock whose owner is dead is taken over: of this host the process tells, of another one that the lock was
        not touched for a while, as its owner does all the time.

        Raises:
            UserError: another launch of this run is alive; the message names it.
        """
        path = self.path / "launch.lock"
        mine = {"pid": os.getpid(), "born": birth(os.getpid()), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        while True:
            try:
                with open(path, "x") as f:
                    json.dump(mine, f)
                break
            except FileExistsError:
                owner = _locked_by(path)
                here = owner.get("host") == mine["host"]
                if birth(owner.get("pid", 0)) != owner.get("born") if here else _untouched(path) > LOCK_SILENT:
                    _take_away(path, owner)
                    continue
                who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "a process that did not say which"
                raise UserError(f"{self.path} is being launched already by {who}: wait for it or stop it (if it is dead: its lock is taken over "
                                f"after {LOCK_SILENT} s)") from None
        ended = threading.Event()
        threading.Thread(target=_keep_touching, args=(path, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            if _locked_by(path) == mine:  # else it was silent for too long, and another has taken it over
                path.unlink()


def _locked_by(path: Path) -> dict[str, Any]:
    """{} where there is no lock, or one whose owner has not written, or died before it did."""
    return read_hint(path) or {}


def _take_away(path: Path, dead: dict[str, Any]) -> None:
    """Of launches that find a dead owner's lock at the same time one alone gets it away; what is another's by now goes back."""
    aside = path.with_name(f".{path.name}.{owner()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _locked_by(aside) != dead:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _silent(path: Path) -> float:
    """As ``_untouched``; for one who may not write there by this host's clock."""
    try:
        return _untouched(path)
    except OSError:
        return time.time() - path.stat().st_mtime if path.exists() else float("inf")


def _keep_touching(path: Path, ended: threading.Event) -> None:
    while not ended.wait(LOCK_SILENT / 6):
        with contextlib.suppress(OSError):
            os.utime(path)


def _untouched(path: Path) -> float:
    """Seconds, by the file system's own clock: hosts may disagree."""
    probe = path.with_name(f".{path.name}.{owner()}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # given up just now
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


@dataclass(frozen=True)
class Task:
    """One of ``count`` independent tasks of a unit stage. Units are dealt by their own number, so that tasks that scan
    the folder at different moments still never take the same one."""

    index: int = 0
    count: int = 1

    def mine(self, units: list[int]) -> list[int]:
        return [u for u in units if u % self.count == self.index]


class Progress:
    """What one task tells the watcher: ``<node>/progress/<task>.json``, written at most twice a second.

    ``first``: how much was done, and when, at the end of the first batch. Who wants to know the speed counts from there: until then networks are
    loaded and kernels chosen, which is no part of what more work would take.
    """

    def __init__(self, run: RunDir, node: str, task: int, total: int, unit: str, done: int = 0, of: int = 0):
        """``total``: of this task; ``of``: of all tasks together, where it is known, since some may not have begun yet."""
        self.path = run.progress_path(node, task)
        now = time.time()
        self.state: dict[str, Any] = {"done": done, "total": total, "of": of, "spared": 0, "unit": unit, "begun_at": done, "start": now, "now": now,
                                      "first": None}
        self.written = 0.0
        self._write()

    def ready(self) -> None:
        """The work itself begins now: what was loaded for it is no part of its speed."""
        now = time.time()
        self.state |= {"start": now, "now": now}

    def set(self, done: int) -> None:
        self.state |= {"done": done, "now": time.time()}
        if self.state["first"] is None and done > self.state["begun_at"]:
            self.state["first"] = {"done": done, "now": self.state["now"]}
        if time.time() - self.written > 0.5 or done >= self.state["total"]:
            self._write()

    def advance(self, by: int = 1) -> None:
        self.set(self.state["done"] + by)

    def go_on(self, done: int) -> None:
        """So much more was there already: it counts as got further where the work is restarted, and not in its speed."""
        self.state["begun_at"] += done
        if self.state["first"]:
            self.state["first"]["done"] += done
        self.advance(done)

    def end(self) -> None:
        """It is done before all of it was: what is left is not needed."""
        self.state |= {"total": self.state["done"], "spared": self.state["total"] - self.state["done"], "now": time.time()}
        self._write()

    def _write(self) -> None:
        self.written = time.time()
        write_text(self.path, json.dumps(self.state), durable=False)


def code_version() -> str:
    """The release, with the commit where the code lies in a git checkout."""
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists() and shutil.which("git"):  # a compute node may have none
        got = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
        if got.returncode == 0:
            return f"{skinsynth.__version__}+{got.stdout.strip()}"
    return skinsynth.__version__


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance() -> dict[str, Any]:
    return {"skinsynth": code_version(), "versions": versions(), "command": sys.argv, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
