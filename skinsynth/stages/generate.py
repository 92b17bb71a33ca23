"""generate: the plan, cut into units of one output shard each; every image drawn from its own seed.

What a unit holds depends on the configuration and the weights alone, so any number of tasks and restarts gives the
same bytes (on one kind of device: kernels of different devices round differently).

A faulty image (not finite, or of one colour) is drawn again from the next seed once all others of its unit are there, up to
``generate.retries`` times, and then left out with the reason. So are the images of every round drawn in whole batches.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from skinsynth.data import descent
from skinsynth.data.cache import open_dataset
from skinsynth.data.codec import encode_jpeg
from skinsynth.data.dataset import Dataset
from skinsynth.data.plan import Plan, Planned, key, needs_train
from skinsynth.data.resumable import ResumableWriter
from skinsynth.data.shards import changes, claim, missing_parts, part_path, write_manifest
from skinsynth.errors import UserError
from skinsynth.files import write_bytes, write_json
from skinsynth.knobs import Config
from skinsynth.models.diffusion import padded
from skinsynth.models.painter import Painter, Weights
from skinsynth.quality import sheet
from skinsynth.run import Progress, RunDir, Task, code_version, provenance
from skinsynth.world import World

NODE = "generate"
FLAT = 8  # grey levels (0-255): a picture in which no channel spreads further shows nothing


def generate(cfg: Config, run: RunDir, task: Task, turns: Callable[[], int] | None = None) -> None:
    """Writes ``<run>-synthetic``: per image ``jpg`` and ``json`` (prompt, seed, class, weights hash ...).

    ``turns``: of a gang, whose ranks take the units in turn; the tasks of an array have theirs dealt to them.

    Raises:
        UserError: the weights are not those of the run's fine-tuning or change under way, or the dataset was begun with others.
    """
    train = open_dataset(cfg, run, "train") if needs_train(cfg) else None
    plan, weights, folder = Plan(cfg, train), Weights(cfg, run), run.dataset(cfg, "synthetic")
    claim(folder, _request(plan, weights))
    if not (folder / "provenance.json").exists():
        write_json(folder / "provenance.json", {"run": str(run.path), **provenance()})
    make = Maker(cfg, run, plan, weights, train, task)
    for unit in _units(plan, task, turns):
        if not part_path(folder, unit).exists():
            make.unit(unit)
    if not missing_parts(folder, plan.units):
        _finish(cfg, run, plan, weights)


def _units(plan: Plan, task: Task, turns: Callable[[], int] | None) -> Iterable[int]:
    """Those of a task, or what it gets of a gang's until there are none."""
    if turns is None:
        return task.mine(list(range(plan.units)))
    return takewhile(lambda unit: unit < plan.units, iter(turns, None))


def _request(plan: Plan, weights: Weights) -> dict[str, Any]:
    return {**plan.request(), "weights_sha256": weights.sha256, "settings": _settings(plan.cfg)}


def _settings(cfg: Config) -> dict[str, Any]:
    g = cfg.generate
    start = {} if g.method == "text-to-image" else {"strength": g.strength, **({"redraw": g.redraw} if g.method == "inpaint" else {})}
    return {"method": g.method, **start, "size": cfg.prepare.size, "steps": g.steps, "guidance": g.guidance, "scheduler": g.scheduler,
            "negative_prompt": g.negative_prompt, "batch": g.batch, "quality": g.quality, "precision": g.precision, "retries": g.retries,
            **({"compiled": True} if cfg.model.compile else {})}


def _finish(cfg: Config, run: RunDir, plan: Plan, weights: Weights) -> None:
    folder = run.dataset(cfg, "synthetic")
    lineage = {**weights.lineage, "trained_group_ids": weights.lineage["group_ids"], **_parents(plan, weights)}
    classes = {c.name: {"target": c.target, "count": c.count, "prompts": list(c.prompts)} for c in plan.classes}
    manifest = write_manifest(folder, plan.units, kind="synthetic", lineage=lineage, planned=plan.total, settings=_settings(cfg), class_names=classes)
    if not manifest["count"]:
        raise UserError(f"none of the {plan.total} planned images could be made; the first: {manifest['set_aside'][0]['reason']}. Look at the "
                        f"previews in {run.node('finetune')}, or try precision fp32; then delete {folder}")
    run.finish(NODE, {"images": manifest["count"], "planned": plan.total, "classes": manifest["classes"], "left_out": len(manifest["set_aside"])},
               [folder / "manifest.json"])


def _parents(plan: Plan, weights: Weights) -> dict[str, Any]:
    """Of images that are made from others: what these are called, and the groups that they descend from by the weights or by them (None: unknown)."""
    known = weights.lineage["group_ids"]
    if plan.cfg.generate.method == "text-to-image" or plan.train is None:
        return {}
    used = descent.names(plan.train, {i for c in plan.classes for samples in c.samples for i in samples})
    return {"drawn_over": used, "group_ids": None if known is None else sorted({*known, *used["groups"]})}


class Maker:
    """Makes units. The networks are loaded for the first one."""

    def __init__(self, cfg: Config, run: RunDir, plan: Plan, weights: Weights, train: Dataset | None, task: Task):
        self.cfg, self.run, self.plan, self.weights, self.train = cfg, run, plan, weights, train
        self.folder, self.settings = run.dataset(cfg, "synthetic"), _settings(cfg)
        self.painter: Painter | None = None
        self.kept: Future[None] | None = None
        made = set(range(plan.units)) - set(missing_parts(self.folder, plan.units))
        mine = task.mine(list(range(plan.units)))
        self.progress = Progress(run, NODE, task.index, sum(len(plan.numbers(u)) for u in mine), "images",
                                 sum(len(plan.numbers(u)) for u in mine if u in made), plan.total)

    def unit(self, unit: int) -> None:
        """One shard, from nothing or from where it was broken off; given up where another task has made it meanwhile."""
        self.weights.check()
        if not self.painter:
            self.painter = Painter(self.cfg, self.weights, World().device, self.train)
            self.progress.ready()
        done = self.progress.state["done"]
        with ResumableWriter(self.folder, unit) as shard, ThreadPoolExecutor(1) as pool:
            state = shard.state or {"attempt": 0, "batches": 0, "todo": list(self.plan.numbers(unit)), "faulty": []}
            self.progress.go_on(len(shard.keys))
            shard.extra["made_by"] = {"code": code_version(), "torch": torch.__version__, "device": _device_name()}
            for batch, count in self._batches(state):
                drawn = self.painter.draw(batch)
                self._wait()
                if shard.is_made():
                    break
                self.kept = pool.submit(self._keep, shard, state, batch[:count], *drawn)  # beside the next batch
        self.progress.set(done + len(self.plan.numbers(unit)))
        sheet.refresh(self.folder, unit, self.run.node(NODE) / "sheets")

    def _batches(self, state: dict[str, Any]) -> Iterator[tuple[list[Planned], int]]:
        """Round after round, from where the state stands; it is moved on by ``_keep``."""
        while state["todo"]:
            images = [self.plan.image(number, state["attempt"]) for number in state["todo"]]
            size, begun = self.cfg.generate.batch, state["batches"]
            yield from padded(images[begun * size:], size)
            self._wait()
            state |= {"attempt": state["attempt"] + 1, "batches": 0, "todo": state["faulty"], "faulty": []}

    def _wait(self) -> None:
        """Until what was drawn before is written."""
        if self.kept:
            self.kept.result()
            self.kept = None

    def _keep(self, shard: ResumableWriter, state: dict[str, Any], images: list[Planned], pixels: torch.Tensor, finite: torch.Tensor) -> None:
        """Writes a batch, as far as it is good."""
        good, found = finite.cpu().numpy(), pixels.cpu().numpy()  # waits for the device, in this thread
        for image, is_finite, drawn in zip(images, good, found, strict=False):
            fault = _fault(drawn, is_finite)
            if not fault:
                self._add(shard, image, drawn)
            elif image.attempt < self.cfg.generate.retries:
                state["faulty"].append(image.number)
            else:
                shard.skip(image.key, f"{fault} from each of {image.attempt + 1} seeds")
        state["batches"] += 1
        every = self.cfg.generate.commit_every
        if every and state["batches"] % every == 0:
            shard.save(state)
        self.progress.advance(len(images) - sum(image.number in state["faulty"] for image in images))

    def _add(self, shard: ResumableWriter, image: Planned, pixels: np.ndarray) -> None:
        record = {**self.settings, "prompt": image.prompt, "seed": image.seed, "attempt": image.attempt, "class": image.name, "target": image.target,
                  "number": image.number, "weights_sha256": self.weights.sha256, "base": self.weights.lineage["base"], "origin": "synthetic"}
        columns: dict[str, Any] = {"target": image.target, "class": image.name, "seed": image.seed, "attempt": image.attempt, **image.attributes}
        if any(image.attributes.values()):
            record["attributes"] = image.attributes
        if image.source is not None and self.train is not None:
            columns |= {"source": self.train.keys[image.source], "source_group": self.train.columns["group"][image.source]}
            record |= {name: columns[name] for name in ("source", "source_group")}
        shard.add(image.key, {"jpg": encode_jpeg(pixels, self.cfg.generate.quality), "json": json.dumps(record).encode()}, **columns)


def _fault(pixels: np.ndarray, finite: bool) -> str | None:
    if not finite:
        return "values that are not finite"
    spread = int((pixels.max((0, 1)).astype(int) - pixels.min((0, 1))).max())
    return f"one colour alone (no channel spreads over more than {spread} grey levels)" if spread < FLAT else None


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def regenerate(cfg: Config, run: RunDir, keys: list[str]) -> dict[str, np.ndarray]:
    """The pixels of images of the run's plan, drawn once more: uint8 (height, width, 3) by key. Each is drawn in the batch that it was
    drawn in, since the last bits depend on that.

    Raises:
        UserError: no such image, other weights than they were made with, another plan (since a withdrawal its images are made from others), or
            an image that was left out.
    """
    train = open_dataset(cfg, run, "train") if needs_train(cfg) else None
    plan, weights = Plan(cfg, train), Weights(cfg, run)
    dataset = Dataset.open(run.dataset(cfg, "synthetic"))
    if dataset.manifest["lineage"]["weights_sha256"] != weights.sha256:
        raise UserError(f"{dataset.folder} was made with weights {dataset.manifest['lineage']['weights_sha256']}, these are {weights.sha256}")
    changed = changes(dataset.folder, _request(plan, weights))
    if changed:
        raise UserError(f"images of {dataset.folder} cannot be drawn again, since {run.path} plans others now than it was made from:\n  "
                        + "\n  ".join(changed))
    painter, found = Painter(cfg, weights, World().device, train), {}
    for name in keys:
        if name not in dataset.keys:
            aside = [item["reason"] for item in dataset.manifest["set_aside"] if item["key"] == name]
            raise UserError(f"{dataset.folder} has no image {name}" + (f": it was left out ({aside[0]})" if aside else ""))
        found[name] = _redraw(plan, painter, dataset, name, cfg.generate.batch)
    return found


def save_png(pixels: np.ndarray, path: Path, quality: int, jpeg: bytes) -> bool:
    """Writes uint8 (height, width, 3) as a PNG; says whether it gives the very JPEG bytes of the shard."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write_bytes(path, file.getvalue())
    return encode_jpeg(pixels, quality) == jpeg


def _redraw(plan: Plan, painter: Painter, dataset: Dataset, name: str, size: int) -> np.ndarray:
    place = dataset.keys.index(name)
    attempt, unit = dataset.columns["attempt"][place], dataset.places.shards[place]
    attempts = {dataset.keys[i]: dataset.columns["attempt"][i] for i in dataset.shard_samples(unit)}
    todo = [n for n in plan.numbers(unit) if attempts.get(key(n), attempt) >= attempt]  # those left out were drawn in every round
    index = [key(n) for n in todo].index(name)
    images = [plan.image(n, attempt) for n in todo[index - index % size:][:size]]
    source = images[index % size].source
    if source is not None and plan.train is not None and plan.train.keys[source] != dataset.columns["source"][place]:
        raise UserError(f"{name} of {dataset.folder} cannot be drawn again: it was made from {dataset.columns['source'][place]} by another version "
                        f"of skinsynth, this one would take {plan.train.keys[source]}")
    batch, _ = next(padded(images, size))
    return painter.draw(batch)[0][index % size].cpu().numpy()
