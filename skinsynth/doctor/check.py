"""What a check says, and the checks that the login node and a compute node share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skinsynth import stages
from skinsynth.data import given
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.models import hub

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it. ``where``: the rank and node, where it was one."""

    state: str
    name: str
    found: str
    todo: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.name:<18} {f'{self.where}: ' if self.where else ''}{self.found}{f' -> {self.todo}' if self.todo else ''}"


def failed(checks: list[Check]) -> bool:
    return any(check.state == FAIL for check in checks)


def guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that breaks is a check that fails."""
    try:
        yield from look()
    except Exception as error:
        yield Check(FAIL, name, stages.explain(error))


def models(cfg: Config, pull: str = "skinsynth pull CONFIG") -> Iterator[Check]:
    """``pull``: the command that fetches them."""
    for key, (name, find) in hub.models(cfg).items():
        try:
            yield Check(OK, key, f"{name}: {find() or 'built from the configuration'}")
        except UserError as error:
            yield Check(FAIL, key, str(error), f"{pull} (where there is internet)")


def size(cfg: Config) -> Iterator[Check]:
    """Whether the base, where it is here, takes images of the configuration's size."""
    try:
        base = hub.find_base(cfg.model)
    except UserError:  # as ``models`` tells
        return
    try:
        hub.check_images(cfg, base)
    except UserError as error:
        yield Check(FAIL, "prepare.size", str(error), "give such a prepare.size=...")


def data(cfg: Config) -> Iterator[Check]:
    """Tables and folders are read as ``prepare`` would, images are not."""
    from skinsynth.data import external, isic

    data, wrong = cfg.data, given.problems(cfg)
    if data.remote:
        yield remote(cfg)
    for key in (*(() if data.remote else given.keys(cfg)), *(["synthetic"] if data.synthetic else [])):
        name = f"data.{key}"
        if key in wrong:
            what, _, todo = wrong[key].removeprefix(f"{name}: ").removeprefix(f"{name} ").partition(": give ")
            yield Check(FAIL, name, what, f"give {todo} ({name}=...)")
            continue
        try:
            path = Path(getattr(data, key))
            if key == "metadata":
                rows, aside = isic.read_metadata(path)
                yield Check(OK, name, f"{path}: {len(rows):,} rows that can be used" + (f", {len(aside):,} that cannot" if aside else ""))
                if not any(row.patient_id or row.lesion_id for row in rows):
                    yield Check(WARN, name, isic.without_ids(path))
            elif key == "synthetic":
                rows, aside = external.read(path)
                more = [external.lacking(rows), f"{len(aside):,} that cannot be used" if aside else ""]
                yield Check(OK, name, ", ".join([f"{path}: {len(rows):,} images", *filter(None, more)]))
            else:
                yield Check(OK, name, f"{path} is there")
                if key == "class_data_dir":
                    yield Check(WARN, name, isic.without_ids(None))
        except UserError as error:
            yield Check(FAIL, name, str(error).removeprefix(f"{name}: "), f"mend it, or give another {name}=...")


def remote(cfg: Config) -> Check:
    """Asks for one manifest there."""
    from skinsynth.data.cache import fetch_bytes

    name = f"{cfg.data.name}-train/manifest.json"
    try:
        fetch_bytes(cfg.data.remote or "", name)
    except UserError as error:
        return Check(FAIL, "data.remote", str(error), "give data.remote=...")
    return Check(OK, "data.remote", f"{cfg.data.remote} gives {name}")


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.resolve()
    return path if path.exists() else existing(path.parent)


def writable(name: str, path: Path, folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"skinsynth")
        return Check(OK, name, f"{path} can be written" + ("" if path.resolve() == folder.resolve() else f" (it is made in {folder})"))
    except OSError as error:
        return Check(FAIL, name, f"{path} cannot be written: {error.strerror} ({folder})", "mend its permissions, or choose another folder")
