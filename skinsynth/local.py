"""This machine: a small scheduler over submitit's local executor. No torch here."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.console import Console

from skinsynth import stages
from skinsynth.chain import Node, StageJob
from skinsynth.errors import UserError
from skinsynth.files import birth, read_json, write_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task
from skinsynth.signals import undisturbed
from skinsynth.status import LiveTable, newest_log

GRACE = 30  # seconds that a job has to save its state when the launch is stopped
SMI_SILENT = 60  # seconds after which nvidia-smi is not waited for any more; a first call may take several


def shares(cfg: Config, run: RunDir, node: Node) -> list[list[Task]]:
    """The tasks that are started together: all of a unit stage, since its configuration says how many; one by one as cores and GPUs are free
    where they take GPUs, and of an arm's seeds, each a gang, those that are not done."""
    count = node.tasks(cfg)
    if _together(cfg, node) > 1:
        return [[Task(i, count) for i in range(count)]]
    left = run.unfinished(node.name, count) if stages.is_gang(cfg, node.stage) else []
    return [[Task(i, count)] for i in left or range(count)]


def _together(cfg: Config, node: Node) -> int:
    """Tasks in a share."""
    alone = stages.is_gang(cfg, node.stage) or cfg.cluster.of(node.stage).gpus_per_node
    return 1 if alone else node.tasks(cfg)


def machine_gpus() -> list[str]:
    """This machine's GPUs, or those that it was told to use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        UserError: nvidia-smi is there and fails, or does not answer.
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        told = ",".join(_ask_nvidia_smi())
    names = [name.strip() for name in told.split(",")]
    return [name for name in itertools.takewhile(lambda name: name != "-1", names) if name]  # CUDA takes none after a name that is none


def _ask_nvidia_smi() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=SMI_SILENT,
                              check=False)
    except subprocess.TimeoutExpired:
        why = f"does not answer within {SMI_SILENT} s"
    else:
        if not done.returncode:
            return done.stdout.split()
        why = f"fails: {' '.join((done.stdout + done.stderr).split())}"  # of a driver that it cannot reach it tells on stdout
    raise UserError(f"nvidia-smi {why}; so this machine's GPUs cannot be listed: mend its driver, or name them in CUDA_VISIBLE_DEVICES")


@dataclass
class Local:
    """A small scheduler over submitit's local executor: nodes start when what they need is done and cores are free."""

    cfg: Config
    run: RunDir
    nodes: list[Node]
    console: Console
    jobs: dict[str, list[Any]] = field(default_factory=dict)  # node that was begun -> its submitit jobs
    waiting: dict[str, list[list[Task]]] = field(default_factory=dict)  # and the tasks that no cores were free for
    failed: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)  # of this machine; looked for where a stage takes some
    held: dict[str, list[str]] = field(default_factory=dict)  # a job's id -> its GPUs

    def __post_init__(self) -> None:
        """Raises ``UserError`` where a stage asks for more GPUs than there are."""
        wanted = {node.stage: self._gpus(node) for node in self.nodes if self._gpus(node) and not self.run.is_done(node.name)}
        self.gpus = machine_gpus() if wanted else []
        for stage, count in wanted.items():
            if count > len(self.gpus):
                raise UserError(f"{stage} asks for {count} GPU{'s' * (count > 1)}, this machine shows {len(self.gpus) or 'none'}: set "
                                f"cluster.stages.{stage}.gpus_per_node (and tasks_per_node of finetune and classify), or launch it on Slurm; "
                                "0: on the CPU")

    def run_all(self) -> None:
        table = LiveTable(self.run, self.nodes, self.console)
        try:
            with table:
                while self._advance():
                    table.refresh({**dict.fromkeys(self.jobs, "running"), **dict.fromkeys(self.failed, "failed")})
                    time.sleep(0.2)
                table.refresh(dict.fromkeys(self.failed, "failed"))
        except BaseException:
            stop_processes(self.run, self.console, "stopping")  # a second Ctrl-C may break it off: the next launch finds the list
            self._forget()
            raise
        self._forget()
        if self.failed:
            lines = [f"{node} failed: {message}\n  log: {newest_log(self.run, node)}" for node, message in self.failed.items()]
            raise UserError("\n".join(lines) + "\nmend it and start the same command again: what is done is kept")

    def _forget(self) -> None:
        (self.run.path / "processes.json").unlink(missing_ok=True)

    def _advance(self) -> bool:
        """Collects what ended, starts what may start; False when nothing runs and nothing more can."""
        for ended in [n for n, jobs in self.jobs.items() if all(job.done() for job in jobs) and not self.waiting[n]]:
            del self.jobs[ended]
            if not self.run.is_done(ended):
                told = self.run.failures(ended).values()
                self.failed[ended] = next(iter(told), "it ended without a word (killed, or out of memory?)")
        for node in self.nodes:
            if self._may_start(node):
                shutil.rmtree(self.run.node(node.name) / "failed", ignore_errors=True)
                self.jobs[node.name], self.waiting[node.name] = [], shares(self.cfg, self.run, node)
            while self.waiting.get(node.name) and self._room(node):
                self._start(node, self.waiting[node.name].pop(0))
        return bool(self.jobs)

    def _may_start(self, node: Node) -> bool:
        if node.name in self.jobs or node.name in self.failed or self.run.is_done(node.name):
            return False
        return all(self.run.is_done(need) for need in node.needs) and self._room(node)

    def _room(self, node: Node) -> bool:
        """Whether cores and GPUs are free for a share of the node; where nothing runs, there are cores for any."""
        busy = sum(self._cores(n) * sum(not job.done() for job in self.jobs.get(n.name, [])) for n in self.nodes)
        cores = not busy or busy + _together(self.cfg, node) * self._cores(node) <= self.cfg.cluster.all_cores
        return cores and len(self._free_gpus()) >= self._gpus(node)

    def _gpus(self, node: Node) -> int:
        """Of one job of the node."""
        return self.cfg.cluster.of(node.stage).gpus_per_node

    def _free_gpus(self) -> list[str]:
        alive = {job.job_id for jobs in self.jobs.values() for job in jobs if not job.done()}
        taken = {name for job, names in self.held.items() if job in alive for name in names}
        return [name for name in self.gpus if name not in taken]

    def _cores(self, node: Node) -> int:
        """Of one job of the node."""
        ranks = self.cfg.cluster.of(node.stage).tasks_per_node if stages.is_gang(self.cfg, node.stage) else 1
        return ranks * self.cfg.cluster.threads_of(node.stage)

    def _start(self, node: Node, tasks: list[Task]) -> None:
        from submitit import LocalExecutor

        wanted = self.cfg.cluster.of(node.stage)
        executor = LocalExecutor(self.run.node(node.name) / "submit")
        gang = stages.is_gang(self.cfg, node.stage)
        # minutes are Slurm's: nobody starts a job anew here that was stopped for having taken its time
        executor.update_parameters(timeout_min=10**6, tasks_per_node=wanted.tasks_per_node if gang else 1, stderr_to_stdout=True)
        mine = self._free_gpus()[:self._gpus(node)]
        with undisturbed():  # no job may run that is not on the list
            started = {task.index: executor.submit(StageJob(node.name, str(self.run.path), task.index, task.count, ",".join(mine)))
                       for task in tasks}
            self.held |= {job.job_id: mine for job in started.values()}
            self.jobs[node.name] += started.values()
            path = self.run.node(node.name) / "submit" / "tasks.json"  # whose log is which
            known = read_json(path) or {}
            write_json(path, known | {str(i): [*known.get(str(i), []), job.job_id] for i, job in started.items()})
            pids = [(name, int(job.job_id)) for name, jobs in self.jobs.items() for job in jobs]
            write_json(self.run.path / "processes.json", [{"node": name, "pid": pid, "born": birth(pid)} for name, pid in pids])


def stop_processes(run: RunDir, console: Console, why: str, nodes: list[str] | None = None) -> bool:
    """Ends the run's jobs that are alive, those of an earlier launch that was killed too: two writers of one stage must not meet. ``nodes``: theirs
    alone. They are given time to save their state. Ctrl-C breaks off the waiting, and not before all of them are told to stop. Returns whether
    there were any."""
    family: list[psutil.Process] = []
    try:
        with undisturbed():  # some wrappers signal this process and then its group, so that Ctrl-C comes twice
            for job in read_json(run.path / "processes.json") or []:
                if job["born"] is None or birth(job["pid"]) != job["born"] or (nodes is not None and job["node"] not in nodes):
                    continue
                try:
                    found = [psutil.Process(job["pid"])]
                    found += found[0].children(recursive=True)
                except psutil.NoSuchProcess:
                    continue
                console.print(f"{why} process {job['pid']}")
                for process in found:
                    _signal(process, signal.SIGTERM)
                family += found
        for process in psutil.wait_procs(family, timeout=GRACE)[1]:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
    finally:
        alive = psutil.wait_procs(family, timeout=0)[1]
        left = [str(process.pid) for process in family if process in alive and birth(process.pid)]
        if left:
            console.print(f"told to stop, but still running: process {', '.join(left)}", highlight=False, soft_wrap=True)
    return bool(family)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
