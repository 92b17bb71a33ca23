"""Two ranks write a checkpoint together, and one of them cannot."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from skinsynth.files import read_json, write_json
from skinsynth.train import checkpoint
from skinsynth.train.checkpoint import Checkpoints
from skinsynth.world import World


class Ranks(World):
    """Two that are threads of this process."""

    def __init__(self, rank: int, meet: threading.Barrier, told: list[Any]):
        super().__init__(rank, 2)
        self.meet, self.told = meet, told

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.meet.wait()
        found = list(self.told)
        self.meet.wait()
        return found

    def max(self, value: int) -> int:
        return max(self.gather(value))

    def barrier(self) -> None:
        self.gather(None)


class Held:
    """Two tensors as an engine has them, of which each of two ranks writes one."""

    sharded, topology, scaler = False, {}, dict

    def __init__(self, *values: torch.Tensor):
        self.trained = {f"p{number}": value for number, value in enumerate(values)}

    def keys_of(self, name: str) -> list[str]:
        return ["weight"]

    def full(self, key: str, name: str) -> torch.Tensor:
        return self.trained[name]


class Sharded:
    """Tensors as an engine has them under ZeRO: one rank's pieces of their flattened forms. ``full`` is not there: a save gathers nothing."""

    sharded, topology, scaler = True, {}, dict

    def __init__(self, shapes: dict[str, list[int]], pieces: dict[str, tuple[int, torch.Tensor]]):
        self.trained, self.shapes, self.pieces = dict.fromkeys(shapes), shapes, pieces

    def keys_of(self, name: str) -> list[str]:
        return ["weight", "exp_avg"]

    def held(self, key: str, name: str) -> tuple[int, torch.Tensor]:
        offset, value = self.pieces.get(name, (0, torch.empty(0)))
        return offset, value if key == "weight" else -value


def save_on_two(folder: Path, *values: torch.Tensor, engines: Sequence[Any] = ()) -> tuple[list[str], float]:
    """What a save said on each of two ranks, and after how many seconds."""
    meet, told, begun = threading.Barrier(2, timeout=20), [None, None], time.monotonic()
    engines = engines or [Held(*values)] * 2

    def one(rank: int) -> str:
        checkpoints = Checkpoints(folder, Ranks(rank, meet, told), {})
        try:
            checkpoints.save(7, engines[rank], {})
            checkpoints.wait()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            checkpoints.close()
        return ""

    with ThreadPoolExecutor(2) as ranks:
        said = list(ranks.map(one, range(2)))
    return said, time.monotonic() - begun


def test_of_pieces_that_the_ranks_wrote_whole_tensors_are_read(tmp_path: Path) -> None:
    """One in two pieces, one that is another rank's; one as the first rank alone has it."""
    split, other, first = torch.randn(3, 5), torch.randn(4), torch.randn(2, 1, 2)
    shapes = {name: list(value.shape) for name, value in (("a.weight", split), ("b", other), ("c", first))}
    engines = [Sharded(shapes, {"a.weight": (0, split.flatten()[:9]), "c": (0, first.flatten())}),
               Sharded(shapes, {"a.weight": (9, split.flatten()[9:]), "b": (0, other)})]
    assert save_on_two(tmp_path, engines=engines)[0] == ["", ""]
    found = Checkpoints(tmp_path, World(), {}).found
    assert found is not None
    for name, value in (("a.weight", split), ("b", other), ("c", first)):
        assert found.keys(name) == ["exp_avg", "weight"]
        assert torch.equal(found.tensor("weight", name), value)
        assert torch.equal(found.tensor("exp_avg", name), -value)
    engines[1].pieces["b"][1][3] = float("nan")
    assert save_on_two(tmp_path, engines=engines)[0] == ["NotFinite: weight/b"] * 2


def test_checkpoints_of_before_there_were_pieces_are_read(tmp_path: Path) -> None:
    """Under ZeRO too they held whole tensors, and nothing was said of shapes."""
    assert save_on_two(tmp_path, torch.ones(2, 3), torch.zeros(1))[0] == ["", ""]
    path = tmp_path / "step-00000007/complete.json"
    facts = read_json(path)
    del facts["shapes"]
    write_json(path, facts)
    found = Checkpoints(tmp_path, World(), {}).found
    assert found is not None
    assert torch.equal(found.tensor("weight", "p0"), torch.ones(2, 3))


def test_of_which_step_the_newest_is_is_known_before_it_is_on_disk(tmp_path: Path) -> None:
    """So that nobody who leaves there makes it again; one that is damaged does not count."""
    checkpoints = Checkpoints(tmp_path, World(), {})
    assert checkpoints.last == 0
    engine: Any = Held(torch.ones(1))
    for step in (7, 9):
        checkpoints.save(step, engine, {})
        assert checkpoints.last == step
    checkpoints.wait()
    assert (checkpoints.last, Checkpoints(tmp_path, World(), {}).last) == (9, 9)
    (tmp_path / "step-00000009/complete.json").write_text("")
    assert Checkpoints(tmp_path, World(), {}).last == 7


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_its_part_keeps_nobody_waiting(tmp_path: Path, rank: int) -> None:
    """Its reason is what both say, at once; room is made for the next try."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        said, seconds = save_on_two(tmp_path, *(torch.ones(2**20 if number == rank else 1) for number in range(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    file = tmp_path / f".step-00000007.tmp/rank-0000{rank}.safetensors"
    assert said[rank] == f"OSError: [Errno 27] File too large: '{file}'"
    assert said[1 - rank] == f"UserError: rank {rank} stopped: {said[rank]}"
    assert seconds < 5
    assert [path.name for path in tmp_path.iterdir()] == [".step-00000007.tmp"]
    assert save_on_two(tmp_path, torch.ones(1), torch.ones(1))[0] == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert {path.name for path in (tmp_path / "step-00000007").iterdir()} == {"complete.json", "rank-00000.safetensors", "rank-00001.safetensors"}


def test_a_folder_that_cannot_be_made_is_told_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    said, _ = save_on_two(tmp_path / "checkpoints", torch.ones(1), torch.ones(1))
    assert said[0].startswith("NotADirectoryError: ")
    assert said[1].startswith("UserError: rank 0 stopped: ")


def test_what_only_one_rank_finds_not_finite_no_rank_writes(tmp_path: Path) -> None:
    assert save_on_two(tmp_path, torch.ones(1), torch.tensor([1, float("inf")]))[0] == ["NotFinite: weight/p1"] * 2
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_do_not_share_the_run_folder_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has written, but rank 0 does not see it."""
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    monkeypatch.setattr(checkpoint, "write_json", lambda path, value: None if path.name == "rank-00001.json" else write_json(path, value))
    said, _ = save_on_two(tmp_path, torch.ones(1), torch.ones(1))
    assert all("what rank-00001 wrote: all nodes must see the same run folder" in words for words in said)
