from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, free_port

from skinsynth import world
from skinsynth.data import codec, dataset, images
from skinsynth.data.dataset import Dataset
from skinsynth.data.images import read_image
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.world import STOP_SIGNALS, Stopped, World, join, leave, lost_peer, on_stop, place


@pytest.mark.parametrize(("nodes", "first"), [("gpu7", "gpu7"), ("a100-[003-005,011],v100-2", "a100-003"), ("login,node[1-2]", "login")])
def test_a_gang_finds_its_first_node_in_a_container_that_has_no_slurm(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "SUBMITIT_", "MASTER_", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    slurm = {"STEP_NUM_TASKS": "8", "PROCID": "5", "LOCALID": "1", "JOB_ID": "77", "JOB_NODELIST": nodes, "RESTART_COUNT": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "/nowhere")
    world, variables = place()
    assert (world.rank, world.size, world.local_rank) == (5, 8, 1)
    assert variables["MASTER_ADDR"] == first
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert place()[1]["MASTER_PORT"] == variables["MASTER_PORT"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert place()[1]["MASTER_PORT"] != variables["MASTER_PORT"], "ranks of the last life may still hold it"


def test_a_batch_script_of_several_tasks_is_no_rank_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ranks that nobody started."""
    for name in ("RANK", "SUBMITIT_LOCAL_GLOBALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"NTASKS": "2", "PROCID": "0", "LOCALID": "0", "JOB_ID": "77", "JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert place() == (World(), {})


@pytest.mark.parametrize("enter", ["join", "take_turns"])
def test_a_signal_ends_a_rank_that_waits_for_the_others(enter: str) -> None:
    code = f"""
from skinsynth.world import World, join, leave, on_stop, take_turns
import torch.distributed as dist
def said(function):
    def call(*args, **keys):
        print("waits", flush=True)
        return function(*args, **keys)
    return call
dist.init_process_group, dist.rendezvous = said(dist.init_process_group), said(dist.rendezvous)
here = World(0, 2)
with on_stop({"here.note_stop" if enter == "join" else "leave"}), {enter}(here, {{}}):
    pass
"""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout
        assert rank.stdout.readline() == "waits\n"
        time.sleep(0.5)  # now it is in torch's own code
        rank.terminate()
        try:
            assert rank.wait(10) == -signal.SIGTERM
        finally:
            rank.kill()


def test_a_signal_that_came_before_the_gang_was_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    here = World(0, 2)
    here.note_stop(signal.SIGTERM, None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it would wait"))
    with pytest.raises(Stopped, match="stopped before it began"), join(here, {}):
        pass


def test_a_rank_whose_site_says_nothing_of_its_place_on_the_node_takes_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all ranks of a node would take its first GPU."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"RANK": "13", "WORLD_SIZE": "16", "SLURM_LOCALID": "5"}.items():
        monkeypatch.setenv(name, value)
    assert place() == (World(13, 16, 5), {"LOCAL_RANK": "5"}), "which DeepSpeed looks for in the environment"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert place() == (World(13, 16, 2), {"LOCAL_RANK": "2"})
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("SLURM_LOCALID")
    assert place() == (World(13, 16, 0), {"LOCAL_RANK": "0"})


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_while_an_image_is_decoded_is_not_the_images_fault(number: signal.Signals, drawn: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error of a decoder means a bad image, which would be set aside for good."""
    image = next((drawn / "images").glob("*.jpg"))
    with ShardWriter(tmp_path / "set", 0) as shard:
        shard.add("a", {"jpg": codec.encode_jpeg(read_image(image), 90)}, group="g", target=0)
    write_manifest(tmp_path / "set", 1, kind="real")
    data = Dataset.open(tmp_path / "set")

    def stopped(*_: Any, **__: Any) -> Any:
        signal.raise_signal(number)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", stopped)
    monkeypatch.setattr(dataset, "decode", stopped)
    with on_stop(leave):
        with pytest.raises(Stopped, match="goes on from the last finished unit"):
            read_image(image)
        with pytest.raises(Stopped, match="goes on from the last finished unit"):
            data.image(0)
    monkeypatch.undo()
    assert data.image(0).shape == read_image(image).shape


def test_a_stop_while_a_library_is_imported_is_not_the_librarys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers imports its parts when they are asked for, and makes a RuntimeError of each error."""
    from diffusers.utils.import_utils import _LazyModule

    package = tmp_path / "lazy_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGUSR1)\nclass Part:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.import_module(package.name).__spec__
    lazy: Any = _LazyModule(package.name, str(package / "__init__.py"), {"slow": ["Part"]}, module_spec=spec)
    with on_stop(leave), pytest.raises(Stopped):
        _ = lazy.Part
    with on_stop(World().note_stop):
        assert lazy.Part.__name__ == "Part"
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``pretended(count)``: as if torch saw so many GPUs; gives the list of those that were made the current one."""
    def make(count: int) -> list[Any]:
        taken: list[Any] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1].index if taken else 0)
        return taken

    return make


@pytest.mark.parametrize(("shown", "number"), [(4, 3), (1, 0)])
def test_a_rank_takes_its_own_gpu_also_where_it_is_shown_no_other(shown: int, number: int, pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries take LOCAL_RANK for the GPU's number; and what is done in the gang without its ``World`` must not go to GPU 0."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pretended(shown) == []
    world._take_gpu(World(7, 8, 3))
    assert os.environ["LOCAL_RANK"] == str(number)
    assert World().device == torch.device("cuda", number)


def test_a_rank_that_fails_does_not_wait_for_the_others_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's end of a group waits for peers that sit in a collective."""
    left: list[bool] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    with pytest.raises(MemoryError), join(World(0, 2), {}):
        raise MemoryError
    assert not left
    with join(World(0, 2), {}):
        pass
    assert left == [True]


def test_a_wrong_set_up_is_no_lost_peer() -> None:
    assert lost_peer(RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:123"))
    assert lost_peer(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not lost_peer(RuntimeError("NCCL error: invalid usage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"))


def test_a_rank_alone_is_no_gang_to_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LOCAL_RANK is set and there is a GPU, accelerate begins a process group and wraps the model for it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    alone, variables = place()
    with join(alone, variables):
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
        assert not dist.is_initialized()
        assert place()[0] == alone
