"""What a check says, and the checks that the login node and a compute node share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skinsynth import stages
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


def data(cfg: Config) -> Iterator[Check]:
    data = cfg.data
    if data.remote:
        yield remote(cfg)
        return
    pair = ("metadata", "images") if data.metadata or data.images else ("instance_data_dir", "class_data_dir")
    for key in (*pair, *(["duplicates"] if data.duplicates else [])):
        yield _there(f"data.{key}", getattr(data, key), file=key in ("metadata", "duplicates"))


def _there(name: str, given: str | None, file: bool) -> Check:
    """``file``: whether a file is wanted, or a folder."""
    if not given:
        return Check(FAIL, name, "is not set", f"give {name}=...")
    path = Path(given)
    if path.is_file() if file else path.is_dir():
        return Check(OK, name, f"{given} is there")
    if path.is_file():
        return Check(FAIL, name, f"{given} is a file", "give the folder of JPEGs (what HDF5, zip or TFRecord files hold must be unpacked first)")
    return Check(FAIL, name, f"{given} is a folder" if path.is_dir() else f"{given} is not there", f"give {name}=...")


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
