"""Where a run is: which stage, how far, how fast, how long it has to go, and what Slurm says. Reads files and asks Slurm; no torch.

``rows`` is the one description; the live table of a local launch, ``skinsynth status`` and its ``--json`` show it.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from skinsynth import slurm
from skinsynth.chain import Node, chain
from skinsynth.errors import UserError
from skinsynth.files import birth, read_hint, read_json
from skinsynth.run import RunDir

ASK_SLURM = 20  # seconds between two questions of one who watches: each is work for the controller that all share
FRESH = 120  # seconds since a task told of its progress, within which it is taken for alive where its process cannot be seen
BAR, NOTE = 16, 8  # characters of a bar, and of the notes so many that they are worth a column: for these other columns make room, or there is none
SILENT = 900  # seconds; a task that told nothing for so long is no longer at work
STYLES = {"done": "green", "running": "bold cyan", "failed": "bold red", "waiting": "dim", "pending": "yellow", "stopped": "yellow"}


@dataclass
class Row:
    """One stage. ``rate`` is per second, ``left`` in seconds; both only while it runs."""

    node: str
    state: str  # waiting, pending, running, failed, stopped, done; unknown where Slurm does not answer
    detail: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    rate: float | None = None
    left: float | None = None
    restarts: int = 0
    tasks: dict[str, int] | None = None  # Slurm's state -> how many of the node's tasks
    nodes: str = ""
    log: str = ""
    pictures: str = ""  # the folder of those that are kept fresh while it runs

    @property
    def amount(self) -> str:
        return f"{self.done}/{self.total} {self.unit}" if self.total else ""


# ---- what the files say ----

def progress_of(run: RunDir, node: str) -> dict[str, Any] | None:
    """Sum over the node's tasks: done, total, unit, rate (per second), left (seconds or None). None before it began."""
    parts = [p for p in (read_hint(path) for path in sorted((run.node(node) / "progress").glob("*.json"))) if p]
    if not parts:
        return None
    done, total = sum(p["done"] for p in parts), sum(p["total"] for p in parts)
    total = max(total, max(p.get("of", 0) for p in parts) - sum(p.get("spared", 0) for p in parts))
    alive = [p for p in parts if p.get("finished_of") is None and time.time() - p["now"] < SILENT]
    rate = sum((p["done"] - p["begun_at"]) / max(1e-6, p["now"] - p["start"]) for p in alive)
    return {"done": done, "total": total, "unit": parts[0]["unit"], "rate": rate, "left": (total - done) / rate if rate > 0 else None}


def described(run: RunDir, node: Node, state: str, detail: str = "") -> Row:
    """The row of a node in a state that is known, with its numbers from the files."""
    row, found = Row(node.name, state, detail), progress_of(run, node.name)
    if found and state != "waiting":
        row.done, row.total, row.unit = found["done"], found["total"], found["unit"]
        if state == "running":
            row.rate, row.left = found["rate"], found["left"]
    restarts = [read_hint(path) for path in (run.node(node.name) / "restarts").glob("*.json")]
    row.restarts = sum(r["restarts"] for r in restarts if r)
    row.log = newest_log(run, node.name)
    row.pictures = next((str(folder) for name in ("sheets", "previews") if (folder := run.node(node.name) / name).is_dir()), "")
    return row


def logs(run: RunDir, node: str, task: int | None = None) -> list[Path]:
    """The log files of a node, the latest last; of one of its tasks where that is asked for."""
    folder = run.node(node) / "submit"
    if task is None:
        return sorted(folder.glob("*_log.out"), key=lambda p: p.stat().st_mtime)
    ids = [job.id for job in slurm.submitted(run) if job.node == node and job.task == task]
    ids += (read_hint(run.node(node) / "submit" / "tasks.json") or {}).get(str(task), [])  # of local launches
    return [path for number in ids for path in sorted(folder.glob(f"{number}_*_log.out"))]


def newest_log(run: RunDir, node: str) -> str:
    found = logs(run, node)
    return str(found[-1]) if found else ""


# ---- what is known of its state ----

@dataclass(frozen=True)
class Answer:
    """What Slurm said of the run's jobs, by id; ``complaint``: why it could not be asked."""

    active: dict[str, slurm.Job]
    ended: dict[str, slurm.Job]
    complaint: str | None = None


def ask_slurm(run: RunDir) -> Answer:
    nodes, jobs = chain(run.config()), slurm.submitted(run)
    if not slurm.may_have(run) or all(run.is_done(node.name) for node in nodes):
        return Answer({}, {})
    try:
        active = slurm.queued_of(run, [n.name for n in nodes])
        fates = slurm.ended(job.id for job in jobs if job.id not in active and not run.is_done(job.node))
        again = {i: job for i, job in fates.items() if job.state in slurm.UNFINISHED}  # requeued between the two questions
        return Answer(active | again, fates)
    except slurm.SlurmError as error:
        return Answer({}, {}, str(error))


def rows(run: RunDir, answer: Answer | None = None) -> tuple[list[Row], str | None]:
    """All stages of a run, and what Slurm said if it could not be asked. ``answer``: of Slurm, some seconds ago; without it is asked now.

    Raises:
        UserError: no run folder.
    """
    nodes, answer = chain(run.config()), answer or ask_slurm(run)
    active, ended, complaint = answer.active, answer.ended, answer.complaint
    jobs, alive = slurm.submitted(run), {p["node"] for p in _processes(run)}
    launching = run.lock_owner()
    elsewhere = launching[0] if launching and launching[0] != platform.node() else None  # whose processes cannot be seen from here
    found: list[Row] = []
    for node in nodes:
        name, noted = slurm.job_name(run, node.name), [job.id for job in jobs if job.node == node.name]
        mine = noted + sorted(job.id for job in active.values() if job.name == name and job.id not in noted)
        if run.is_done(node.name):
            found.append(described(run, node, "done"))
        elif node.name in alive:
            found.append(described(run, node, "running"))
        elif elsewhere and _is_fresh(run, node):
            found.append(described(run, node, "running", f"launched on {elsewhere}"))
        elif mine and complaint:
            found.append(described(run, node, "unknown", "Slurm does not answer"))
        elif mine:
            going = {job.node for job in jobs if job.id in active}
            lost = [need for need in node.needs if not run.is_done(need) and need not in going]
            found.append(_with_slurm(run, node, [active.get(i) or ended.get(i) for i in mine], active, lost))
        else:
            found.append(_idle(run, node))
    return found, complaint


def _processes(run: RunDir) -> list[dict[str, Any]]:
    """The processes of a local launch that are alive."""
    return [p for p in read_json(run.path / "processes.json") or [] if p["born"] is not None and birth(p["pid"]) == p["born"]]


def _is_fresh(run: RunDir, node: Node) -> bool:
    """Whether a task of it told of its progress lately; not one that did its share."""
    found = ((read_hint(path), path) for path in (run.node(node.name) / "progress").glob("*.json"))
    return any(state and not state.get("finished_of") and time.time() - path.stat().st_mtime < FRESH for state, path in found)


def _idle(run: RunDir, node: Node) -> Row:
    failures = run.failures(node.name)
    if failures:
        return described(run, node, "failed", _first(failures))
    return described(run, node, "stopped" if progress_of(run, node.name) else "waiting")


def _with_slurm(run: RunDir, node: Node, jobs: list[slurm.Job | None], active: dict[str, slurm.Job], lost: list[str]) -> Row:
    """Running before pending before how it ended; the reason in Slurm's words, or in the job's own where it failed. ``lost``: what it needs and what
    ended without being done."""
    present, failures = [job for job in jobs if job], run.failures(node.name)
    live = [job for job in present if job.id in active]
    running = [job for job in live if job.state != "PENDING"]
    if running:
        row = described(run, node, "running", _first(failures) if failures else "")
    elif live:
        row = described(run, node, "pending", live[0].reason)
    elif failures:
        row = described(run, node, "failed", _first(failures))
    else:
        row = described(run, node, *_ending(run, node, present, lost))
    row.tasks = dict(Counter(job.state for job in present))
    row.nodes = ",".join(sorted({job.nodes for job in running if job.nodes}))
    return row


def _ending(run: RunDir, node: Node, jobs: list[slurm.Job], lost: list[str]) -> tuple[str, str]:
    begun = (run.node(node.name) / "progress").exists()
    bad = [job for job in jobs if job.state != "COMPLETED"]
    cancelled = all(job.state == "CANCELLED" for job in bad)
    if lost and not begun and cancelled:
        return "stopped", f"cancelled, since {' and '.join(lost)} did not finish"
    if not bad:
        return "stopped", "its jobs ended, but it is not complete: launch again"
    return ("stopped" if cancelled else "failed"), f"Slurm: {', '.join(sorted({job.state for job in bad}))}"


def _first(failures: dict[int, str]) -> str:
    task, message = next(iter(failures.items()))
    return message if len(failures) == 1 and task == 0 else f"{len(failures)} task{'s' * (len(failures) > 1)} failed; task {task}: {message}"


# ---- for people ----

def duration(seconds: float | None) -> str:
    """``95`` -> ``1:35``; unknown -> ``-``."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def per_second(rate: float | None) -> str:
    """``12.3``; of what takes seconds each, two digits: ``0.042``."""
    return f"{rate:.1f}" if rate and rate >= 1 else f"{rate or 0:.2g}"


def as_json(run: RunDir, found: list[Row], complaint: str | None) -> dict[str, Any]:
    return {"run": str(run.path), "slurm": complaint, "stages": [asdict(row) for row in found]}


def table(run: RunDir, found: list[Row], took: dict[str, float], width: int) -> Table:
    """``took``: seconds per node, where they are known. Columns without a word are left out; a narrow terminal gets no bars, and of the columns
    those that it has room for; only the notes are cut short, and where not even the least fit, the stages' names."""
    columns, view = _columns(found, took, width), Table(title=f"run {run.path}", title_justify="left")
    over = max(0, _room(columns) - width)
    for name, cells in columns.items():
        least = max(map(len, [name, *cells])) - over * (name == "stage")
        view.add_column(name, justify="left" if name in ("stage", "state", "nodes", "note") else "right", no_wrap=name != "note",
                        min_width=None if name == "note" else least, max_width=max(1, least) if name == "stage" else None)
    bars = width >= 120 and _room(columns) + BAR + 3 <= width and any(row.total for row in found)
    if bars:
        view.add_column("")
    for number, row in enumerate(found):
        texts = [Text(cells[number], STYLES.get(row.state, "") if name == "state" else "", no_wrap=True, overflow="ellipsis")
                 for name, cells in columns.items()]
        bar = ProgressBar(total=max(1, row.total), completed=row.done if row.total else 1, width=BAR) if row.total else ""
        view.add_row(*texts, *([bar] if bars else []))
    return view


def _columns(found: list[Row], took: dict[str, float], width: int) -> dict[str, list[str]]:
    """Heading -> a cell for each stage; without nodes under 100 characters, and without what there is no room for, which is first what the
    others tell as well."""
    with_slurm = any(row.tasks for row in found)
    columns: dict[str, list[str]] = {
        "stage": [row.node for row in found], "state": [row.state for row in found], "done": [row.amount for row in found],
        "per second": [per_second(row.rate) if row.rate else "" for row in found],
        "left": [duration(row.left) if row.state == "running" else "" for row in found]}
    if with_slurm:
        columns |= {"again": [str(row.restarts or "") for row in found], "nodes": [row.nodes for row in found], "note": [_note(row) for row in found]}
    else:
        columns["took"] = [duration(took[row.node]) if row.node in took else "" for row in found]
        columns["note"] = [row.detail if row.state == "running" else "" for row in found]
    columns = {name: cells for name, cells in columns.items() if name in ("stage", "state", "done") or any(cells)}
    if width < 100:
        columns.pop("nodes", None)
    for name in ("nodes", "per second", "took", "again", "note"):
        if _room(columns) > width:
            columns.pop(name, None)
    return columns


def _room(columns: dict[str, list[str]]) -> int:
    """Characters of a line of the table, its borders included; a note may be cut to ``NOTE`` of them."""
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    return 1 + sum(3 + (min(NOTE, width) if name == "note" else width) for name, width in widths.items())


def _note(row: Row) -> str:
    """How many tasks are in which state, where there are several, and why it waits."""
    tasks = row.tasks or {}
    counted = ", ".join(f"{n} {state.lower()}" for state, n in tasks.items()) if sum(tasks.values()) > 1 else ""
    return "; ".join(part for part in (counted, row.detail) if part)


def show(console: Console, run: RunDir, found: list[Row], complaint: str | None) -> None:
    """The table, and under it why something failed, and where the log is. In a file or a pipe it is as wide as it needs to be."""
    widen(console)
    console.print(table(run, found, {}, console.width))
    _explain(console, found, complaint, noted="note" in _columns(found, {}, console.width))


def widen(console: Console) -> None:
    """In a pipe or a file a table need not be cut for a terminal that is not there."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, 160)


def _explain(console: Console, found: list[Row], complaint: str | None, noted: bool = True) -> None:
    """``noted``: the table has a column of notes."""
    for row in found:
        note = row.detail if noted else _note(row)
        if note and (row.state in ("failed", "stopped") or not noted):
            console.print(f"{row.node}: {note}", highlight=False, soft_wrap=True, markup=False)
        if row.pictures:
            console.print(f"{row.node} pictures: {row.pictures}", highlight=False, soft_wrap=True, markup=False)
        if row.log and row.state in ("running", "failed"):
            console.print(f"{row.node} log: {row.log}", highlight=False, soft_wrap=True, markup=False)
    if complaint:
        console.print(f"Slurm could not be asked: {complaint}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def watch(run: RunDir, console: Console) -> None:
    """The table, kept fresh until nothing runs or waits in a queue any more, and no local launch is there to start more."""
    answer, asked, of = None, 0.0, list[slurm.Submitted]()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            launching = run.lock_owner() is not None  # asked first: a launch that ends just now has told all that it did
            jobs = slurm.submitted(run)
            if answer is None or jobs != of or time.monotonic() - asked > ASK_SLURM:
                answer, asked, of = ask_slurm(run), time.monotonic(), jobs
            found, complaint = rows(run, answer)
            live.update(table(run, found, {}, console.width), refresh=True)
            if not complaint and not launching and not any(row.state in ("running", "pending") for row in found):
                break
            time.sleep(2)
    if not console.is_terminal:
        console.line()  # Live ends its last table with a line's end on a terminal alone
    _explain(console, found, complaint)


def read_log(run: RunDir, node: str, task: int | None, follow: bool) -> Iterator[str]:
    """The text of the node's latest log; with ``follow`` also what is added to it, for ever.

    Raises:
        UserError: no such stage or task, or it has not begun.
    """
    names = [n.name for n in chain(run.config())]
    if node not in names:
        raise UserError(f"{run.path} has no stage '{node}'; there are {', '.join(names)}")
    found = logs(run, node, task)
    if not found:
        raise UserError(f"{node}{'' if task is None else f', task {task},'} has no log yet: it has not begun")
    with open(found[-1], errors="replace") as f:
        while True:
            text = f.read()
            if text:
                yield text
            elif not follow:
                return
            else:
                time.sleep(0.5)


class LiveTable:
    """``with LiveTable(...) as table: table.refresh({node: state})``. On a terminal the table stays in place; elsewhere (a log
    file) each change of state is one line, and each half minute the running stages are."""

    def __init__(self, run: RunDir, nodes: list[Node], console: Console):
        self.run, self.nodes, self.console = run, nodes, console
        self.live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self.states: dict[str, str] = {}
        self.began: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.told = time.time()

    def __enter__(self) -> LiveTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def refresh(self, active: dict[str, str]) -> None:
        """``active``: the state of those nodes that are neither done nor waiting."""
        states = {n.name: active.get(n.name) or ("done" if self.run.is_done(n.name) else "waiting") for n in self.nodes}
        changed = [n for n, state in states.items() if state != self.states.get(n)]
        for node in changed:
            if states[node] == "running":
                self.began[node] = time.time()
            elif node in self.began:
                self.took[node] = time.time() - self.began.pop(node)
        self.states = states
        if self.live:
            running = {node: time.time() - since for node, since in self.began.items()}
            found = [described(self.run, n, states[n.name]) for n in self.nodes]
            self.live.update(table(self.run, found, {**self.took, **running}, self.console.width))
        else:
            self._say([n for n in changed if states[n] != "waiting"])

    def _say(self, changed: list[str]) -> None:
        if time.time() - self.told > 30:
            changed = [n for n, state in self.states.items() if n in changed or state == "running"]
        for node in self.nodes:
            if node.name in changed:
                self.told = time.time()
                row = described(self.run, node, self.states[node.name])
                numbers = f"{row.amount}, {per_second(row.rate)}/s, {duration(row.left)} left" if row.state == "running" and row.amount else ""
                if node.name in self.took:
                    numbers = f"took {duration(self.took[node.name])}"
                self.console.print(f"{node.name:<20} {row.state:<8} {numbers}".rstrip(), highlight=False)
