"""What the user gives as data: is it there, of the form that ``prepare`` reads, and still what was prepared? Asked before anything is queued, and by
``prepare`` itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from skinsynth.data.folders import MISSING, image_files
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_or_none
from skinsynth.knobs import Config
from skinsynth.run import RunDir


def check(cfg: Config) -> None:
    """Raises ``UserError`` with the first thing that is wrong."""
    for problem in problems(cfg).values():
        raise UserError(problem)


def problems(cfg: Config) -> dict[str, str]:
    """Key of ``data`` -> what is wrong with it; looks at nothing inside files and folders."""
    data = cfg.data
    found = {} if data.remote else dict(_real(cfg))
    if data.synthetic and not Path(data.synthetic).is_dir():
        found["synthetic"] = f"data.synthetic: {data.synthetic} is not a folder: give the folder of synthetic images"
    return found


def keys(cfg: Config) -> tuple[str, ...]:
    """The keys of ``data`` by which real images are given."""
    data = cfg.data
    pair = ("metadata", "images") if data.metadata or data.images else ("instance_data_dir", "class_data_dir")
    return (*pair, *(["duplicates"] if data.duplicates else []))


def _real(cfg: Config) -> Iterator[tuple[str, str]]:
    data = cfg.data
    if data.metadata and data.instance_data_dir:
        yield "metadata", "data: give either metadata with images, or instance_data_dir with class_data_dir, not both"
    for key in keys(cfg):
        given = getattr(data, key)
        if not given:
            yield key, f"data.{key} is not set: give metadata with images, or instance_data_dir with class_data_dir"
        elif key in ("metadata", "duplicates") and not Path(given).is_file():
            yield key, f"data.{key}: {given} {'is a folder' if Path(given).exists() else 'does not exist'}: give the path of the CSV"
        elif key == "images" and not Path(given).is_dir():
            advice = "; what HDF5, zip or TFRecord files hold must be unpacked first" if Path(given).exists() else ""
            yield key, f"data.images: {given} is not a folder: give the folder of image files{advice}"
        elif not Path(given).exists():
            yield key, f"data.{key}: {given} is not a folder: give a folder of images"


def check_unchanged(cfg: Config, run: RunDir, tell: Callable[[str], None]) -> None:
    """Whether what was prepared is what is given now, as far as tables and names of files say: no image is read. What is not there (any more) is not
    asked about, since a run may be moved. ``tell`` hears of images that were missing and are there now, and of synthetic ones that are gone or new.

    Raises:
        UserError: a table has changed.
    """
    folder, changes = run.dataset(cfg, "train"), list(_changed_tables(cfg, run))
    if changes:
        shards = cfg.data.shards
        raise UserError(f"{folder} was made from other data than there are now:\n  " + "\n  ".join(changes) +
                        "\nput back what it was made from; or take another data.name and run; or delete "
                        f"{shards}/{cfg.data.name}-*, {shards}/{run.name}-* and {run.path}, and launch again")
    _tell_synthetic(cfg, run, tell)
    if run.is_done("prepare") and not cfg.data.remote:
        tell_new(cfg, (a["key"] for a in read_json(folder / "manifest.json")["set_aside"] if a["reason"] == MISSING), tell)


def _changed_tables(cfg: Config, run: RunDir) -> Iterator[str]:
    request = {} if cfg.data.remote else read_json(run.dataset(cfg, "train") / "request.json") or {}
    for key in ("metadata", "duplicates"):
        path, before = getattr(cfg.data, key), request.get(f"{key}_sha256")
        with contextlib.suppress(PermissionError):
            now = sha256_or_none(Path(path)) if path else None
            if before and now and now != before:
                yield f"data.{key}: {path} has changed since (its sha256 was {before[:12]}, now {now[:12]})"


def _tell_synthetic(cfg: Config, run: RunDir, tell: Callable[[str], None]) -> None:
    """Who took some images out expects them to be used no more, who added some that they are; who took all saves room."""
    folder = run.dataset(cfg, "synthetic")
    plan = read_json(folder / "plan.json") if cfg.data.synthetic and not cfg.data.remote else None
    if not plan or not cfg.data.synthetic:
        return
    files = [os.path.split(row["file"]) for row in plan["rows"]]
    places = {place for place, _ in files}  # listed, since to ask for each of their files takes long on a network's file system
    there = {place: set(os.listdir(place)) if os.path.isdir(place) else set() for place in places}
    gone = [os.path.join(place, name) for place, name in files if name not in there[place]]
    anew = f"in another run, or delete {folder} and {run.path}, and launch again"
    if 0 < len(gone) < len(files):
        tell(f"{len(gone)} of {len(files)} images of data.synthetic are gone since it was prepared (first: {gone[0]}). They are used all the same; "
             f"to do without, prepare {anew}")
    if "unused" not in plan or not Path(cfg.data.synthetic).is_dir():  # a plan of an earlier version does not say what else was there
        return
    known = {*(os.path.normpath(row["file"]) for row in plan["rows"]), *plan["unused"]}
    new = [path for path in map(os.path.normpath, image_files(Path(cfg.data.synthetic))) if path not in known]
    if new:
        tell(f"{len(new)} images of data.synthetic are new since it was prepared (first: {new[0]}). They are not taken: for them, prepare {anew}")


def tell_new(cfg: Config, missing: Iterable[str], tell: Callable[[str], None]) -> None:
    """Who added images after the first preparation expects them to be taken."""
    wanted, data = set(missing), cfg.data
    files = image_files(Path(data.images)) if wanted and data.images and Path(data.images).is_dir() else ()
    there = sorted({file.stem for file in files} & wanted)
    if there:
        tell(f"{len(there)} images that were missing when {data.name} was prepared are there now (first: {there[0]}). They are not taken: for them, "
             f"prepare under another data.name, or delete {data.shards}/{data.name}-* and launch again")
