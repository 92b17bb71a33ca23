"""ZeRO 1, 2 and 3 beside plain data parallel, on two ranks: step time, and the bytes of state that a rank holds. On two GPUs with a model of
Stable Diffusion 1.5's size where there are two, else on the CPU.

``python -m benchmarks.zero STAGE`` is one measurement.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from functools import partial
from typing import Any

from benchmarks.finetune import CPU, GPU, Setting, make_run, prepare
from benchmarks.harness import alternate, gpu, gpus, in_process, on_two_ranks, report

CPU_WORDS = ("two CPU ranks of one thread each over gloo, built-in model, batch 16, float32. ZeRO sends the same bytes in more messages (gradients "
             "to the owner of a share, weights back; at stage 3 for every layer, forward and backward), and its hooks on every parameter cost "
             "Python time; a UNet as small as this one hides neither")
GPU_WORDS = "two GPU ranks over NCCL, Stable Diffusion 1.5's size, drawn weights, 512 px, batch 16, bf16"
NAMES = {0: "plain data parallel", 1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3"}


def setting() -> Setting:
    return GPU if len(gpus()) > 1 else CPU


def measure(stage: int) -> dict[str, Any]:
    s = setting()
    run = make_run(s, f"zero-{stage}", {"finetune.zero": stage, "finetune.steps": 5 * s.window})
    on_two_ranks(run.path / "log", "jobs.finetune", run.path)
    rows = [json.loads(line) for line in (run.node("finetune") / "metrics.jsonl").read_text().splitlines()]
    started = json.loads((run.node("finetune") / "startup.json").read_text())
    rate = statistics.median(row["samples_per_second"] for row in rows[s.window::s.window])
    return {"seconds": run.config().finetune.global_batch / rate, "bytes": started["state_bytes"]}


def main() -> None:
    s = setting()
    if s == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare(s)
    sizes: dict[str, dict[str, int]] = {}

    def one(stage: int) -> float:
        found = in_process("benchmarks.zero", stage)
        sizes[NAMES[stage]] = found["bytes"]
        return float(found["seconds"])

    rounds = alternate({NAMES[stage]: partial(one, stage) for stage in NAMES}, rounds=2)
    for stage in (1, 2, 3):
        own = {name: values for name, values in rounds.items() if name in (NAMES[0], NAMES[stage])}
        report(f"zero{stage}", own, NAMES[stage], NAMES[0], "s/step", CPU_WORDS if s == CPU else GPU_WORDS, higher=False,
               device="cpu" if s == CPU else gpu() or "gpu", state_bytes_per_rank={name: sizes[name] for name in own})


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
