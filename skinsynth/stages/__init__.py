"""The stages, and how one is run: by a job, by submitit, or in-process. torch is imported only once a stage is called.

Unit stages (``UNITS``) run as independent tasks; step stages (``GANGS``) as one gang of ranks. Generation may be either.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from skinsynth import cpu
from skinsynth.errors import UserError
from skinsynth.files import write_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task
from skinsynth.world import Stopped, World, join, leave, lost_peer, on_stop, place, take_turns

UNITS = ("prepare", "encode", "generate", "screen", "report")
GANGS = ("finetune", "classify")
OK, FAILED, STOPPED = 0, 1, 75  # 75: EX_TEMPFAIL, try again
WHOLE = Task()


def run_node(node: str, path: str, task: Task = WHOLE) -> int:
    """Runs a stage, or a stage and its part (``classify/hybrid``), on a run folder. Returns the exit status.

    A failure is told in one message on stderr and in ``<node>/failed/<task>.json``; only what is no ``UserError`` shows a traceback.
    """
    run = RunDir(Path(path))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # images are read by PIL here: that torchvision would be faster for transformers is no use to a reader of the log
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    logging.getLogger("submitit").propagate = False  # it has a handler of its own
    try:
        cfg = run.config()
        if run.is_done(node):
            print(f"{node} of {path} is done already")
            return OK
        before_torch(cfg, run, node)
        _call(node, cfg, run, task)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    except Exception as error:
        if lost_peer(error):  # that rank says why, if it could; a batch script asks Slurm for another turn
            print(f"\n{node} stopped, since another rank went away:", file=sys.stderr)
            traceback.print_exc()
            return STOPPED
        message = explain(error)
        print(f"\n{node} failed: {message}", file=sys.stderr)
        if not isinstance(error, UserError | OSError):
            traceback.print_exc()
        if run.config_path.is_file():  # else it is no run folder, and would become one that looks like it
            with contextlib.suppress(OSError):  # the disk is full, or the folder is not ours: stderr has it
                write_json(run.failed_path(node, task.index), {"node": node, "message": message})
        return FAILED
    return OK


def is_gang(cfg: Config, stage: str) -> bool:
    """Whether a stage is one job of many ranks, rather than independent tasks."""
    return stage in GANGS or (stage == "generate" and cfg.generate.mode == "gang")


def _call(node: str, cfg: Config, run: RunDir, task: Task) -> None:
    """Signals are heard before anything slow (torch) is imported."""
    stage, _, part = node.partition("/")
    world, variables = place() if is_gang(cfg, stage) else (World(), {})
    with on_stop(leave if stage in UNITS else world.note_stop):
        if world.is_main:
            of = len(cfg.arm_seeds) if stage == "classify" else max(world.size, task.count)
            run.begin_task(node, task.index, cfg.cluster.max_restarts, of)
        with cpu.importing():
            function = getattr(importlib.import_module(f"skinsynth.stages.{stage}"), stage)
        if stage in UNITS:
            if is_gang(cfg, stage):
                with take_turns(world, variables) as turns:
                    function(cfg, run, Task(world.rank, world.size), turns)
            else:
                function(cfg, run, task)
            if world.is_main:
                run.finish_task(node, task)
            return
        with join(world, variables):
            function(cfg, run, world, part, task) if part else function(cfg, run, world)


def explain(error: BaseException) -> str:
    """The message for a person: what, where, what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        return (f"no space left, or the quota or file limit is reached{where} ({error.strerror}): free some and start the same command again; "
                "nothing finished is lost")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def before_torch(cfg: Config, run: RunDir, node: str) -> None:
    """CPU threads and memory, where compiled code is kept, and what is not to be imported; in-process runs (debug) keep what they have."""
    if cfg.cluster.kind == "debug" or "torch" in sys.modules:
        return
    cpu.before_torch(cfg.cluster.threads_of(node.split("/")[0]))
    if cfg.model.compile:  # torch itself sets it to a folder of the node at the first import that asks for it
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run.compiled.absolute()))
    if "adamw8bit" not in (cfg.finetune.optimizer, cfg.classify.optimizer):
        # Where it is installed, diffusers and peft import it at every start, for quantized weights, which nothing here has: a sixth of the start.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def main(stage: str) -> None:
    """The body of ``python -m jobs.<stage>``."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=f"Runs {stage} on a run folder; the same command again resumes.")
    parser.add_argument("run", help="run folder, for example runs/isic")
    if stage == "classify":
        parser.add_argument("--arm", required=True, help="one of classify.arms")
        parser.add_argument("--seed", type=int, help="one of classify.seeds; left out: all of them, one after the other")
    if stage in UNITS or stage == "classify":
        parser.add_argument("--task", default="0/1", help="this task and how many there are, for example 0/4")
    args = parser.parse_args()
    index, _, count = getattr(args, "task", "0/1").partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        parser.error(f"--task {args.task}: expected INDEX/COUNT, for example 0/4")
    task = Task(int(index), int(count))
    if stage == "classify":
        task = _arms_task(parser, args, task)
    sys.exit(run_node(f"{stage}/{args.arm}" if stage == "classify" else stage, args.run, task))


def _arms_task(parser: argparse.ArgumentParser, args: argparse.Namespace, task: Task) -> Task:
    """``task``, or that which trains the seed that is asked for. A misspelt arm is told here, before it gets a folder."""
    try:
        cfg = RunDir(Path(args.run)).config()
    except UserError as error:
        parser.exit(FAILED, f"{error}\n")
    if args.arm not in cfg.classify.arms:
        parser.error(f"--arm {args.arm}: classify.arms of {args.run} has {', '.join(cfg.classify.arms)}")
    if args.seed is None:
        return task
    if args.seed not in cfg.arm_seeds:
        parser.error(f"--seed {args.seed}: classify.seeds of {args.run} has {', '.join(map(str, cfg.arm_seeds))}")
    return Task(cfg.arm_seeds.index(args.seed), len(cfg.arm_seeds))
