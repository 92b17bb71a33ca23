"""The chain of nodes: what must be done before what, and the job that does one. No torch here.

What is pickled for a job is two strings, the node and the run folder (and its task numbers and, without Slurm, its GPUs): the job reads the run's
``config.yaml`` itself.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from skinsynth import config, stages
from skinsynth.errors import UserError
from skinsynth.knobs import Config
from skinsynth.run import Task


@dataclass(frozen=True)
class Node:
    """A stage, or an arm of classify, with the nodes that must be done before it."""

    name: str
    needs: tuple[str, ...]

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]

    def tasks(self, cfg: Config) -> int:
        """Independent tasks: a gang is one, of many ranks; an arm has a gang for each seed."""
        if self.stage == "classify":
            return len(cfg.arm_seeds)
        return 1 if stages.is_gang(cfg, self.stage) else cfg.cluster.of(self.stage).array


def chain(cfg: Config, until: str | None = None) -> list[Node]:
    """The nodes in an order in which they may run. ``until``: a stage or a node; what it does not need is left out.

    Raises:
        UserError: no arm to train, or no such stage in this chain.
    """
    if not cfg.classify.arms:
        raise UserError("classify.arms is empty: give at least one arm, such as baseline: {sources: {real: 1}}")
    nodes = [Node(name, needs) for name, needs in config.needs(cfg).items()]
    if until is None:
        return nodes
    wanted = {node.name for node in nodes if until in (node.name, node.stage)}
    if not wanted:
        raise UserError(f"this chain has no stage '{until}'; it has {', '.join(node.name for node in nodes)}")
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.needs)
    return [node for node in nodes if node.name in wanted]


@dataclass(frozen=True)
class StageJob:
    """What submitit pickles and a job calls."""

    node: str
    run: str
    task: int = 0
    tasks: int = 1
    gpus: str | None = None  # those of this machine that are the job's, as CUDA_VISIBLE_DEVICES names them; None: as Slurm says

    def __call__(self) -> str:
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        code = stages.run_node(self.node, self.run, Task(self.task, self.tasks))
        on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        if code == stages.FAILED or (code == stages.STOPPED and on_slurm):  # slurm/requeue.sh reads the status
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # told already, in the log: submitit would add its own traceback
        return {stages.OK: "done", stages.STOPPED: "stopped"}[code]
