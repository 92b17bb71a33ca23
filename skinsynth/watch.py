"""The live picture of a run: which stage is where, how fast, how long it has to go. Reads files only."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from skinsynth.run import RunDir, read_json

STYLES = {"done": "green", "running": "bold cyan", "failed": "bold red", "waiting": "dim"}


def progress_of(run: RunDir, node: str) -> dict[str, Any] | None:
    """Sum over the node's tasks: done, total, unit, rate (per second), left (seconds or None). None before it began."""
    parts = [p for p in (_read(path) for path in sorted((run.node(node) / "progress").glob("*.json"))) if p]
    if not parts:
        return None
    done, total = sum(p["done"] for p in parts), sum(p["total"] for p in parts)
    rate = sum((p["done"] - p["begun_at"]) / max(1e-6, p["now"] - p["start"]) for p in parts)
    return {"done": done, "total": total, "unit": parts[0]["unit"], "rate": rate, "left": (total - done) / rate if rate > 0 else None}


def _read(path: Any) -> Any:
    try:
        return read_json(path)
    except ValueError:  # progress files are not fsynced: a power cut may leave one empty
        return None


def duration(seconds: float | None) -> str:
    """``95`` -> ``1:35``; unknown -> ``-``."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveTable:
    """``with LiveTable(...) as table: table.refresh({node: state})``. On a terminal the table stays in place; elsewhere (a log
    file) each change of state is one line, and each half minute the running stages are."""

    def __init__(self, run: RunDir, nodes: list[str], console: Console):
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
        """``active``: the nodes that run or failed; the others are done or wait."""
        states = {n: active.get(n) or ("done" if self.run.is_done(n) else "waiting") for n in self.nodes}
        changed = [n for n in self.nodes if states[n] != self.states.get(n)]
        for node in changed:
            if states[node] == "running":
                self.began[node] = time.time()
            elif node in self.began:
                self.took[node] = time.time() - self.began.pop(node)
        self.states = states
        if self.live:
            self.live.update(self._table())
        else:
            self._say([n for n in changed if states[n] != "waiting"])

    def _say(self, nodes: list[str]) -> None:
        if time.time() - self.told > 30:
            nodes = [n for n in self.nodes if n in nodes or self.states[n] == "running"]
        for node in nodes:
            self.told = time.time()
            self.console.print(f"{node:<20} {self.states[node]:<8} {self._numbers(node)}".rstrip(), highlight=False)

    def _numbers(self, node: str) -> str:
        found = progress_of(self.run, node)
        if self.states[node] == "done":
            return f"took {duration(self.took[node])}" if node in self.took else ""
        if not found or self.states[node] != "running":
            return ""
        return f"{found['done']}/{found['total']} {found['unit']}, {found['rate']:.1f}/s, {duration(found['left'])} left"

    def _table(self) -> Table:
        table = Table(title=f"run {self.run.path}", title_justify="left")
        for name in ("stage", "state", "done", "", "per second", "took", "left"):
            table.add_column(name, justify="left" if name in ("stage", "state", "") else "right")
        for node in self.nodes:
            state, found = self.states[node], progress_of(self.run, node)
            took = self.took.get(node) or (time.time() - self.began[node] if node in self.began else None)
            cells: list[Any] = [node, f"[{STYLES[state]}]{state}[/]"]
            if found and state != "waiting":
                bar = ProgressBar(total=max(1, found["total"]), completed=found["done"] if found["total"] else 1, width=24)
                running = state == "running"
                cells += [f"{found['done']}/{found['total']} {found['unit']}", bar, f"{found['rate']:.1f}" if running else "",
                          duration(took) if took else "", duration(found["left"]) if running else ""]
            else:
                cells += ["", "", "", duration(took) if took else "", ""]
            table.add_row(*cells)
        return table
