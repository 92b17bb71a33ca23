"""How long a save holds up a training, beside accelerate's ``save_state``, which diffusers' examples call: two ranks, ZeRO 2, a UNet of
86 million parameters, with its optimizer's states 1.0 GB.

The peer writes DeepSpeed's own files and returns when they are written (not when they are on the disk). Ours copies what a rank holds
to the host's memory, looks whether it is finite, and returns; a thread writes, hashes and syncs it beside the steps that follow, which it slows on a
CPU. So two times are taken: until the call returns, and by how much the save and the ``BESIDE`` steps after it take longer than such steps alone.

``python -m benchmarks.checkpoint SIDE FOLDER`` is one rank.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import SCRATCH, alternate, on_two_ranks, report

OURS, PEER = "skinsynth", "accelerate's save_state"
SAVES = 2  # that count
BESIDE = 3  # steps


def rank(side: str, folder: Path) -> None:
    """Rank 0 writes the medians to ``result.json``."""
    from skinsynth import cpu

    cpu.before_torch(1)
    import torch
    from diffusers import UNet2DConditionModel

    from skinsynth import config
    from skinsynth.train.checkpoint import Checkpoints
    from skinsynth.train.engine import Engine
    from skinsynth.world import join, place

    cfg = config.load("configs/demo.yaml", ["finetune.zero=2", "finetune.global_batch=2"]).finetune
    world, variables = place()
    with join(world, variables):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=64, block_out_channels=(128, 256, 384, 384))
        engine = Engine(cfg, world, unet, "finetune")
        batch = {"noisy": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([500]), "text": torch.randn(1, 77, 64)}
        checkpoints = Checkpoints(folder / "ours", world, {}, keep=1)

        def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(batch["noisy"], batch["timestep"], batch["text"], return_dict=False)[0].square().mean()

        def steps() -> None:
            for _ in range(BESIDE):
                engine.step(1e-5, 0.0, [batch], loss)

        def save(step: int) -> None:
            if side == "ours":
                checkpoints.save(step, engine, {})
            else:
                engine.accelerator.save_state(str(folder / "peer"))
            world.barrier()

        found: dict[str, list[float]] = {"held": [], "alone": [], "beside": []}
        steps()
        for number in range(SAVES + 1):
            found["alone"].append(_timed(steps))
            found["held"].append(_timed(partial(save, number)))
            since = time.perf_counter()
            steps()
            checkpoints.wait()
            found["beside"].append(time.perf_counter() - since)
        alone, held, beside = (statistics.median(found[name][1:]) for name in ("alone", "held", "beside"))  # the first save makes files grow
        if world.is_main:
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            (folder / "result.json").write_text(json.dumps({"held": held, "longer": held + beside - alone, "steps": alone, "bytes": written}))


def _timed(work: Any) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def measure(side: str) -> dict[str, float]:
    folder = SCRATCH / "checkpoint" / side
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    on_two_ranks(folder.parent / f"{side}.log", "benchmarks.checkpoint", side, folder)
    found: dict[str, float] = json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder)
    return found


def main() -> None:
    last: dict[str, dict[str, float]] = {}

    def one(name: str, side: str) -> float:
        last[name] = measure(side)
        return last[name]["held"]

    rounds = alternate({OURS: partial(one, OURS, "ours"), PEER: partial(one, PEER, "peer")}, rounds=3)
    report("checkpoint", rounds, OURS, PEER, "s", "seconds that the call holds up two CPU ranks under ZeRO 2, a UNet of 86 million parameters with "
           f"its optimizer's states (1.0 GB); under last: by how much the save and the {BESIDE} steps after it take longer than such steps alone, "
           "seconds of those steps, bytes on the disk", higher=False, last=last)


if __name__ == "__main__":
    rank(sys.argv[1], Path(sys.argv[2]))
