"""The checks that need no compute node: Python, packages, configuration, models, data, disk."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from math import inf
from pathlib import Path

from skinsynth import config as configs
from skinsynth import estimate
from skinsynth.doctor import cluster
from skinsynth.doctor.check import FAIL, OK, WARN, Check, data, existing, guarded, models, size, writable
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.run import RunDir

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def login(path: str | None, overrides: list[str] | None, checksums: bool) -> tuple[list[Check], Config | None]:
    """All checks that need no compute node, and the configuration where it can be used."""
    found, cfg = [_python(), packages()], None
    if path:
        try:
            cfg = configs.load(path, overrides)
            found.append(Check(OK, "configuration", f"{path} can be used"))
        except UserError as error:
            found.append(Check(FAIL, "configuration", str(error)))
    found += guarded("slurm", lambda: cluster.answers(cfg))
    if cfg:
        found += guarded("slurm", lambda: cluster.fits(cfg))
        found += guarded("models", lambda: models(cfg, shlex.join(["skinsynth", "pull", str(path), *(overrides or [])])))
        found += guarded("prepare.size", lambda: size(cfg))
        found += guarded("data", lambda: data(cfg))
        found += guarded("disk", lambda: _disk(cfg))
        found += guarded("run folder", lambda: _run_folder(cfg))
        found += guarded("checksums", lambda: _checksums(cfg)) if checksums else []
    return found, cfg


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    return Check(OK if good else FAIL, "python", f"{platform.python_version()} in {sys.prefix}", "" if good else "take 3.11 or newer")


def packages(package: str = "skinsynth", constraints: Path = CONSTRAINTS) -> Check:
    """What is installed beside what the tests ran with."""
    if not constraints.is_file():
        return Check(WARN, "packages", f"{constraints.name} does not lie beside the package: nothing to compare with")
    pins = (line.split("#")[0].strip().partition("==") for line in constraints.read_text().splitlines())
    tested = {_canonical(name): version for name, _, version in pins if version}
    have = {_canonical(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()}  # 2.13.0+cpu is 2.13.0
    missing = sorted(_needed(package) - have.keys())
    other = [f"{name} {have[name]} (tested: {version})" for name, version in tested.items() if have.get(name, version) != version]
    if missing:
        return Check(FAIL, "packages", f"missing: {', '.join(missing)}", "pip install -c constraints.txt -e .")
    if other:
        return Check(WARN, "packages", f"other versions than those tested: {', '.join(other)}", "pip install -c constraints.txt -e .")
    return Check(OK, "packages", f"{len(tested.keys() & have.keys())} in the versions that were tested, torch {metadata.version('torch')}")


def _needed(package: str, found: set[str] | None = None) -> set[str]:
    """The packages that this one requires, and those that they do; extras aside."""
    from packaging.requirements import Requirement

    found = set() if found is None else found
    with contextlib.suppress(metadata.PackageNotFoundError):
        for text in metadata.requires(package) or []:
            one = Requirement(text)
            name = _canonical(one.name)
            if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
                found.add(name)
                _needed(name, found)
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _disk(cfg: Config) -> Iterator[Check]:
    """Room for what is still to be written, per file system; quotas are not seen."""
    run = RunDir(Path(cfg.run))
    left = [stage for stage in estimate.estimate(cfg) if not run.is_done(stage.node)]
    needs: dict[int, list[estimate.Stage]] = {}
    names: dict[int, tuple[Path, list[str]]] = {}
    for where, nodes in ((Path(cfg.data.shards), ("prepare", "encode", "generate")), (run.path, ("finetune", "screen", "classify", "report"))):
        base = existing(where)
        device = base.stat().st_dev
        needs.setdefault(device, []).extend(s for s in left if s.node.split("/")[0] in nodes)
        names.setdefault(device, (base, []))[1].append(str(where))
    for device, (base, paths) in names.items():
        yield _room(base, " and ".join(paths), needs[device])


def _room(base: Path, paths: str, needed: list[estimate.Stage]) -> Check:
    free = os.statvfs(base)
    room, inodes = free.f_bavail * free.f_frsize, free.f_favail if free.f_files else inf
    size, count = sum(s.bytes or 0 for s in needed), sum(s.files or 0 for s in needed)
    unknown = [s.node for s in needed if s.bytes is None]
    found = f"{paths}: {estimate.size(room)} free, about {estimate.size(size)} to be written in {count} files"
    if size > room or count > inodes:
        what = "" if size > room else f" (only {inodes} inodes are free)"
        return Check(FAIL, "disk", found + what, "make room, or put data.shards and run elsewhere")
    if unknown:
        return Check(WARN, "disk", f"{found}, not counting {', '.join(unknown)}, whose size is unknown")
    return Check(OK, "disk", found)


def _run_folder(cfg: Config) -> Iterator[Check]:
    run = RunDir(Path(cfg.run))
    for name, path in (("run folder", run.path), ("data.shards", Path(cfg.data.shards))):
        yield writable(name, path, existing(path))
    if run.config_path.exists():
        changed = configs.difference(cfg, run.config())
        if changed:
            yield Check(FAIL, "run folder", f"{run.path} was made with another configuration: {'; '.join(changed)}", "take another run=...")


def _checksums(cfg: Config) -> Iterator[Check]:
    from skinsynth.data.cache import open_dataset

    run = RunDir(Path(cfg.run))
    for kind in ("train", "val", "test", "latents", "synthetic"):
        folder = run.dataset(cfg, kind)
        if not (folder / "manifest.json").is_file():
            continue
        try:
            bad = open_dataset(cfg, run, kind).verify()
        except UserError as error:
            yield Check(FAIL, "checksums", str(error))
            continue
        found = f"{folder}: {len(bad)} shards differ from their sha256: {', '.join(bad)}" if bad else f"{folder}: all shards are as they were written"
        yield Check(FAIL if bad else OK, "checksums", found, f"delete {folder} and make it again" if bad else "")
