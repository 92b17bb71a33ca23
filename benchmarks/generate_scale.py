"""Plan, resume scan, verify and merge of generation at 100,000 and 1,000,000 images in units of 1,000, with a model that draws in no time.

``python -m benchmarks.generate_scale WHAT IMAGES`` is one measurement: seconds, and the process's peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, SCRATCH, in_process
from skinsynth.files import write_json
from skinsynth.run import code_version, versions

SIZES = (100_000, 1_000_000)
STEPS = ("plan", "make", "resume", "merge", "verify")


def folder_of(images: int) -> Path:
    return SCRATCH / f"scale-{images}"


def begun(images: int) -> Any:
    from benchmarks.generate import Instant, maker

    made = maker(folder_of(images), 1, 0, f"generate.classes.benign.count={images // 2}", f"generate.classes.malignant.count={images - images // 2}",
                 "generate.shard_size=1000", instant=True)
    made.painter = Instant()
    return made


def plan(images: int) -> Callable[[], object]:
    """Every image of it, from its number."""
    made = begun(images)
    return lambda: [None for unit in range(made.plan.units) for number in made.plan.numbers(unit) if made.plan.image(number) is None]


def make(images: int) -> Callable[[], object]:
    from skinsynth.data.shards import claim

    made = begun(images)
    claim(made.folder, {**made.plan.request(), "weights_sha256": made.weights.sha256, "settings": made.settings})
    return lambda: [made.unit(unit) for unit in range(made.plan.units)]


def resume(images: int) -> Callable[[], object]:
    """What a restart does before its first image: the plan, the claim, which units are there."""
    make(images)  # what is imported once is left out
    return lambda: make(images)


def merge(images: int) -> Callable[[], object]:
    from skinsynth.stages.generate import _finish

    made = begun(images)
    return lambda: _finish(made.cfg, made.run, made.plan, made.weights)


def verify(images: int) -> Callable[[], object]:
    from skinsynth.data.verify import verify as check

    def run() -> None:
        found = check(folder_of(images) / "shards/run-synthetic")
        if found.problems or found.images != images:
            raise RuntimeError(f"{found.images} images, {found.problems[:3]}")

    return run


def measure(what: str, images: int) -> dict[str, float]:
    work = {"plan": plan, "make": make, "resume": resume, "merge": merge, "verify": verify}[what](images)
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 3), "peak_MB": round(peak / 1024, 1), "grown_MB": round((peak - before) / 1024, 1)}


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for images in SIZES:
        shutil.rmtree(folder_of(images), ignore_errors=True)
        found[str(images)] = {}
        for step in STEPS:
            found[str(images)][step] = in_process("benchmarks.generate_scale", step, images, env={"OMP_NUM_THREADS": "1"})
            print(f"  {images:,} images: {step}: {found[str(images)][step]}", flush=True)
        shutil.rmtree(folder_of(images))
    write_json(RESULTS / "generate-scale-cpu.json", {
        "name": "generate-scale", "device": "cpu", "cores": len(os.sched_getaffinity(0)), "images": found, "versions": versions(),
        "commit": code_version(), "measured": "units of 1,000 images of 64 px, one process; make draws in no time"})


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
