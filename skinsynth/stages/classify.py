"""classify: one arm's ViT, trained on its mix of real and synthetic images, judged on real images only.

All arms take the same number of steps, the same seeds, the same validation and test images. The checkpoint is chosen
by AUROC on the validation split; the test split is drawn over the epochs for the figure and never chooses anything.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from skinsynth import config
from skinsynth.data.cache import open_dataset
from skinsynth.data.order import Mixture, sample_rng
from skinsynth.data.shards import BadSample, Dataset
from skinsynth.data.stream import Source
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.models import vit
from skinsynth.quality.metrics import binary_metrics
from skinsynth.run import RunDir, read_json, write_bytes
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import Clock, keep_lines, read_lines
from skinsynth.train.loop import train
from skinsynth.world import World

METRICS = ("accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity")


def classify(cfg: Config, run: RunDir, world: World, arm: str) -> None:
    """Trains the arm and writes ``weights`` (transformers layout), ``epochs.jsonl`` and ``predictions.csv`` (test split).

    Raises:
        UserError: unknown arm, an empty source, synthetic images or a shared group in validation or test data.
        Stopped: a stop signal; the same command goes on.
    """
    if arm not in cfg.classify.arms:
        raise UserError(f"classify.arms has no '{arm}'; there are {', '.join(cfg.classify.arms)}")
    clock = Clock()
    clock.lap("start and imports")
    data = Data(cfg, run, arm)
    model = vit.build(cfg.classify, cfg.prepare.size, cfg.seed)
    clock.lap("models and data")
    identity = config.binding(cfg.classify)
    identity["arms"] = {arm: identity["arms"][arm]}  # the other arms may change
    identity["samples_sha256"] = data.sha256()
    checkpoints = Checkpoints(run.node(f"classify/{arm}") / "checkpoints", world, identity, cfg.classify.keep, cfg.classify.keep_every)
    clock.lap("finding and checking the checkpoint")
    engine = Engine(cfg.classify, world, model, "classify", checkpoints.found)
    clock.lap("engine and its state")
    judge = Judge(cfg, run, arm, engine, data)
    state = train(engine, run, f"classify/{arm}", checkpoints, clock, data, judge.loss, judge.evaluate, cfg.classify.evaluate_every)
    if world.is_main:
        judge.finish(state)
    world.barrier()


class Data:
    """The arm's sources and the held-out splits."""

    def __init__(self, cfg: Config, run: RunDir, arm: str):
        self.seed, self.workers = cfg.seed, cfg.data.workers
        tolerate = cfg.data.on_error == "skip"  # of what is trained on; what is judged on must be whole
        self.splits = {name: open_dataset(cfg, run, name, tolerate and name == "train") for name in ("train", "val", "test")}
        weights = {name: weight for name, weight in cfg.classify.arms[arm].sources.items() if weight > 0}
        self.names = list(weights)
        self.sources = {name: self._source(cfg, run, name) for name in self.names}
        check_held_out(self.splits, self.sources)
        for name, source in self.sources.items():
            if not len(source):
                raise UserError(f"classify.arms.{arm}: the source '{name}' has no image")
        found = self.sources.values()
        self.mixture = Mixture(tuple(map(len, found)), tuple(weights.values()), cfg.seed, tuple(s.shards for s in found), cfg.data.streams,
                               cfg.data.shuffle_window)

    def _source(self, cfg: Config, run: RunDir, name: str) -> Source:
        if name == "real":
            return Source(self.splits["train"], range(len(self.splits["train"])), cfg.data.on_error)
        accepted = read_json(run.node("screen") / "accepted.json")
        if accepted is None:
            raise UserError(f"{run.node('screen')} has no accepted.json: the synthetic images were not screened")
        synthetic, keys = open_dataset(cfg, run, "synthetic", cfg.data.on_error == "skip"), set(accepted["keys"])
        return Source(synthetic, [i for i, key in enumerate(synthetic.keys) if key in keys], cfg.data.on_error)

    def sha256(self) -> str:
        """Of the names of all samples that may be drawn."""
        lines = (f"{name} {source.dataset.keys[i]}\n" for name, source in self.sources.items() for i in source.samples)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def batch(self, positions: range) -> Batch:
        """images uint8 (n, 3, height, width), augmented; target int64 (n,)."""
        images, targets = zip(*(self._one(position) for position in positions), strict=True)
        return {"images": torch.from_numpy(np.stack(images)), "target": torch.tensor(targets)}

    def keys(self, positions: range) -> list[str]:
        """The names of the samples at those positions."""
        places = [self.mixture.at(position) for position in positions]
        found = [self.sources[self.names[number]] for number, _ in places]
        return [source.dataset.keys[source.samples[index]] for source, (_, index) in zip(found, places, strict=True)]

    @property
    def bad(self) -> list[BadSample]:
        return [error for source in self.sources.values() for error in source.bad]

    def _one(self, position: int) -> tuple[np.ndarray, int]:
        number, index = self.mixture.at(position)
        image, target = self.sources[self.names[number]].read(index, _labelled)
        return augment(image, sample_rng(self.seed, position)).transpose(2, 0, 1), target


def _labelled(dataset: Dataset, number: int) -> tuple[np.ndarray, int]:
    return dataset.image(number), int(dataset.columns["target"][number])


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (height, width, 3) of the same shape: one of the eight flips and turns (a lesion has no up), a little brightness and contrast."""
    image = np.rot90(image, int(rng.integers(4)))
    if rng.random() < 0.5:
        image = image[:, ::-1]
    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
    table = np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)  # of each of the 256 values what becomes of it
    return cv2.LUT(np.ascontiguousarray(image), table)


def check_held_out(splits: dict[str, Dataset], sources: dict[str, Source]) -> None:
    """Validation and test data are real, and share no group with what is trained on, the generator's training included.

    Raises:
        UserError: names the split and the first groups or samples.
    """
    trained = set(splits["train"].columns["group"])
    for source in sources.values():
        trained |= set(source.dataset.manifest.get("lineage", {}).get("group_ids") or [])  # None: weights of unknown descent
    for name in ("val", "test"):
        manifest = splits[name].manifest
        if manifest.get("kind") != "real":
            raise UserError(f"{splits[name].folder} is of kind '{manifest.get('kind')}': only real images may be in the {name} split")
        shared = sorted(trained & set(splits[name].columns["group"]))
        if shared:
            raise UserError(f"leakage: {len(shared)} groups of the {name} split were trained on (by the classifier or the generator): "
                            f"{', '.join(shared[:5])}; make the datasets again with prepare")


class Judge:
    """Loss, evaluation and the choice of the checkpoint."""

    def __init__(self, cfg: Config, run: RunDir, arm: str, engine: Engine, data: Data):
        self.cfg, self.engine, self.data, self.world = cfg.classify, engine, data, engine.world
        self.run, self.arm, self.folder = run, arm, run.node(f"classify/{arm}")
        config = engine.bare.config
        self.side = self.cfg.image_size or (config.image_size if hasattr(config, "image_size") else cfg.prepare.size)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(vit.logits(model, batch["images"], self.side), batch["target"])

    def evaluate(self, step: int, state: dict[str, Any]) -> None:
        """One line in ``epochs.jsonl``; keeps the weights when validation AUROC is the best so far. A collective."""
        scores = {name: self._scores(self.data.splits[name]) for name in ("val", "test")}
        weights = self.engine.weights()
        if not self.world.is_main:
            return
        rows = {name: self._metrics(name, score) for name, score in scores.items()}
        keep_lines(self.folder / "epochs.jsonl", step - 1)
        epoch = step * self.cfg.global_batch / len(self.data.splits["train"])
        with open(self.folder / "epochs.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "epoch": round(epoch, 3), **rows}) + "\n")
        best = state.get("best_auroc")
        if best is None or (rows["val"]["auroc"] or 0) > best:
            state.update(best_auroc=rows["val"]["auroc"] or 0.0, best_step=step)
            self._keep(step, weights, scores["test"])

    @torch.inference_mode()
    def _scores(self, split: Dataset) -> np.ndarray:
        """float32 (n,): probability of malignant, every rank doing its share. Batches are whole, so the cut shows in no bit."""
        model, size = self.engine.model.eval(), self.cfg.global_batch
        starts, found = range(0, len(split), size), {}
        for start in list(starts)[self.world.rank::self.world.size]:
            picks = [min(i, len(split) - 1) for i in range(start, start + size)]
            images = torch.from_numpy(np.stack([split.image(i).transpose(2, 0, 1) for i in picks])).to(self.engine.device)
            found[start] = vit.logits(model, images, self.side).softmax(1)[:, 1].cpu().numpy()
        merged: dict[int, np.ndarray] = {}
        for part in self.world.gather(found):
            merged |= part
        return np.concatenate([merged[start] for start in starts])[: len(split)]

    def _metrics(self, name: str, scores: np.ndarray) -> dict[str, Any]:
        targets = np.array(self.data.splits[name].columns["target"])
        right = np.where(targets == 1, scores, 1 - scores)
        return {**binary_metrics(targets, scores), "loss": float(-np.log(np.clip(right, 1e-7, 1)).mean())}

    def _keep(self, step: int, weights: dict[str, torch.Tensor], test_scores: np.ndarray) -> None:
        """The best so far, under its step's name: a restart from an older checkpoint finds its own best again."""
        folder = self.folder / f"best-{step:08d}"
        temp = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temp, ignore_errors=True)
        self.engine.bare.save_pretrained(temp, state_dict=weights)
        write_bytes(temp / "predictions.csv", self._predictions(test_scores))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temp, folder)

    def _predictions(self, scores: np.ndarray) -> bytes:
        test, text = self.data.splits["test"], io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["key", "group", "target", "score"])
        rows.writerows(zip(test.keys, test.columns["group"], test.columns["target"], (f"{s:.6f}" for s in scores), strict=True))
        return text.getvalue().encode()

    def finish(self, state: dict[str, Any]) -> None:
        """Moves the chosen weights to their place and says how the arm did."""
        chosen, weights = self.folder / f"best-{state['best_step']:08d}", self.folder / "weights"
        if chosen.exists():  # not so when a run died between here and done.json
            write_bytes(self.folder / "predictions.csv", (chosen / "predictions.csv").read_bytes())
            shutil.rmtree(weights, ignore_errors=True)
            os.replace(chosen, weights)
        row = next(r for r in read_lines(self.folder / "epochs.jsonl") if r["step"] == state["best_step"])
        samples = {name: len(source) for name, source in self.data.sources.items()}
        self.run.finish(f"classify/{self.arm}", {**{m: row["test"][m] for m in METRICS}, "chosen_step": row["step"], "steps": self.cfg.steps,
                                                 "train_samples": samples}, [weights / "config.json", self.folder / "predictions.csv"])
        for old in self.folder.glob("best-*"):
            shutil.rmtree(old)
