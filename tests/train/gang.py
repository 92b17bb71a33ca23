"""Runs a list of trainings one after the other in the same ranks, so that a matrix of them pays for the start of two processes alone.

``python gang.py LIST.json`` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set: a list of run folders, whose fine-tuning is run, or of
``folder#arm``, whose arm is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from skinsynth.run import RunDir
from skinsynth.world import World, join


def main(paths: list[str], world: World) -> None:
    from skinsynth.stages.classify import classify
    from skinsynth.stages.finetune import finetune

    for entry in paths:
        path, _, arm = entry.partition("#")
        run = RunDir(Path(path))
        if arm:
            classify(run.config(), run, world, arm)
        else:
            finetune(run.config(), run, world)
        print(f"done {entry}", flush=True)


if __name__ == "__main__":
    here = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    with join(here, {}):
        main(json.loads(Path(sys.argv[1]).read_text()), here)
