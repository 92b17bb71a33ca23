"""Launching: the chain of nodes, and who runs them: submitit's local executor, or this very process. No torch here.

What is pickled for a job is two strings, the node and the run folder (and its task numbers): the job reads the run's
``config.yaml`` itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from skinsynth import stages
from skinsynth.config import Config
from skinsynth.errors import UserError
from skinsynth.models import hub
from skinsynth.run import RunDir, Task, birth, read_json, write_json
from skinsynth.watch import LiveTable

GRACE = 30  # seconds that a job has to save its state when the launch is stopped


@dataclass(frozen=True)
class Node:
    """A stage, or an arm of classify, with the nodes that must be done before it."""

    name: str
    needs: tuple[str, ...]

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]


def chain(cfg: Config) -> list[Node]:
    """The nodes in an order in which they may run. An arm without synthetic images needs only ``prepare``.

    Raises:
        UserError: no arm to train.
    """
    if not cfg.classify.arms:
        raise UserError("classify.arms is empty: give at least one arm, such as baseline: {sources: {real: 1}}")
    nodes = [Node("prepare", ()), Node("encode", ("prepare",)), Node("finetune", ("encode",)), Node("generate", ("finetune",)),
             Node("screen", ("generate",))]
    for arm, wanted in cfg.classify.arms.items():
        nodes.append(Node(f"classify/{arm}", ("screen",) if wanted.sources.get("synthetic") else ("prepare",)))
    return [*nodes, Node("report", tuple(n.name for n in nodes if n.stage in ("screen", "classify")))]


@dataclass(frozen=True)
class StageJob:
    """What submitit pickles and a job calls."""

    node: str
    run: str
    task: int = 0
    tasks: int = 1

    def __call__(self) -> str:
        code = stages.run_node(self.node, self.run, Task(self.task, self.tasks))
        if code == stages.FAILED:
            os._exit(code)  # told already, in failed.json and in the log: submitit would add its own traceback
        return {stages.OK: "done", stages.STOPPED: "stopped"}[code]


def launch(cfg: Config, console: Console) -> Path:
    """Runs what is not done yet; the same command again goes on. Returns the path of the report.

    Raises:
        UserError: another configuration or another launch in this folder, or a stage failed (its message, its log).
    """
    run, nodes = RunDir(Path(cfg.run)), chain(cfg)
    run.create(cfg)
    if all(run.is_done(node.name) for node in nodes):
        console.print(f"all {len(nodes)} stages of {run.path} are done already")
        return run.path / "report" / "index.html"
    hub.resolve_base(cfg.model.base)  # a missing model is told now, not by the second job
    with run.lock():
        stop_jobs(run, console, "stopping what an earlier launch left running:")
        if cfg.cluster.kind == "debug":
            in_process(run, nodes)
        else:
            Local(cfg, run, nodes, console).run_all()
    return run.path / "report" / "index.html"


def in_process(run: RunDir, nodes: list[Node]) -> None:
    """All nodes one after the other in this process: for tests and debuggers."""
    for node in nodes:
        if not run.is_done(node.name) and stages.run_node(node.name, str(run.path)) != stages.OK:
            raise UserError(f"{node.name} did not finish: {(read_json(run.failed_path(node.name)) or {}).get('message', 'it was stopped')}")


@dataclass
class Local:
    """A small scheduler over submitit's local executor: nodes start when what they need is done and cores are free."""

    cfg: Config
    run: RunDir
    nodes: list[Node]
    console: Console
    jobs: dict[str, list[Any]] = field(default_factory=dict)  # node -> its running submitit jobs
    failed: dict[str, str] = field(default_factory=dict)

    def run_all(self) -> None:
        table = LiveTable(self.run, [n.name for n in self.nodes], self.console)
        try:
            with table:
                while self._advance():
                    table.refresh({**dict.fromkeys(self.jobs, "running"), **dict.fromkeys(self.failed, "failed")})
                    time.sleep(0.2)
                table.refresh(dict.fromkeys(self.failed, "failed"))
        except BaseException:
            stop_jobs(self.run, self.console, "stopping")
            raise
        finally:
            (self.run.path / "jobs.json").unlink(missing_ok=True)
        if self.failed:
            lines = [f"{node} failed: {message}\n  log: {self._log(node)}" for node, message in self.failed.items()]
            raise UserError("\n".join(lines) + "\nmend it and start the same command again: what is done is kept")

    def _advance(self) -> bool:
        """Collects what ended, starts what may start; False when nothing runs and nothing more can."""
        for ended in [n for n, jobs in self.jobs.items() if all(job.done() for job in jobs)]:
            del self.jobs[ended]
            if not self.run.is_done(ended):
                why = read_json(self.run.failed_path(ended)) or {"message": "it ended without a word (killed, or out of memory?)"}
                self.failed[ended] = why["message"]
        for node in self.nodes:
            if self._may_start(node):
                self._start(node)
        return bool(self.jobs)

    def _may_start(self, node: Node) -> bool:
        if node.name in self.jobs or node.name in self.failed or self.run.is_done(node.name):
            return False
        cluster = self.cfg.cluster
        busy = sum(cluster.busy_cores(n.stage) for n in self.nodes if n.name in self.jobs)
        free = busy + cluster.busy_cores(node.stage) <= cluster.all_cores
        return all(self.run.is_done(need) for need in node.needs) and (not busy or free)

    def _start(self, node: Node) -> None:
        from submitit import LocalExecutor

        self.run.failed_path(node.name).unlink(missing_ok=True)
        wanted = self.cfg.cluster.of(node.stage)
        executor = LocalExecutor(self.run.node(node.name) / "submit")
        gang = node.stage in stages.GANGS
        executor.update_parameters(timeout_min=wanted.minutes, tasks_per_node=wanted.tasks_per_node if gang else 1,
                                   gpus_per_node=wanted.gpus_per_node, stderr_to_stdout=True)
        count = 1 if gang else wanted.array
        with _ignored(signal.SIGINT):  # a job inherits that: Ctrl-C is for the launch, which then stops its jobs in order
            self.jobs[node.name] = [executor.submit(StageJob(node.name, str(self.run.path), i, count)) for i in range(count)]
        pids = [int(job.job_id) for jobs in self.jobs.values() for job in jobs]
        write_json(self.run.path / "jobs.json", [{"pid": pid, "born": birth(pid)} for pid in pids])

    def _log(self, node: str) -> Path:
        logs = sorted((self.run.node(node) / "submit").glob("*_log.out"), key=lambda p: p.stat().st_mtime)
        return logs[-1] if logs else self.run.node(node) / "submit"


def stop_jobs(run: RunDir, console: Console, why: str) -> None:
    """Ends the run's jobs that are alive, those of an earlier launch that was killed too: two writers of one stage must not meet.
    They are given time to save their state."""
    for job in read_json(run.path / "jobs.json") or []:
        if job["born"] is None or birth(job["pid"]) != job["born"]:
            continue
        try:
            family = [psutil.Process(job["pid"])]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        console.print(f"{why} process {job['pid']}")
        for process in family:
            _signal(process, signal.SIGTERM)
        for process in psutil.wait_procs(family, timeout=GRACE)[1]:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)


@contextlib.contextmanager
def _ignored(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
