"""What loading costs a thread that only gives orders, as one does that trains on a GPU: a ViT-B/16's operations on tensors of next to no size.

Ours loads in a process of its own (``data/loader.py``), the peer in threads of the same process, as on a CPU; beside both the steps alone. Batches of
224 px from JPEGs that are decoded already, one thread.
``python -m benchmarks.launching SIDE`` is one measurement, in ms a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from benchmarks import classify
from benchmarks.harness import SCRATCH, alternate, in_process, report

BATCH, STEPS, BEGIN, WORKERS = 48, 100, 40, 1
APART, THREADS, ALONE = "a process of its own", "threads of the same process", "nothing loaded"


def data() -> Any:
    """Those of the classifier's benchmark, at ViT-B/16's size."""
    from skinsynth.run import RunDir
    from skinsynth.train.arms import Data

    folder = SCRATCH / f"epochs-{classify.IMAGES}"
    found = Data(classify.configuration(folder, s=classify.GPU), RunDir(folder / "run"), "baseline", 0, classify.GPU.side)
    found.workers = WORKERS
    return found


def measure(side: str) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from skinsynth.data.loader import LoaderProcess
    from skinsynth.data.order import share
    from skinsynth.data.stream import Feed

    model = ViTForImageClassification(ViTConfig(image_size=32, hidden_size=24, intermediate_size=48, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    pixels = torch.randn(1, 3, 32, 32)

    def step() -> None:
        model(pixel_values=pixels).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    source = data()
    for number in range(BEGIN):
        step()
        source.batch(range(number * BATCH, (number + 1) * BATCH))  # decoded, and kept
    todo = [(number, share(number % BEGIN, BATCH, BATCH, 0, 1)) for number in range(BEGIN + STEPS)]
    feed: Any = {APART: lambda: LoaderProcess(source, todo), THREADS: lambda: Feed(source.batch, todo, WORKERS),
                 ALONE: lambda: nullcontext(todo)}[side]()
    with feed as batches:
        for number, _ in batches:
            if number == BEGIN:
                since = time.perf_counter()
            step()
        return 1000 * (time.perf_counter() - since) / STEPS


def main() -> None:
    classify.prepare()
    rounds = alternate({side: partial(lambda side: float(in_process("benchmarks.launching", side)), side) for side in (APART, THREADS, ALONE)}, 7)
    report("launching", rounds, APART, THREADS, "ms/step", "steps (forward, backward, AdamW) of a ViT with ViT-B/16's blocks, 24 channels and one "
           f"image of 32 px, one thread, beside loading {BATCH} images of {classify.GPU.side} px a step from memory by another", higher=False)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
