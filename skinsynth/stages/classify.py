"""classify: one arm's classifier, trained on its mix of real and synthetic images with one or more seeds, judged on real images only.

All arms take the same number of steps, the same validation and test images, the same augmentations. The checkpoint is chosen by AUROC on
the validation split; the test split is read once, at the end, with that checkpoint::

    classify/hybrid/seed-0/   checkpoints/  metrics.jsonl  epochs.jsonl (validation)  predictions.csv (test)  weights/  metrics.json, last of all
    classify/hybrid/done.json   written by whoever sees all seeds done
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

from skinsynth import config
from skinsynth.data import withdrawn
from skinsynth.errors import UserError
from skinsynth.files import read_json, sha256_file, write_json
from skinsynth.knobs import Config
from skinsynth.models import attention, vit
from skinsynth.quality.metrics import METRICS
from skinsynth.run import RunDir, Task
from skinsynth.train.arms import Data
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.train.engine import Engine
from skinsynth.train.judge import Judge, loss
from skinsynth.train.log import Clock
from skinsynth.train.loop import Place, train
from skinsynth.world import World

WHOLE = Task()

log = logging.getLogger(__name__)


def classify(cfg: Config, run: RunDir, world: World, arm: str, task: Task = WHOLE) -> None:
    """Trains the task's seeds of the arm, one after the other; see above for what is written.

    Raises:
        UserError: unknown arm, an empty source, leakage (see ``data.leakage``), a model that cannot be had, a seed that was trained on images
            that have changed since.
        Stopped: a stop signal; the same command goes on.
    """
    if arm not in cfg.classify.arms:
        raise UserError(f"classify.arms has no '{arm}'; there are {', '.join(cfg.classify.arms)}")
    seeds, node, images = cfg.arm_seeds, f"classify/{arm}", images_sha256(cfg, run, arm)
    for number in task.mine(list(range(len(seeds)))):
        folder = run.seed(arm, seeds[number])
        finished, others = world.gather((run.has_seed(arm, seeds[number]), _other_images(folder, images)))[0]
        if finished and others:
            raise UserError(f"{folder} was trained on other images than there are now: delete {run.node(node)} and launch again, which trains "
                            "it anew")
        if not finished:
            one_seed(cfg, run, world, arm, number)
        if world.is_main:
            run.finish_task(node, Task(number, len(seeds)))
    if world.is_main:
        finish(cfg, run, arm)
    world.barrier()


def images_sha256(cfg: Config, run: RunDir, arm: str) -> str:
    """Of the files that say which images the arm is trained and judged on."""
    paths = [run.dataset(cfg, split) / "manifest.json" for split in ("train", "val", "test")]
    paths += [run.node("screen") / "accepted.json"] if "synthetic" in cfg.classify.arms[arm].used else []
    paths += _withdrawn_from(cfg, run, arm)
    return hashlib.sha256("".join(sha256_file(path) for path in paths if path.is_file()).encode()).hexdigest()


def _withdrawn_from(cfg: Config, run: RunDir, arm: str) -> list[Path]:
    """Where it is written, if anybody withdraws, what no arm may be trained or judged on any more."""
    kinds = ["train", "val", "test", *(["synthetic"] if "synthetic" in cfg.classify.arms[arm].used else [])]
    return [run.dataset(cfg, kind) / withdrawn.NAME for kind in kinds]


def _other_images(folder: Path, images: str) -> bool:
    """Of an older run nobody can tell."""
    return (read_json(folder / "metrics.json") or {}).get("images_sha256", images) != images


def one_seed(cfg: Config, run: RunDir, world: World, arm: str, number: int) -> None:
    """Trains and judges the arm with the seed of that number."""
    seed, folder, c = cfg.arm_seeds[number], run.seed(arm, cfg.arm_seeds[number]), cfg.classify
    clock = Clock()
    clock.lap("start and imports")
    model = vit.build(c, cfg.prepare.size, seed, attention.choose(cfg.model.attention, world.device))
    inputs = vit.Inputs.of(c, model, cfg.prepare.size)
    data, images = Data(cfg, run, arm, seed, inputs.side), images_sha256(cfg, run, arm)
    if data.lineage == "unknown" and world.is_main:
        log.warning("the synthetic images descend from weights of unknown training data: nobody can tell whether the test images were among them")
    judge, scales = Judge(cfg, folder, world, model, inputs, data), vit.rate_scales(model, c.layer_decay) if c.layer_decay < 1 else {}
    clock.lap("models and data")
    checkpoints = Checkpoints(folder / "checkpoints", world, identity(cfg, arm, seed, data), c.keep, c.keep_every)
    clock.lap("finding and checking the checkpoint")
    engine = Engine(c, world, model, "classify", checkpoints.found, scales)
    clock.lap("engine and its state")
    state = train(engine, run, f"classify/{arm}", checkpoints, clock, data, partial(loss, inputs=inputs),
                  partial(judge.evaluate, engine=engine), every=c.evaluate_every, place=Place(folder, number, len(cfg.arm_seeds)))
    figures = judge.finish(state)
    if world.is_main:
        for source in data.sources.values():
            source.dataset.check_withdrawn()
        write_json(folder / "metrics.json", {
            **figures, "seed": seed, "images_sha256": images, "steps": state["steps"], "chosen_step": state["best_step"],
            "chosen_by": {"split": "val", "metric": "auroc", "value": state["best_auroc"]},
            "train_samples": {name: len(source) for name, source in data.sources.items()},
            "bad_samples": state["bad_samples"], **({"lineage": data.lineage} if data.lineage else {})})
    world.barrier()


def identity(cfg: Config, arm: str, seed: int, data: Data) -> dict[str, Any]:
    """What a checkpoint must have been made with. Other arms and seeds may change."""
    found = config.binding(cfg.classify)
    del found["seeds"]
    return {**found, "arms": {arm: found["arms"][arm]}, "seed": seed, "samples_sha256": data.sha256(), "images_sha256": data.images_sha256()}


def finish(cfg: Config, run: RunDir, arm: str) -> None:
    """Writes ``done.json`` where all seeds are done; the seeds that end last may both do it, and write the same."""
    if not all(run.has_seed(arm, seed) for seed in cfg.arm_seeds):
        return
    folders = [run.seed(arm, seed) for seed in cfg.arm_seeds]
    found = [read_json(folder / "metrics.json") for folder in folders]
    mean = {name: _mean([row[name] for row in found]) for name in METRICS}
    lineage = {"lineage": found[0]["lineage"]} if "lineage" in found[0] else {}
    run.finish(f"classify/{arm}", {"mean": mean, "seeds": cfg.arm_seeds, **lineage},
               [path for folder in folders for path in (folder / "weights" / "config.json", folder / "predictions.csv", folder / "metrics.json")],
               _withdrawn_from(cfg, run, arm))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
