"""Generation, from the plan to the committed shard, beside the plain diffusers loop: one prompt a call, then a file in a folder.

The built-in model on a CPU; where there is a GPU, Stable Diffusion 1.5's size. Same prompts, sampler, steps, guidance and precision, on the
same cores or GPU. What starts once (imports, loading the weights, the first batch) is left out on both sides.
``python -m benchmarks.generate SIDE`` is one measurement, in images/s.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from benchmarks import finetune
from benchmarks.harness import ROOT, SCRATCH, alternate, gpu, in_process, report, together
from skinsynth import cpu

PEER, JPEG = "diffusers, one prompt a call, PNG", "diffusers, one prompt a call, JPEG"


@dataclass(frozen=True)
class Setting:
    """``sides``: what runs, workers, threads of each (0: as they are); the first is ours. ``keys`` beside the demo's."""

    words: str
    sides: dict[str, tuple[str, int, int]]
    keys: tuple[str, ...] = ()


ONE = "skinsynth, 1 worker of 1 thread"
CPU = Setting("64 px, DPM-Solver++ 20 steps, guidance 2.5, float32, built-in model",
              {"skinsynth, 2 workers of 1 thread": ("ours", 2, 1), ONE: ("ours", 1, 1), "skinsynth, 1 worker of 2 threads": ("ours", 1, 2),
               PEER: ("png", 1, 2), JPEG: ("jpg", 1, 2)})
GPU = Setting("512 px, DPM-Solver++ 50 steps, guidance 7.5, bf16, Stable Diffusion 1.5's size, drawn weights",
              {"skinsynth": ("ours", 1, 0), "skinsynth, compiled": ("compiled", 1, 0), PEER: ("png", 1, 0), JPEG: ("jpg", 1, 0)},
              (f"model.base={finetune.GPU.folder / 'model'}", "prepare.size=512", "generate.steps=50", "generate.guidance=7.5",
               "generate.precision=bf16"))
UNIT, LOOP = 32, 16  # images that a worker of ours draws, and the peer
INSTANT = 20_000  # images of the measurement of bookkeeping


def setting() -> Setting:
    return GPU if gpu() else CPU


def settings(folder: Path, workers: int, *more: str) -> list[str]:
    """The demo's classes and prompts, straight from the base model."""
    count = UNIT * workers // 2
    return [f"run={folder / 'run'}", f"data.shards={folder / 'shards'}", "generate.weights=base", "model.attention=sdpa", "generate.batch=16",
            f"generate.shard_size={UNIT}", f"generate.classes.benign.count={count}", f"generate.classes.malignant.count={count}",
            *setting().keys, *more]


def maker(folder: Path, workers: int, index: int, *more: str, instant: bool = False) -> Any:
    from skinsynth import config
    from skinsynth.data.plan import Plan
    from skinsynth.models.painter import Painter, Weights
    from skinsynth.run import RunDir, Task
    from skinsynth.stages.generate import Maker
    from skinsynth.world import World

    cfg = config.load(ROOT / "configs/demo.yaml", settings(folder, workers, *more))
    run, plan = RunDir(Path(cfg.run)), Plan(cfg, None)
    run.create(cfg)
    weights = Weights(cfg, run)
    made = Maker(cfg, run, plan, weights, None, Task(index, workers))
    if not instant:
        made.painter = Painter(cfg, weights, World().device)
    return made


def ours(folder: Path, workers: int, index: int, barrier: Barrier, *more: str) -> None:
    made = maker(folder, workers, index, *more)
    made.painter.draw([made.plan.image(n) for n in range(16)])[0].cpu()  # a GPU would go on with it beside what is measured
    barrier.wait()
    made.unit(index)
    barrier.wait()


def loop(folder: Path, form: str, barrier: Barrier) -> None:
    """As the examples in diffusers' documentation do it."""
    import torch

    from skinsynth import config
    from skinsynth.models import diffusion
    from skinsynth.world import World

    cfg = config.load(ROOT / "configs/demo.yaml", settings(folder, 1))
    g, pipe = cfg.generate, diffusion.load_base(cfg.model, cfg.generate.precision).to(World().device)
    diffusion.set_scheduler(pipe, g.scheduler)
    prompts = [c.prompts[0] for c in g.classes.values()]

    def draw(number: int) -> Any:
        return pipe(prompts[number % 2], negative_prompt=g.negative_prompt, num_inference_steps=g.steps, guidance_scale=g.guidance,
                    height=cfg.prepare.size, width=cfg.prepare.size, generator=torch.Generator().manual_seed(number)).images[0]

    folder.mkdir(parents=True, exist_ok=True)
    draw(0)
    barrier.wait()
    for number in range(LOOP):
        draw(number).save(folder / f"{number:05d}.{form}", **({"quality": 95} if form == "jpg" else {}))
    barrier.wait()


def work(side: str, workers: int, threads: int, folder: Path, index: int, barrier: Barrier) -> None:
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if side in ("ours", "compiled"):
        cpu.before_torch(threads or len(os.sched_getaffinity(0)))
        ours(folder, workers, index, barrier, f"model.compile={str(side == 'compiled').lower()}")
    else:
        loop(folder, side, barrier)


def measure(side: str, workers: int, threads: int) -> float:
    folder = SCRATCH / "generate"
    shutil.rmtree(folder, ignore_errors=True)
    seconds = together(work, [(side, workers, threads, folder, n) for n in range(workers)])
    return (LOOP if side in ("png", "jpg") else UNIT * workers) / seconds


# ---- what all but drawing costs ----

class Instant:
    """Draws in no time: the same picture always."""

    def __init__(self) -> None:
        import numpy as np
        import torch

        ramp = np.linspace(0, 255, 64, dtype=np.uint8)
        picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], 2)
        self.pixels, self.finite = torch.from_numpy(np.tile(picture, (16, 1, 1, 1))), torch.ones(16, dtype=torch.bool)

    def draw(self, batch: list[Any]) -> tuple[Any, Any]:
        return self.pixels, self.finite


def bookkeeping() -> dict[str, float]:
    """Seconds an image, without drawing: ours, and a loop that encodes the JPEG and adds it to a tar."""
    from skinsynth.data.codec import encode_jpeg

    folder = SCRATCH / "instant"
    shutil.rmtree(folder, ignore_errors=True)
    made = maker(folder, 1, 0, f"generate.classes.benign.count={INSTANT // 2}", f"generate.classes.malignant.count={INSTANT // 2}",
                 "generate.shard_size=1000", instant=True)
    made.painter = Instant()
    since = time.perf_counter()
    for unit in range(made.plan.units):
        made.unit(unit)
    own = time.perf_counter() - since
    picture = made.painter.pixels[0].numpy()
    since = time.perf_counter()
    for unit in range(made.plan.units):
        with tarfile.open(folder / f"plain-{unit}.tar", "w") as tar:
            for number in range(1000):
                data = encode_jpeg(picture, 95)
                info = tarfile.TarInfo(f"{number}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"skinsynth": own / INSTANT, "tar alone": (time.perf_counter() - since) / INSTANT}


def main() -> None:
    s = setting()
    if s == GPU:
        in_process("benchmarks.finetune", "model")
    rounds = alternate({side: partial(lambda s: float(in_process("benchmarks.generate", s)), side) for side in s.sides})
    more: dict[str, Any] = {}
    if s == CPU:
        extra = in_process("benchmarks.generate", "bookkeeping")
        two, one = (statistics.median(rounds[side]) for side in (next(iter(s.sides)), ONE))
        share = (extra["skinsynth"] - extra["tar alone"]) * one
        more = {"bookkeeping_seconds_per_image": extra, "two_workers_over_one": round(two / one, 3), "bookkeeping_share": round(share, 5)}
    report("generate", rounds, next(iter(s.sides)), PEER, "images/s", f"{s.words}; from the plan to committed shards (batches of 16) beside files in "
           "a folder; steady state", device=gpu() or "cpu", **more)
    if more:
        print(f"  two workers over one: {more['two_workers_over_one']:.2f}; bookkeeping {more['bookkeeping_share']:.2%} of the time that one worker "
              "draws in")


if __name__ == "__main__":
    print(json.dumps(bookkeeping() if sys.argv[1] == "bookkeeping" else measure(*setting().sides[sys.argv[1]])))
