"""The shape of the library: imports go down, stages know nothing of each other, and submitting loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, overrides

LAYERS = [{"errors", "cpu", "signals"}, {"files", "knobs"}, {"config"}, {"run"}, {"world", "reuse"}, {"data"}, {"models"}, {"quality", "train"},
          {"pages"}, {"stages"}, {"withdraw"}, {"chain"}, {"slurm"}, {"status"}, {"speeds", "counts"}, {"estimate"}, {"doctor"}, {"local"},
          {"launch"}, {"cli"}, {"__main__"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [p for p in sorted((ROOT / "skinsynth").rglob("*.py")) if p != ROOT / "skinsynth/__init__.py"]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("skinsynth.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = path.relative_to(ROOT / "skinsynth").with_suffix("").parts
    for name in imported(path):
        theirs = name.split(".")[1:]
        if theirs[0] not in LEVEL:  # skinsynth.__version__
            continue
        assert LEVEL[theirs[0]] <= LEVEL[mine[0]], f"{path} imports {name}, which lies above it"
        if mine[0] == "stages" and mine[-1] != "__init__" and theirs[0] == "stages":
            assert theirs[1:] in ([], [mine[-1]]), f"the stage {path} imports the stage {name}"


def test_launch_reaches_submission_without_torch(drawn: Path, tmp_path: Path) -> None:
    code = f"""
import sys, submitit
def submit(self, job):
    print("SUBMITTED", job, "torch" in sys.modules, "numpy" in sys.modules)
    raise KeyboardInterrupt
submitit.LocalExecutor.submit = submit
sys.argv = ["skinsynth", "launch", "configs/demo.yaml", *{overrides(drawn, tmp_path)!r}]
from skinsynth.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    line = next(row for row in done.stdout.splitlines() if row.startswith("SUBMITTED"))
    assert "StageJob(node='prepare'" in line
    assert line.endswith("False False"), "torch (or numpy) was imported on the way to submission"


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, skinsynth.cli; print(sorted(set(sys.modules) & {'torch', 'numpy', 'omegaconf', 'submitit', 'cv2', 'diffusers'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_while_the_command_imports_is_quiet() -> None:
    code = """
import importlib.metadata, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
importlib.metadata.distribution("skinsynth").entry_points["skinsynth"].load()()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
