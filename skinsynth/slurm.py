"""Slurm: what is submitted for each node of the chain, and what Slurm says of it. No torch here.

Jobs are found again by their name, which is made of the run's path and the node, so a launch that died between ``sbatch`` and
writing down what it got leaves nothing that the next one would not see; and by the number that was written down, wherever the run is seen from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from skinsynth import stages
from skinsynth.chain import Node, StageJob
from skinsynth.errors import UserError
from skinsynth.files import read_json, write_json
from skinsynth.knobs import Config
from skinsynth.run import RunDir, Task
from skinsynth.signals import undisturbed

JOBS_OWN = re.compile(r"(SLURM_(?!CONF|CLUSTERS$|JWT$)|SRUN_|SQUEUE_|SACCT_|SUBMITIT_)|(RANK|LOCAL_RANK|WORLD_SIZE)$")
# What a launch says of every job. sbatch heeds SBATCH_* before the #SBATCH lines. CLUSTERS: squeue would look for the jobs elsewhere
LAUNCHS_OWN = re.compile("SBATCH_(ARRAY_INX|CLUSTERS|DEPENDENCY|ERROR|INPUT|JOB_NAME|NO_REQUEUE|OPEN_MODE|OUTPUT|REQUEUE|SIGNAL|TIMELIMIT|WAIT)$")
HELD = ("launch failed requeued held", "JobHoldMaxRequeue")  # Slurm's reasons of a job that it put on hold by itself
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "SUSPENDED")
SCRIPTS = (Path(__file__).parent / "scripts").resolve()  # a link to slurm/, which a wheel has two files of


class SlurmError(UserError):
    """Slurm said no, or nothing; its own words are in the message."""


@dataclass(frozen=True)
class Submitted:
    """One Slurm job of a node: ``id`` is ``17``, or ``17_3`` in an array; it does share ``task`` of ``tasks``."""

    node: str
    id: str
    task: int
    tasks: int


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    id: str
    state: str  # in Slurm's words: PENDING, RUNNING, NODE_FAIL ...
    reason: str = ""
    nodes: str = ""
    name: str = ""


# ---- asking ----

def ask(*command: str) -> str:
    """The output of one of Slurm's programs.

    Raises:
        SlurmError: it is not there, does not answer, or says no.
    """
    try:
        with own_environment():
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not there: this needs a login node of a Slurm cluster (or take cluster=local)") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within a minute") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {_words(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


@contextlib.contextmanager
def own_environment(wanted: dict[str, Any] | None = None) -> Iterator[None]:
    """Without what an interactive job, in which the command may be typed, says of itself (its memory, GPUs, binding: jobs that are submitted from it
    would inherit them, and be refused or misplaced), and without what changes the answers of Slurm's programs. ``MASTER_ADDR`` stays, and of
    ``SBATCH_*``, the defaults of a site or a person, what the parameters of a job that is submitted (``wanted``) leave open."""
    asked = {_kind(key) for key, value in {**wanted, **wanted["additional_parameters"]}.items() if value is not None} if wanted else set()

    def settled(name: str) -> bool:
        return bool(LAUNCHS_OWN.match(name)) or (name.startswith("SBATCH_") and _kind(name.removeprefix("SBATCH_")) in asked)

    gone = {name: os.environ.pop(name) for name in [*os.environ] if JOBS_OWN.match(name) or settled(name)}
    try:
        yield
    finally:
        os.environ.update(gone)


def _kind(option: str) -> str:
    """What an option of sbatch is about: GPUs, memory and CPUs may each be asked for in several ways, of which one goes."""
    name = option.lower().replace("_", "-")
    several = re.fullmatch("(gpus|mem|cpus)(-per-.*)?", "gpus" if name == "gres" else name)
    return several[1] if several else name


def queued(names: Iterable[str]) -> dict[str, Job]:
    """The jobs of these names that Slurm has not finished, by id; the tasks of an array one by one."""
    return {job.id: job for _, job in _queue(f"--name={','.join(names)}", "%i|%T|%N|%j|%r")}


def queued_of(run: RunDir, nodes: Iterable[str]) -> dict[str, Job]:
    """The same of a run's nodes, and with them what was submitted where the run has another path (a bind mount, another host's), and so jobs of
    other names: the ids that are written down tell."""
    names = {node: job_name(run, node) for node in nodes}
    found = queued(names.values())
    seen, undone = {i.split("_")[0] for i in found}, {node for node in names if not run.is_done(node)}
    noted = {job.id: job.node for job in submitted(run) if job.node in undone and job.id.split("_")[0] not in seen}
    if noted:
        whole = ",".join(sorted({i.split("_")[0] for i in noted}))
        try:
            there = _queue(f"--jobs={whole}", "%o|%i|%T|%N|%j|%r")
        except SlurmError as error:
            if "Invalid job id" not in str(error):  # it has forgotten all of them
                raise
            there = []
        found |= {job.id: job for script, job in there if job.id in noted and _submitted_here(run, noted[job.id], script, job)}
    return found


def _queue(chosen: str, form: str) -> list[tuple[str, Job]]:
    """What stands in a line before the job's own columns, and the job."""
    rows = (line.rsplit("|", 5) for line in ask("squeue", "--noheader", "--array", chosen, f"--format={form}").splitlines())
    return [(before[0] if before else "", Job(i, state, reason, nodes, name)) for *before, i, state, nodes, name, reason in rows]


def _submitted_here(run: RunDir, node: str, script: str, job: Job) -> bool:
    """Not so of a copy of a run, which has its list of jobs, too, nor of another's job that Slurm has given an old number."""
    try:
        return Path(script).parent.stat().st_ino == (run.node(node) / "submit").stat().st_ino
    except OSError:  # a path of another host
        return job.name.rpartition("-")[0] == job_name(run, node).rpartition("-")[0]


def ended(ids: Iterable[str]) -> dict[str, Job]:
    """How jobs ended: asked of the accounting, and of the controller for what that does not know: a site may have none, it lags some
    seconds behind, and the controller forgets after some minutes."""
    wanted = set(ids)
    found = _fates(wanted, _accounting(sorted({i.split("_")[0] for i in wanted}))) if wanted else {}
    unknown = wanted - found.keys()
    return found | _fates(unknown, [job for whole in sorted({i.split("_")[0] for i in unknown}) for job in _controller(whole)])


def _fates(wanted: set[str], jobs: list[Job]) -> dict[str, Job]:
    """Tasks of an array that never ran have one line together: ``17_[3-199%20]``, or ``17`` where none ran."""
    single = {job.id: job for job in jobs}
    together = {job.id.split("_")[0]: job for job in jobs if "[" in job.id or "_" not in job.id}
    fates = {i: single.get(i) or together.get(i.split("_")[0]) for i in wanted}
    return {i: job for i, job in fates.items() if job}


def _accounting(whole: list[str]) -> list[Job]:
    try:
        lines = ask("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(whole)}",
                    "--format=JobID,State,NodeList,Reason").splitlines()
    except SlurmError:
        return []
    found = [Job(i, state.split()[0], reason, nodes) for i, state, nodes, reason in (line.split("|", 3) for line in lines)]
    return [job for job in found if job.state not in UNFINISHED]  # squeue, which is newer, knows better


def _controller(job: str) -> list[Job]:
    try:
        lines = ask("scontrol", "show", "job", job, "--oneliner").splitlines()
    except SlurmError:  # forgotten
        return []
    found = []
    for line in lines:
        pairs = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        task = pairs.get("ArrayTaskId", "")  # a number, or for those that never ran such as 3-199%20, or Slurm's "no value"
        one = task.isdigit() and int(task) < 2**32 - 2
        number = f"{pairs['ArrayJobId']}_{task if one else f'[{task}]'}" if task else pairs["JobId"]
        found.append(Job(number, pairs["JobState"], pairs.get("Reason", ""), pairs.get("NodeList", "")))
    return found


def cancel(ids: Iterable[str]) -> None:
    """Slurm takes an id that has ended already without a word."""
    chosen = sorted(set(ids))
    if chosen:
        ask("scancel", *chosen)


# ---- what is written down ----

def job_name(run: RunDir, node: str) -> str:
    """The same for every launch of a run; the node first, since squeue shows eight letters. The hash: two may have a ``runs/isic``."""
    where = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:6]
    return f"{node.replace('/', '-')}-{run.name}-{where}".replace(",", "-")


def submitted(run: RunDir) -> list[Submitted]:
    return [Submitted(**job) for job in read_json(run.path / "jobs.json") or []]


def note(run: RunDir, jobs: list[Submitted]) -> None:
    write_json(run.path / "jobs.json", [asdict(job) for job in jobs])


def may_have(run: RunDir) -> bool:
    """Whether Slurm may have jobs of the run: some are written down; or it was launched there last, or sbatch did not say which job it submitted
    (submitit leaves the script of that under its first name), and that launch died before it wrote down any."""
    if submitted(run) or not shutil.which("squeue") or not run.config_path.is_file():
        return bool(submitted(run))
    return run.config().cluster.kind == "slurm" or any(next(run.path.glob(f"{node}/submit/.submission_file_*"), None) for node in ("*", "*/*"))


# ---- submitting ----

def check_path(run: RunDir) -> None:
    """Raises ``UserError`` where Slurm would make other names of logs out of the run's path: what is a pattern in them cannot be quoted there."""
    path = str(run.path.resolve())
    for sign in "%\\":
        if sign in path:
            raise UserError(f"run: there is a '{sign}' in {path}, which Slurm does not take as it is in the names of logs: give a path without it")


def parameters(cfg: Config, run: RunDir, node: str, dependency: list[str], tasks: Sequence[int] = (0,)) -> dict[str, Any]:
    """What submitit turns into ``#SBATCH`` lines and the commands around ``srun``. ``tasks``: the numbers of the node's tasks that are submitted."""
    check_path(run)
    stage, cluster = node.split("/")[0], cfg.cluster
    wanted, site, gang = cluster.of(stage), cluster.site(stage), stages.is_gang(cfg, stage)
    extra, memory = site.pop("extra"), site.pop("mem_gb", None)
    env = Path(cluster.env).resolve() if cluster.env else SCRIPTS / "env.sh"
    if not env.is_file():  # bash would go on without it, and the jobs without modules and caches
        raise UserError(f"cluster.env: {env} is not there: give the path of the script that jobs source, or leave it out for slurm/env.sh")
    if not (SCRIPTS / "requeue.sh").is_file():
        raise UserError(f"{SCRIPTS}/requeue.sh is not there, which every job ends with: install skinsynth anew")
    found = {
        "job_name": job_name(run, node), "time": wanted.minutes, "nodes": wanted.nodes if gang else 1,
        "ntasks_per_node": wanted.tasks_per_node if gang else 1, "cpus_per_task": wanted.threads or None,
        "gpus_per_node": wanted.gpus_per_node or None, "mem": f"{memory * 1024:.0f}MB" if memory else None,
        "dependency": f"afterok:{':'.join(dependency)}" if dependency else None, "array_parallelism": wanted.throttle,
        "signal_delay_s": cluster.signal_seconds, "stderr_to_stdout": True, "wckey": None,
        # Slurm 22.05 and later: srun does not take the job's cpus-per-task over; and a gang that lost a rank must not wait for it
        # --export: a site may want jobs to be submitted with export=NONE, which srun would pass on, without what env.sh exports
        "srun_args": ["--kill-on-bad-exit=1", "--export=ALL", *([f"--cpus-per-task={wanted.threads}"] if wanted.threads else [])],
        "setup": [f"source {shlex.quote(str(env))}"], "teardown": ["code=$?", *_after(run, node, tasks if gang else [])],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **extra}, **site,
    }
    return {key: value for key, value in found.items() if value is not None or key == "wckey"}


def _after(run: RunDir, node: str, tasks: Sequence[int]) -> list[str]:
    """Has the job ask for another turn where that makes sense, which a gang that failed by itself says in a file of its task's number; in an
    array that number is not the array's, since a launch submits only the tasks that are left. Where the script is gone (the checkout was moved), the
    job ends as its work did."""
    requeue = f"source {shlex.quote(str(SCRIPTS / 'requeue.sh'))}"
    if len(tasks) < 2:
        return [f"{requeue} {shlex.quote(str(run.failed_path(node, tasks[0]).resolve())) if tasks else '-'} || exit $code"]
    folder = shlex.quote(str(run.failed_path(node).resolve().parent))
    return [f"tasks=({' '.join(map(str, tasks))})", f"{requeue} {folder}/\"${{tasks[$SLURM_ARRAY_TASK_ID]}}\".json || exit $code"]


def script(cfg: Config, run: RunDir, node: str, tasks: int, dependency: list[str]) -> str:
    """The sbatch file that submitting would make."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = (run.node(node) / "submit").resolve()
    command = f"{cfg.cluster.python or sys.executable} -u -m submitit.core._submit {folder}"
    return _make_sbatch_string(command, folder, **parameters(cfg, run, node, dependency, range(tasks)), map_count=tasks if tasks > 1 else None)


def submit(cfg: Config, run: RunDir, node: str, tasks: list[Task], dependency: list[str]) -> list[Submitted]:
    """One job for a gang, one array for the tasks of a unit stage or the gangs of an arm's seeds."""
    for task in tasks:
        run.begin_anew(node, task.index)
    calls = [StageJob(node, str(run.path), task.index, task.count) for task in tasks]
    ids = sbatch(cfg, run.node(node) / "submit", parameters(cfg, run, node, dependency, [task.index for task in tasks]), calls, node)
    return [Submitted(node, number, task.index, task.count) for number, task in zip(ids, tasks, strict=True)]


def sbatch(cfg: Config, folder: Path, wanted: dict[str, Any], calls: list[Any], what: str) -> list[str]:
    """Has submitit submit the calls, as an array where there are several; the ids of their jobs.

    Raises:
        SlurmError: sbatch refused ``what``.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder, max_num_timeout=10**6, python=cfg.cluster.python)
    executor.update_parameters(**wanted)
    try:
        with own_environment(wanted), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return [job.job_id for job in executor.submit_array(calls)]
    except (FailedJobError, FailedSubmissionError) as error:  # the latter: it said no job's number
        raise SlurmError(f"{what} could not be submitted; sbatch: {_words(str(error))}") from None


def submit_chain(cfg: Config, run: RunDir, nodes: list[Node], console: Console, last: Config | None = None) -> None:
    """Submits what is neither done nor with Slurm already, each node after those that it needs. ``last``: the configuration of the launch before.

    Raises:
        SlurmError: Slurm does not answer or refuses a job; then nothing of this launch is left in the queue.
    """
    active = _settled(run, nodes, console)
    _release(active, console)
    strays = sorted(active.keys() - {job.id for job in submitted(run)})
    if strays:
        console.print(f"cancelling what a launch that died had submitted: {', '.join(strays)}")
        cancel(strays)
    new: list[Submitted] = []
    before, told = submitted(run), _failures(run, nodes)
    try:
        for node in nodes:
            if run.is_done(node.name):
                console.print(f"{node.name:<20} done")
                continue
            kept = [job for job in submitted(run) if job.node == node.name and job.id in active]
            renewed = {job.node for job in new}
            if kept and renewed.intersection(node.needs) and all(active[job.id].state == "PENDING" for job in kept):
                cancel(job.id for job in kept)  # they wait for jobs that are no more
                kept = []
            tasks = _missing(cfg, run, node, kept)
            stays = f"with Slurm already: {span([job.id for job in kept])}{_unlike(cfg, last, run, node, kept)}" if kept else ""
            if not tasks:
                console.print(f"{node.name:<20} {stays}", highlight=False, soft_wrap=True)
                continue
            needed = [job.id for job in submitted(run) if job.node in node.needs and (job.id in active or job in new)]
            with undisturbed():  # sbatch that is broken off may have submitted its job all the same
                jobs = submit(cfg, run, node.name, tasks, sorted({_whole(i, active, new) for i in needed}))
                new += jobs
                note(run, _merged(submitted(run), jobs))
            after = f", after {' and '.join(n for n in node.needs if not run.is_done(n))}" if needed else ""
            share = "" if len(tasks) == tasks[0].count else f" (tasks {span([str(t.index) for t in tasks])} of {tasks[0].count})"
            line = "; ".join(part for part in (f"submitted as {span([job.id for job in jobs])}{share}{after}", stays) if part)
            console.print(f"{node.name:<20} {line}", highlight=False, soft_wrap=True)
    except BaseException:
        with undisturbed():
            _take_back(run, nodes, new, before, active, console)
        raise
    now = _failures(run, nodes)
    for path in (run.failed_path(job.node, job.task) for job in new):
        if path in now and now[path] == told.get(path):  # not what the new job has told meanwhile
            path.unlink(missing_ok=True)


def _failures(run: RunDir, nodes: list[Node]) -> dict[Path, int]:
    """The files that tell why a task failed, and when each was written."""
    found = {}
    for path in (path for node in nodes for path in run.failed_path(node.name).parent.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # its task begins just now
            found[path] = path.stat().st_mtime_ns
    return found


def _release(active: dict[str, Job], console: Console) -> None:
    """Slurm itself holds a job that it could not start (a node was lost at that moment, its disk was full), until somebody lets it go.
    A hold that a person or an administrator set stays."""
    held = [job.id for job in active.values() if job.reason in HELD]
    if held:
        ask("scontrol", "release", ",".join(held))
        console.print(f"released what Slurm held because it could not be started: {span(held)} ({active[held[0]].reason})", highlight=False)


def _take_back(run: RunDir, nodes: list[Node], new: list[Submitted], before: list[Submitted], known: Iterable[str], console: Console) -> None:
    """Cancels what this launch submitted, also what Slurm took though sbatch said that it did not (no answer in time, killed); ``known``: what was
    with Slurm before. Where Slurm does not hear that either, names it and keeps it written down."""
    ids = [job.id for job in new]
    try:
        cancel(ids)
        unheard = sorted(queued_of(run, [n.name for n in nodes]).keys() - {*ids, *known})
        cancel(unheard)
    except SlurmError as error:
        left = f"still with Slurm: {span(ids)}, since it could not be cancelled" if ids else "whether Slurm took the job all the same is not known"
        console.print(f"{left} ({error}); 'skinsynth cancel {run.path}' does it later", highlight=False, soft_wrap=True)
        return
    if ids:
        note(run, before)
    if ids or unheard:
        console.print(f"cancelled what had been submitted: {span(ids + unheard)}", highlight=False, soft_wrap=True)


def _settled(run: RunDir, nodes: list[Node], console: Console, patience: float = 60) -> dict[str, Job]:
    """What is with Slurm, once jobs that are just ending have ended: whether they did their share is known only then."""
    end, told = time.time() + patience, False
    while True:
        active = queued_of(run, [n.name for n in nodes])
        ending = [job.id for job in active.values() if job.state == "COMPLETING"]
        if not ending or time.time() > end:
            return active
        if not told:
            console.print(f"waiting for what is just ending: {span(ending)}")
            told = True
        time.sleep(0.5)


def _missing(cfg: Config, run: RunDir, node: Node, kept: list[Submitted]) -> list[Task]:
    """The tasks to submit: those that did not do their share yet and are not with Slurm."""
    count = node.tasks(cfg)
    if any(job.tasks != count for job in kept):  # cut in another way: let those end first
        return []
    left = run.unfinished(node.name, count) or list(range(count))
    return [Task(i, count) for i in left if i not in {job.task for job in kept}]


def _unlike(cfg: Config, last: Config | None, run: RunDir, node: Node, kept: list[Submitted]) -> str:
    """In what the jobs that stay with Slurm are not those that this launch would submit."""
    found = []
    if last and _site_keys(cfg, node.stage) != _site_keys(last, node.stage):
        found.append(f"submitted with other cluster keys: 'skinsynth cancel {run.path}' first")
    count = kept[0].tasks
    missing = len(set(run.unfinished(node.name, count)) - {job.task for job in kept})
    if count != node.tasks(cfg) and missing:
        found.append(f"{missing} of its {count} tasks {'is' if missing == 1 else 'are'} missing: launch again once these have ended")
    return f" ({'; '.join(found)})" if found else ""


def _site_keys(cfg: Config, stage: str) -> tuple[object, ...]:
    """The cluster's keys that a stage's jobs are submitted with."""
    cluster = cfg.cluster
    return cluster.of(stage), cluster.site(stage), cluster.env, cluster.python, cluster.signal_seconds


def _merged(old: list[Submitted], new: list[Submitted]) -> list[Submitted]:
    """The last job of every task."""
    count, again = {job.node: job.tasks for job in new}, {(job.node, job.task) for job in new}
    return [job for job in old if count.get(job.node, job.tasks) == job.tasks and (job.node, job.task) not in again] + new


def _whole(number: str, active: dict[str, Job], new: list[Submitted]) -> str:
    """The id to depend on: an array as a whole where it is new, else the task, since others of an old array may have failed."""
    return number.split("_")[0] if number in {job.id for job in new} else number


def span(ids: list[str]) -> str:
    """``17_0 ... 17_199`` for many."""
    return ", ".join(ids) if len(ids) < 4 else f"{ids[0]} ... {ids[-1]} ({len(ids)} tasks)"


def plan(cfg: Config, run: RunDir, nodes: list[Node]) -> str:
    """Every sbatch file of the chain as it would be submitted to an idle cluster; ``$generate`` stands for that node's job id."""
    parts = []
    for node in nodes:
        count = node.tasks(cfg)
        needs = [f"${need.replace('/', '_')}" for need in node.needs]
        parts.append(f"# ---- {node.name}: {count} task{'s' if count > 1 else ''}\n{script(cfg, run, node.name, count, needs)}")
    return "\n".join(parts)


def _words(text: str) -> str:
    """Slurm's own words, without the program's name on every line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.strip().splitlines()]
    return "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))
