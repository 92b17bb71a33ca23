"""Epochs beside the study's own way, transformers' ``Trainer`` over an image folder: the demo's small ViT; where there is a GPU, a ViT-B/16.

The peer's PIL decodes and resizes, numpy flips, turns, changes brightness and contrast and normalises, as the study's script does with
torchvision, which is not used here; on a CPU in the main process (the Trainer's default of no workers), on a GPU in as many workers as ours
has. Same JPEGs, model, batch, optimizer, schedule and precision; timed is the call that trains, from the first image to the last step;
neither side judges, and the peer does not save. On a GPU ours also runs with nothing kept in memory, as a set that does not fit there is read.
``python -m benchmarks.classify SIDE FOLDER EPOCHS`` is one measurement.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import SCRATCH, alternate, gpu, in_process, medians, report


@dataclass(frozen=True)
class Setting:
    """``side`` of the model's images in pixels, ``vit``: its keys; ``workers`` of the loaders (the peer's on a CPU: none); ``lengths``: epochs ->
    name of the result, rounds."""

    model: str
    side: int
    batch: int
    lr: float
    precision: str
    workers: int
    vit: dict[str, int]
    lengths: dict[int, tuple[str, int]]


CPU = Setting("the demo's small ViT", 64, 32, 1e-3, "fp32", 2, {}, {1: ("classify-first-epoch", 9), 5: ("classify", 5)})
# A GPU does an epoch of so few images in a second or two, of which the start would be the half.
GPU = Setting("ViT-B/16, drawn weights", 224, 128, 1e-4, "bf16", 8, {"patch": 16, "hidden_size": 768, "layers": 12, "heads": 12},
              {20: ("classify", 3)})
IMAGES, SIDE = 3000, 256  # as they stand in the shards
OURS, DECODING, PEER = "skinsynth", "skinsynth, nothing kept in memory", "Trainer, image folder, PIL"


def setting() -> Setting:
    return GPU if gpu() else CPU


def configuration(folder: Path, steps: int = 1, s: Setting | None = None, more: dict[str, object] | None = None) -> Any:
    from skinsynth import config

    s = s or setting()
    values = {"run": folder / "run", "data.shards": folder / "shards", "data.name": "bench", "data.metadata": folder / "drawn/metadata.csv",
              "data.images": folder / "drawn/images", "data.duplicates": folder / "drawn/duplicates.csv", "prepare.size": SIDE,
              "prepare.split": "{train: 0.9, val: 0.05, test: 0.05}", "classify.steps": steps, "classify.checkpoint_every": 10**6,
              "classify.warmup_steps": 0, "classify.log_every": 20, "model.attention": "sdpa", "classify.image_size": s.side,
              "classify.global_batch": s.batch,
              "classify.lr": s.lr, "classify.precision": s.precision, "data.workers": s.workers,
              **{f"classify.{key}": value for key, value in s.vit.items()}, **(more or {})}
    return config.load("configs/demo.yaml", [f"{key}={value}" for key, value in values.items()])


def prepare() -> Path:
    """Drawn images, prepared at 256 px; the JPEGs of the training split also as an image folder (benign, malignant). Kept."""
    from skinsynth.data.dataset import Dataset
    from skinsynth.data.phantom import write_dataset
    from skinsynth.run import RunDir, Task
    from skinsynth.stages.prepare import prepare as prepare_stage

    folder = SCRATCH / f"epochs-{IMAGES}"
    if not (folder / "drawn/metadata.csv").exists():
        write_dataset(folder / "drawn", images=IMAGES, malignant=0.3, seed=0)
    cfg, run = configuration(folder), RunDir(folder / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    run.create(cfg)
    prepare_stage(cfg, run, Task())
    train = Dataset.open(run.dataset(cfg, "train"))
    for number, key in enumerate(train.keys):
        path = folder / "folder" / ("malignant" if train.columns["target"][number] else "benign") / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train.read(number, "jpg"))
    return folder


def ours(folder: Path, epochs: int, more: dict[str, object] | None = None) -> dict[str, float]:
    """The stage's own loop, with all cores; ``more``: keys of the configuration."""
    from skinsynth import cpu

    cpu.before_torch(len(os.sched_getaffinity(0)))
    from skinsynth.data.dataset import Dataset
    from skinsynth.models import vit
    from skinsynth.run import RunDir
    from skinsynth.train.arms import Data
    from skinsynth.train.checkpoint import Checkpoints
    from skinsynth.train.engine import Engine
    from skinsynth.train.judge import loss
    from skinsynth.train.log import Clock, read_lines
    from skinsynth.train.loop import train
    from skinsynth.world import World

    batch = setting().batch
    steps = epochs * len(Dataset.open(folder / "shards/bench-train")) // batch
    cfg, run = configuration(folder, steps, more=more), RunDir(folder / "run")
    shutil.rmtree(run.node("epochs"), ignore_errors=True)
    data, model = Data(cfg, run, "baseline", 0, setting().side), vit.build(cfg.classify, SIDE, 0)
    checkpoints, engine = Checkpoints(run.node("epochs") / "checkpoints", World(), {}), Engine(cfg.classify, World(), model, "classify")
    begun = time.perf_counter()
    train(engine, run, "epochs", checkpoints, Clock(), data, partial(loss, inputs=vit.Inputs.of(cfg.classify, model, SIDE)))
    seconds = time.perf_counter() - begun
    rows = read_lines(run.node("epochs") / "metrics.jsonl")
    return {"images_per_second": steps * batch / seconds, **medians(rows, "samples_per_second", "data_wait", "mfu", "peak_memory_gb")}


def peer(folder: Path, epochs: int) -> dict[str, float]:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    from skinsynth.models import vit

    files = sorted((folder / "folder").rglob("*.jpg"))
    s = setting()
    steps = epochs * len(files) // s.batch
    cfg = configuration(folder, steps)

    class Folder(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = Image.open(files[index]).convert("RGB").resize((s.side, s.side), Image.Resampling.BILINEAR)
            pixels = np.rot90(np.asarray(image, np.float32), np.random.randint(4))
            pixels = pixels[:, ::-1] if np.random.rand() < 0.5 else pixels
            pixels = np.clip(pixels * np.random.uniform(0.9, 1.1) + np.random.uniform(-12, 12), 0, 255)
            pixels = (pixels / 255 - 0.5) / 0.5
            return {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)),
                    "labels": int(files[index].parent.name == "malignant")}

    arguments = TrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=s.batch, max_steps=steps, learning_rate=s.lr, weight_decay=0.05,
        lr_scheduler_type="linear", logging_steps=50, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        remove_unused_columns=False, seed=0, bf16=s.precision == "bf16", dataloader_num_workers=s.workers if torch.cuda.is_available() else 0,
        dataloader_persistent_workers=torch.cuda.is_available())
    trainer = Trainer(model=vit.build(cfg.classify, SIDE, 0), args=arguments, train_dataset=Folder())
    begun = time.perf_counter()
    trainer.train()
    return {"images_per_second": steps * s.batch / (time.perf_counter() - begun)}


SIDES: dict[str, Callable[[Path, int], dict[str, float]]] = {"ours": ours, "decoding": partial(ours, more={"data.memory_gb": 0}), "peer": peer}


def main() -> None:
    folder, s, last = prepare(), setting(), {}

    def measure(side: str, epochs: int) -> float:
        last[side] = in_process("benchmarks.classify", side, folder, epochs)
        return float(last[side]["images_per_second"])

    words = {OURS: "ours", **({DECODING: "decoding"} if s == GPU else {}), PEER: "peer"}
    for epochs, (name, count) in s.lengths.items():
        rounds = alternate({side: partial(measure, word, epochs) for side, word in words.items()}, count)
        report(name, rounds, OURS, PEER, "images/s",
               f"{epochs} epochs of the training split of {IMAGES} drawn images, JPEGs of {SIDE} px, {s.model}, {s.side} px, batch {s.batch}, "
               f"{s.precision}; nothing judged; our start and last checkpoint are part of our time, but not of samples_per_second",
               device=gpu() or "cpu", last=last)


if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
