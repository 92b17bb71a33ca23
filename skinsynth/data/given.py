"""What the user gives as data: is it there, and of the form that ``prepare`` reads? Asked before anything is queued, and by ``prepare`` itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from skinsynth.errors import UserError
from skinsynth.knobs import Config


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
