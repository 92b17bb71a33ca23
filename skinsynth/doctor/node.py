"""What a rank finds on a compute node. torch is imported here, by the checks that need it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from skinsynth.doctor.check import FAIL, OK, WARN, Check, data, guarded, models, writable
from skinsynth.knobs import Config
from skinsynth.run import code_version
from skinsynth.speeds import gpus
from skinsynth.world import World, join, place


def node_checks(cfg: Config) -> Iterator[Check]:
    """What one rank finds, in the order in which it looks; the collective comes last, so that the rest is told even where it hangs."""
    world, variables = place()
    where = f"rank {world.rank} on {_node()}"
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("project", lambda: iter([Check(OK, "project", f"skinsynth {code_version()}, python {platform.python_version()}")])),
        ("run folder", lambda: iter([_visible("run folder", Path(cfg.run)), _visible("data.shards", Path(cfg.data.shards))])),
        ("data", lambda: data(cfg)), ("models", lambda: models(cfg)), ("hub", lambda: iter([_offline()])),
        ("gpu", lambda: iter([_gpus(cfg)])), ("attention", lambda: iter([_attention(cfg, world)])),
        ("compiler", lambda: iter([_compiler(world)] if cfg.model.compile else [])),
        ("all-reduce", lambda: iter([_all_reduce(world, variables)]))]
    for name, look in looks:
        for check in guarded(name, look):
            yield Check(check.state, check.name, check.found, check.todo, where)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _visible(name: str, path: Path) -> Check:
    if path.is_dir():
        return writable(name, path, path)
    return Check(FAIL, name, f"{path} is not there on this node", "put it on a file system that all nodes share")


def _offline() -> Check:
    unset = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name) != "1"]
    if unset:
        return Check(WARN, "hub", f"{' and '.join(unset)} are not set to 1", "keep these lines of slurm/env.sh, or nodes may wait for the internet")
    return Check(OK, "hub", f"offline; models are read from {os.environ.get('HF_HOME', '~/.cache/huggingface')}")


def _gpus(cfg: Config) -> Check:
    """What torch sees, beside what the driver sees and what was asked for."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check(OK, "gpu", f"{'; '.join(f'{g.name}, {g.total_memory / 2**30:.0f} GiB' for g in seen)}; {driver or 'driver unknown'}")
    if driver:
        return Check(FAIL, "gpu", f"{driver}, but torch {torch.__version__} does not see it", "install the torch that fits this driver's CUDA")
    asked = gpus(cfg, "finetune")
    if asked:
        return Check(WARN, "gpu", f"none, though {asked} a node are asked for: torch {torch.__version__} takes the CPU", "ask for another gres")
    return Check(OK, "gpu", "none, and none is asked for")


def _driver() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30,
                              check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return f"driver {done.stdout.splitlines()[0]}" if done.returncode == 0 and done.stdout.strip() else ""


def _attention(cfg: Config, world: World) -> Check:
    from skinsynth.models import attention

    return Check(OK, "attention", f"{attention.choose(cfg.model.attention, world.device)} on {world.device} (model.attention={cfg.model.attention})")


def _compiler(world: World) -> Check:
    from skinsynth.models import compiler

    return Check(OK, "compiler", f"{compiler.check(world.device)} (model.compile=true)")


def _all_reduce(world: World, variables: dict[str, str]) -> Check:
    """Sums 16 MiB over all ranks, twice: the first time makes the connections."""
    if world.size == 1:
        return Check(OK, "all-reduce", "one rank: nothing to do")
    import torch
    import torch.distributed as dist

    with join(world, variables):
        for _ in range(2):
            values = torch.full((2**22,), float(world.rank + 1), device=world.device)
            begin = time.perf_counter()
            dist.all_reduce(values)
            total = float(values[-1].item())  # waits for the device
            took = time.perf_counter() - begin
        backend = "nccl" if values.is_cuda else "gloo"
        all_took, nodes = zip(*world.gather((took, _node())), strict=True)
    want = world.size * (world.size + 1) / 2
    if total != want:
        return Check(FAIL, "all-reduce", f"{backend} over {world.size} ranks gave {total:g} instead of {want:g}", "tell your site")
    return Check(OK, "all-reduce", f"{backend} over {world.size} ranks on {len(set(nodes))} node{'s' if len(set(nodes)) > 1 else ''}, 16 MiB in "
                                   f"{max(all_took) * 1000:.0f} ms")
