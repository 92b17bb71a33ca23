from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skinsynth import config
from skinsynth.doctor.node import node_checks
from skinsynth.errors import UserError
from skinsynth.models import compiler
from skinsynth.train.log import forward_flops

CPU = torch.device("cpu")


def test_without_a_compiler_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs a compiler on the node \(g\+\+ or clang\+\+ is not on the PATH\): load its module"):
        compiler.compile_unet(torch.nn.Identity(), CPU)
    with pytest.raises(UserError, match="gcc or clang or cc is not"):
        compiler.check(torch.device("cuda"))
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(UserError, match=r"\(icpx is not on the PATH\)"):
        compiler.check(CPU)


def test_doctor_looks_for_the_compiler_where_it_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(*more: str) -> dict[str, str]:
        cfg = config.load("configs/demo.yaml", [f"run={tmp_path}", f"data.shards={tmp_path}", *more])
        return {check.name: check.state for check in node_checks(cfg)}

    assert "compiler" not in found()
    (tmp_path / "g++").touch(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert found("model.compile=true")["compiler"] == "ok"
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert found("model.compile=true")["compiler"] == "fail"


def test_the_weights_keep_their_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    names = list(model.state_dict())
    compiler.compile_unet(model, CPU)
    assert list(model.state_dict()) == names


def test_what_counts_the_operations_does_not_keep_it_from_compiling() -> None:
    """torch.compile gives up for good a function that it first meets under a counter."""
    compiled: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(True)
        return graph.forward

    class Network(torch.nn.Module):  # torch's own layers are never compiled by themselves
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    inner = Network()
    inner.compile(backend=backend)
    model, x = torch.nn.Sequential(inner), torch.ones(2, 4)
    with forward_flops(model) as counter:
        model(x)
    assert (counter.get_total_flops(), compiled) == (2 * 2 * 4 * 8, [])
    model(x)
    assert compiled == [True]
