"""How an arm is judged: on validation images while it is trained, and once, with the checkpoint chosen there, on the test images."""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skinsynth.data.dataset import Dataset
from skinsynth.data.stream import Feed
from skinsynth.errors import UserError
from skinsynth.files import mode_by_umask, put_in_place, write_bytes
from skinsynth.knobs import Config
from skinsynth.models import vit
from skinsynth.quality.metrics import binary_metrics
from skinsynth.train.arms import CLASSES, Data
from skinsynth.train.checkpoint import states
from skinsynth.train.engine import Batch, Engine
from skinsynth.train.log import keep_lines
from skinsynth.world import World

AT_ONCE = 64  # images that are judged together at most: a global batch of many ranks is too much for one of them
COLUMNS = ("sex", "age", "site", "diagnosis")  # of predictions.csv; empty: unknown


def loss(model: Any, batch: Batch, inputs: vit.Inputs) -> torch.Tensor:
    """Cross-entropy with soft and weighted targets (float (n, classes)), the mean over the samples, so that no rank's share of the classes shows."""
    scores = vit.logits(model, batch["images"], inputs.side, inputs.mean, inputs.std)
    return -(batch["target"] * F.log_softmax(scores, 1)).sum(1).mean()


class Judge:
    """Evaluates with a model of its own, into which the weights (their moving average where there is one) are put whole: the same at every ZeRO
    stage, and no collective while it runs. ``folder``: where this seed of the arm keeps its files.

    Raises:
        UserError: the validation images are all of one class.
    """

    def __init__(self, cfg: Config, folder: Path, world: World, model: Any, inputs: vit.Inputs, data: Data):
        self.cfg, self.folder, self.world, self.inputs, self.data = cfg.classify, folder, world, inputs, data
        self.model = copy.deepcopy(model).to(world.device).eval()
        self.last_phase = data.phases[-1].begin // cfg.classify.global_batch  # weights or a stop from before it would make another arm of it
        val = data.splits["val"]
        if len(set(val.columns["target"])) < CLASSES:
            raise UserError(f"{val.folder}: all {len(val)} images are of target {val.columns['target'][0]}, and AUROC, by which the checkpoint is "
                            "chosen, needs both classes: take more images or a larger prepare.split.val, with another run and data.name")

    def evaluate(self, step: int, state: dict[str, Any], engine: Engine) -> None:
        """One line in ``epochs.jsonl``; keeps the weights when validation AUROC is the best so far of the last phase, and ends the training where
        it has not been for ``patience`` evaluations. A collective."""
        own = dict(self.model.named_parameters())
        for name, weight in engine.weights():
            own[name].data.copy_(weight)
        row = self._metrics("val", self.scores(self.data.splits["val"]))
        row = self.world.gather(row)[0]  # so that all ranks decide the same, whatever their last bits say
        if self.world.is_main:
            keep_lines(self.folder / "epochs.jsonl", step - 1)
            epoch = step * self.cfg.global_batch / len(self.data.splits["train"])
            with open(self.folder / "epochs.jsonl", "a") as f:
                f.write(json.dumps({"step": step, "epoch": round(epoch, 3), "val": row}) + "\n")
        state["steps"] = step
        if step <= self.last_phase:
            return
        if "best_auroc" not in state or row["auroc"] > state["best_auroc"]:
            state.update(best_auroc=row["auroc"], best_step=step, waited=0)
            if self.world.is_main:
                self._keep(step)
        else:
            state["waited"] += 1
        if self.cfg.patience and state["waited"] >= self.cfg.patience:
            state["ended"] = True

    @torch.inference_mode()
    def scores(self, split: Dataset) -> np.ndarray:
        """float32 (n,): probability of malignant, every rank doing its share. Batches are whole, so the cut shows in no bit. A collective."""
        size, device = min(self.cfg.global_batch, AT_ONCE), self.world.device
        starts, cuda = range(0, len(split), size), device.type == "cuda"
        found: dict[int, torch.Tensor] = {}
        reduced = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.cfg.precision)
        todo = ((start, [range(start, start + size)]) for start in list(starts)[self.world.rank::self.world.size])
        with Feed(partial(self._images, split), todo, self.data.workers, pin=cuda, turns=not cuda) as feed:
            for start, (batch,) in feed:
                with torch.autocast(device.type, reduced) if reduced else nullcontext():
                    found[start] = self._probability(batch["images"].to(device, non_blocking=True))
        merged: dict[int, np.ndarray] = {}
        for part in self.world.gather({start: values.cpu().numpy() for start, values in found.items()}):
            merged |= part
        return np.concatenate([merged[start] for start in starts])[: len(split)]

    def _images(self, split: Dataset, positions: range) -> Batch:
        """uint8 (n, 3, side, side); beyond the split's end its last image."""
        found = [self.data.decoded.read(split, min(i, len(split) - 1)).transpose(2, 0, 1) for i in positions]
        return {"images": torch.from_numpy(np.stack(found))}

    def _probability(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (n,): the mean over the views of each image."""
        found = [vit.logits(self.model, view, self.inputs.side, self.inputs.mean, self.inputs.std).softmax(1)[:, 1]
                 for view in vit.views(images, self.cfg.tta)]
        return torch.stack(found).mean(0)

    def _metrics(self, name: str, scores: np.ndarray) -> dict[str, Any]:
        targets = np.array(self.data.splits[name].columns["target"])
        right = np.where(targets == 1, scores, 1 - scores)
        return {**binary_metrics(targets, scores), "loss": float(-np.log(np.clip(right, 1e-7, 1)).mean())}

    def _keep(self, step: int) -> None:
        """The best so far, under its step's name: a restart from an older checkpoint finds its own best again."""
        folder = self._best(step)
        temp = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temp, ignore_errors=True)
        self.model.save_pretrained(temp)
        mode_by_umask(*temp.rglob("*.safetensors"))
        self.inputs.write(temp)
        put_in_place(temp, folder)
        self._forget(step)

    def _forget(self, step: int) -> None:
        """The former best that no checkpoint refers to; one that is on its way to the disk refers to none older than the newest there does."""
        needed = {state["best_step"] for at, state in states(self.folder / "checkpoints").items() if at < step and "best_step" in state}
        for old in self.folder.glob("best-*"):
            if int(old.name[5:]) < max(needed, default=0) and int(old.name[5:]) not in needed:
                shutil.rmtree(old)

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def finish(self, state: dict[str, Any]) -> dict[str, Any]:
        """Scores the test images, this once, with the chosen weights, which go to their place; returns the test figures. A collective."""
        chosen, weights = self._best(state["best_step"]), self.folder / "weights"
        there = self.world.gather(chosen.exists())[0]  # not so when a run died after they went to their place
        # not the file's own names: transformers writes those of its earlier releases
        best = type(self.model).from_pretrained(chosen if there else weights, local_files_only=True, dtype=torch.float32)
        self.model.load_state_dict(best.state_dict())
        scores = self.scores(self.data.splits["test"])
        self.world.barrier()  # all have read the weights
        if self.world.is_main:
            write_bytes(self.folder / "predictions.csv", predictions(self.data.splits["test"], scores))
            if there:
                put_in_place(chosen, weights)
            for old in self.folder.glob("best-*"):
                shutil.rmtree(old)
        return self._metrics("test", scores)


def predictions(test: Dataset, scores: np.ndarray) -> bytes:
    """The CSV: key, group, target, score (nine digits tell all float32) and what is known of each image."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["key", "group", "target", "score", *COLUMNS])
    known = [["" if value is None else value for value in test.columns.get(name, [None] * len(test))] for name in COLUMNS]
    rows.writerows(zip(test.keys, test.columns["group"], test.columns["target"], (f"{s:.9g}" for s in scores), *known, strict=True))
    return text.getvalue().encode()
