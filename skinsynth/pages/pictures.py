"""Pictures of a run as data URIs: images of either kind, pairs, previews, and whatever plots and sheets the stages left."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from skinsynth.data.cache import open_dataset
from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.errors import UserError
from skinsynth.files import read_json
from skinsynth.knobs import Config
from skinsynth.pages import screening
from skinsynth.run import RunDir

CLASSES = {0: "benign", 1: "malignant"}
GRID, COLUMNS = 12, 6  # images per class and source, and in a row
SHEETS = 6  # contact sheets on the page; more would make it heavy
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


def picture(path: Path) -> str | None:
    """The file as it is, or None where there is none."""
    return f"data:{KINDS[path.suffix]};base64," + base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def png(image: np.ndarray) -> str:
    """``image``: uint8 (height, width, 3), RGB."""
    import cv2

    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()).decode()


def readable(data: Dataset, numbers: Iterable[int], most: int, bad: dict[str, str]) -> list[np.ndarray]:
    """The first images, ``most`` of them, that can be read: uint8 (height, width, 3). ``bad`` gets the keys of others before them, and why; of
    a dataset that is not to be had at all its folder's name."""
    found: list[np.ndarray] = []
    for number in numbers:
        if len(found) == most or data.folder.name in bad:
            break
        try:
            found.append(data.image(number))
        except BadSample as error:
            bad[error.key] = f"{Path(error.folder).name}/{error.shard}: {error.reason}"
        except UserError as error:  # its tars lie elsewhere, and that does not answer: nor will it for the next one
            bad[data.folder.name] = str(error)
    return found


def grids(cfg: Config, run: RunDir, bad: dict[str, str]) -> list[tuple[str, str, int, str]]:
    """(class, source, number of images, picture) of the first images of each class: real training images, and accepted synthetic ones, or, of a set
    that did not pass as a whole and has no list of these, any. ``bad``: as in ``readable``."""
    found, stopped, accepted = [], screening.stopped(run) is not None, set((read_json(run.node("screen") / "accepted.json") or {"keys": []})["keys"])
    for target, name in CLASSES.items():
        for source, kind in (("real", "train"), ("synthetic", "synthetic")):
            try:
                data = open_dataset(cfg, run, kind)
            except UserError as error:
                if run.done_path("prepare" if kind == "train" else "screen").is_file():  # else the page says that there are none
                    bad[run.dataset(cfg, kind).name] = str(error)
                continue
            chosen = (i for i in data.select({"target": target}) if kind == "train" or stopped or data.keys[i] in accepted)
            images = readable(data, chosen, GRID, bad)
            if images:
                filled = images + [np.full_like(images[0], 255)] * (-len(images) % COLUMNS)
                rows = [np.concatenate(filled[r:r + COLUMNS], axis=1) for r in range(0, len(filled), COLUMNS)]
                found.append((name, source, len(images), png(np.concatenate(rows))))
    return found


def pairs(cfg: Config, run: RunDir, bad: dict[str, str]) -> list[dict[str, Any]]:
    """The nearest pairs as ``screen`` found them, each with its picture: synthetic left, training right. ``bad``: as in ``readable``."""
    listed = read_json(run.node("screen") / "pairs.json") or []
    try:
        synthetic, train = open_dataset(cfg, run, "synthetic"), open_dataset(cfg, run, "train")
    except UserError:  # told by ``grids``
        return []
    number = {key: i for data in (synthetic, train) for i, key in enumerate(data.keys)}
    both = [(pair, [*readable(synthetic, [number[pair["key"]]], 1, bad), *readable(train, [number[pair["train_key"]]], 1, bad)])
            for pair in listed if pair["key"] in number and pair["train_key"] in number]
    return [{**pair, "picture": png(np.concatenate(images, axis=1))} for pair, images in both if len(images) == 2]


def previews(run: RunDir) -> list[tuple[str, str | None]]:
    """(caption, picture): before and after, and the strip where more was drawn on the way."""
    folder = run.node("finetune") / "previews"
    steps = sorted(folder.glob("[0-9]*.png"))
    found = [("before" if int(path.stem) == 0 else f"after {int(path.stem):,} steps", picture(path)) for path in (*steps[:1], *steps[1:][-1:])]
    return [*found, ("over time: the number of steps above each", picture(folder / "strip.png"))] if len(steps) > 2 else found


def plots(run: RunDir) -> list[tuple[str, str | None]]:
    """(name, picture) of the plots that ``screen`` drew: spectra, and what lies in ``figures``."""
    folder = run.node("screen")
    files = [*sorted(folder.glob("spectr*.png")), *sorted(p for p in (folder / "figures").glob("*") if p.suffix in KINDS)]
    return [(path.stem.replace("_", " ").replace("-", " "), picture(path)) for path in files]


def sheets(run: RunDir) -> tuple[list[tuple[str, str | None]], int]:
    """((name, picture) of the first contact sheets of ``generate``, how many there are)."""
    files = sorted((run.node("generate") / "sheets").glob("*.jpg"))
    return [(path.stem, picture(path)) for path in files[:SHEETS]], len(files)
