from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from skinsynth import config, status
from skinsynth.files import read_json
from skinsynth.run import RunDir
from skinsynth.status import Row

QUEUED = [Row("prepare", "done", done=300, total=300, unit="images", tasks={"COMPLETED": 2}),
          Row("finetune", "running", done=12, total=400, unit="steps", rate=1.5, left=2600, tasks={"RUNNING": 1}, nodes="node[1-2]"),
          Row("classify/baseline", "pending", "Slurm: Priority", tasks={"PENDING": 1}), Row("report", "pending", tasks={"PENDING": 1})]
FAILED = [Row("prepare", "failed", "the images are not there", tasks={"FAILED": 2}),
          Row("encode", "stopped", "cancelled, since prepare did not finish", tasks={"CANCELLED": 1})]


def shown(rows: list[Row], terminal: bool, width: int, monkeypatch: pytest.MonkeyPatch, columns: str | None = None) -> str:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    status.show(console, RunDir(Path("runs/x")), rows, None)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [80, 99, 100, 160])
def test_no_column_is_squeezed_to_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(QUEUED, True, width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    for word in ("prepare", "classify/baseline", "300/300 images", "12/400 steps", "1.5", "43:20"):
        assert word in text
    assert {line[-1] for line in text.splitlines()[1:] if line} <= set("┓┃┩│┘"), "cut off at the right"
    assert ("node[1-2]" in text) == (width >= 100)
    for heading in ("stage", "state", "done", "per second", "left", "note"):
        assert f" {heading} " in text
    assert " again " not in text, "nothing was run again"


LOCAL = [Row("encode", "done", done=1290, total=1290, unit="images"),
         Row("generate", "running", done=12, total=400, unit="images", rate=0.41, left=2600), Row("classify/baseline", "running", "launched on node7",
                                                                                                done=1, total=800, unit="steps", rate=123, left=60)]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("rows", [QUEUED, LOCAL, [replace(row, restarts=3) for row in QUEUED]])
@pytest.mark.parametrize("width", [45, 60, 70, 80, 100, 121])
def test_what_there_is_no_room_for_is_left_out_whole(rows: list[Row], width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it has to go stays, and so does the border; what no column of notes tells stands below."""
    text = shown(rows, terminal, width, monkeypatch, columns=str(width))
    table = text.split("┘")[0] + "┘"
    assert max(map(len, table.splitlines())) <= width
    assert {line[-1] for line in table.splitlines()[1:] if line} <= set("┓┃┩│┘"), "cut off at the right"
    heading = [name.strip() for name in table.splitlines()[2].strip("┃").split("┃")]
    assert {"state", "done", "left"} <= set(heading)
    assert ("classify/baseline" in table) == (width >= 60)
    assert "43:20" in table
    assert "12/400 " in table
    note = "Slurm: Priority" if rows is not LOCAL else "launched on node7"
    assert (note in text.split("┘")[1]) == ("note" not in heading)


def test_long_names_of_nodes_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown([replace(QUEUED[1], nodes="node[1-2,5,8-13],gpu-a100-[1-40]"), QUEUED[2]], True, 100, monkeypatch)
    assert "node[" not in text
    assert {line[-1] for line in text.splitlines()[1:] if line} <= set("┓┃┩│┘")


def test_what_takes_seconds_each_is_not_called_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(QUEUED[1], rate=0.042), replace(QUEUED[1], rate=1234.56)]
    assert [line.split("│")[4].strip() for line in shown(rows, True, 160, monkeypatch).splitlines() if "steps" in line] == ["0.042", "1234.6"]
    assert status.per_second(None) == "0"


def test_in_a_pipe_it_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(QUEUED, False, 80, monkeypatch)
    assert "node[1-2]" in text
    assert "Slurm: Priority" in text


def test_where_nothing_has_begun_there_is_no_empty_column(monkeypatch: pytest.MonkeyPatch) -> None:
    heading = next(line for line in shown(QUEUED[2:], True, 160, monkeypatch).splitlines() if "stage" in line)
    assert heading.replace(" ", "") == "┃stage┃state┃done┃note┃"


def test_what_failed_leaves_room_for_why(monkeypatch: pytest.MonkeyPatch) -> None:
    table = shown(FAILED, True, 80, monkeypatch).split("prepare:")[0]
    assert "the images are not there" in table
    assert " nodes " not in table


def test_watching_goes_on_while_a_launch_is_between_two_stages(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create(config.load("configs/demo.yaml"))
    printed = io.StringIO()
    watching = threading.Thread(target=status.watch, args=(run, Console(file=printed)), daemon=True)
    with run.lock():
        watching.start()
        watching.join(1)
        assert watching.is_alive(), "nothing runs just now, but more will"
    watching.join(10)
    assert not watching.is_alive()
    assert printed.getvalue().endswith("\n"), "in a pipe what follows would stand beside the table"


@pytest.mark.parametrize("node", ["prepare", "encode", "generate", "screen"])
def test_each_task_knows_how_much_there_is_for_all(chain: Path, node: str) -> None:
    """Else a stage of which two of eight tasks are through, and the others wait, looks complete."""
    parts = [read_json(path) for path in (chain / "run" / node / "progress").glob("*.json")]
    assert parts
    assert {part["of"] for part in parts} == {sum(part["total"] for part in parts)} == {sum(part["done"] for part in parts)}
