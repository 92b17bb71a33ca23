"""Seconds to the first step of a restart from a checkpoint beside those of a start from nothing, and where they go: two ranks, ZeRO 2.

``python -m benchmarks.restart HOW`` is one measurement.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial

from benchmarks.finetune import CPU, make_run, prepare
from benchmarks.harness import alternate, in_process, on_two_ranks, report

START, RESTART = "start", "restart"


def measure(how: str) -> dict[str, float]:
    """What ``startup.json`` of a run of four steps says, or that of the same run begun again at step 2."""
    run = make_run(CPU, f"restart-{how}", {"finetune.steps": 4, "finetune.checkpoint_every": 2, "generate.steps": 2})
    on_two_ranks(run.path / "log", "jobs.finetune", run.path)
    node = run.node("finetune")
    if how == RESTART:
        shutil.rmtree(node / "checkpoints/step-00000004")
        run.done_path("finetune").unlink()
        on_two_ranks(run.path / "log", "jobs.finetune", run.path)
    started = json.loads((node / "startup.json").read_text())
    if started["step"] != (2 if how == RESTART else 0):
        raise RuntimeError(f"began at step {started['step']}")
    return {name: float(seconds) for name, seconds in started["seconds"].items()}


def main() -> None:
    parts: dict[str, dict[str, float]] = {}
    prepare(CPU)

    def one(how: str) -> float:
        parts[how] = in_process("benchmarks.restart", how)
        return float(sum(parts[how].values()))

    rounds = alternate({how: partial(one, how) for how in (RESTART, START)}, rounds=3)
    report("restart", rounds, RESTART, START, "s", "seconds from the start of the process to the end of its first step, two CPU ranks under ZeRO 2, "
           "built-in model; where they go stands under seconds_of_the_last", higher=False, seconds_of_the_last=parts)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
