"""Slurm, as it looks from the login node: does it answer, and would it take each stage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from skinsynth import slurm, stages
from skinsynth.chain import Node, chain
from skinsynth.doctor.check import FAIL, OK, WARN, Check
from skinsynth.knobs import Config
from skinsynth.run import RunDir


def answers(cfg: Config | None) -> Iterator[Check]:
    """Its programs, and whether the controller and the accounting answer."""
    wanted = cfg is not None and cfg.cluster.kind == "slurm"
    try:
        version = slurm.ask("sbatch", "--version").strip()
        slurm.queued(["skinsynth-doctor"])
    except slurm.SlurmError as error:
        if cfg and not wanted:
            yield Check(OK, "slurm", f"not needed by cluster.kind={cfg.cluster.kind} ({error})")
        else:
            yield Check(FAIL if wanted else WARN, "slurm", str(error), "" if wanted else "only cluster=local and cluster=debug will work here")
        return
    yield Check(OK, "slurm", f"{version}, squeue answers")
    try:
        slurm.ask("sacct", "--noheader", "--allocations", "--starttime=now")
        yield Check(OK, "slurm accounting", "sacct answers")
    except slurm.SlurmError as error:
        yield Check(WARN, "slurm accounting", str(error), "how a job ended is known for some minutes only (scontrol); its logs stay")


@dataclass(frozen=True)
class Partition:
    """``minutes``: its time limit; ``up`` of ``nodes`` nodes can be used now."""

    name: str
    default: bool
    open: bool
    minutes: float
    up: int
    nodes: int


def partitions() -> dict[str, Partition]:
    """What sinfo says, by name."""
    found: dict[str, Partition] = {}
    for line in slurm.ask("sinfo", "--noheader", "--format=%P|%a|%l|%F").splitlines():
        name, state, limit, counts = line.split("|")
        allocated, idle, _, total = (int(number) for number in counts.split("/"))
        found[name.rstrip("*")] = Partition(name.rstrip("*"), name.endswith("*"), state == "up", minutes(limit), allocated + idle, total)
    return found


def minutes(limit: str) -> float:
    """``1-02:03:04``, ``8:00:00``, ``10:00`` or ``infinite`` in minutes."""
    if not limit[0].isdigit():
        return inf
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return (int(days or 0) * 24 + hours) * 60 + mins + seconds / 60


def fits(cfg: Config) -> Iterator[Check]:
    """Each stage's wishes beside its partition, and then sbatch's own word."""
    if cfg.cluster.kind != "slurm":
        return
    there, run = partitions(), RunDir(Path(cfg.run))
    for node in {node.stage: node for node in chain(cfg)}.values():
        problem = _unfit(cfg, node.stage, there)
        try:
            words = "" if problem else _test_only(cfg, run, node.name)
        except slurm.SlurmError as error:
            problem = Check(FAIL, node.stage, str(error), f"change cluster.stages.{node.stage}")
        if problem:
            yield problem
        else:
            wanted = cfg.cluster.of(node.stage)
            yield Check(OK, node.stage, f"sbatch would take it: {wanted.minutes} minutes{words}")


def _unfit(cfg: Config, stage: str, there: dict[str, Partition]) -> Check | None:
    wanted, nodes = cfg.cluster.of(stage), cfg.cluster.of(stage).nodes if stages.is_gang(cfg, stage) else 1
    asked = str(cfg.cluster.site(stage).get("partition") or "")
    chosen = [p for p in there.values() if p.name in asked.split(",") or (not asked and p.default)]
    key = f"cluster.stages.{stage}"
    if not chosen:
        what = f"there is no partition {asked}" if asked else "no partition is asked for and none is Slurm's default"
        return Check(FAIL, stage, f"{what}; there are {', '.join(there)}", f"set {key}.partition (or cluster.partition)")
    best = max(chosen, key=lambda p: (p.minutes, p.nodes))
    if wanted.minutes > best.minutes:
        return Check(FAIL, stage, f"asks for {wanted.minutes} minutes, partition {best.name} allows {best.minutes:g}", f"lower {key}.minutes")
    most = max(chosen, key=lambda p: p.nodes)
    if nodes > most.nodes:
        return Check(FAIL, stage, f"asks for {nodes} nodes, partition {most.name} has {most.nodes}", f"lower {key}.nodes")
    if not any(p.open for p in chosen) or nodes > max(p.up for p in chosen):
        return Check(WARN, stage, f"partition {most.name}: {most.up} of {most.nodes} nodes can be used now, it asks for {nodes}", "it will wait")
    return None


def _test_only(cfg: Config, run: RunDir, node: str) -> str:
    """What the whole script gets to hear: accounts, GPUs, memory, constraints. Nothing is submitted."""
    count = Node(node, ()).tasks(cfg)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(slurm.script(cfg, run, node, count, []))
        file.flush()
        slurm.ask("sbatch", "--test-only", file.name)
    return f", {count} tasks" if count > 1 else ""
