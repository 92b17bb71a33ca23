"""The ranks of one gang: who am I, wait for all, agree on a flag, notice that another one is gone.

``World`` finds its place from torchrun's variables, from Slurm's or submitit's, or is alone. torch is imported only
where there is more than one rank, or when a device is asked for.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

from skinsynth.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A stop signal was agreed upon and the state is saved: leave, to go on another time.

    Like KeyboardInterrupt it is no ``Exception``: a unit stage raises it wherever it is, perhaps within a decoder, whose every ``Exception`` means a
    bad image, or within an import, which libraries wrap in errors of their own.
    """


def leave(signum: int, frame: Any) -> None:
    """The handler of a unit stage: what is committed stays, the unit in hand is made again."""
    raise Stopped("stopped; the same command goes on from the last finished unit")


@contextmanager
def on_stop(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGUSR2 go to the handler inside the block."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@dataclass
class World:
    """``rank`` of ``size`` processes, ``local_rank`` on this node. ``stop`` is set by a signal and read at step boundaries."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    stop: bool = field(default=False, init=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> Any:
        """Where there is a GPU, that of the local rank (the site may show each rank its own alone), or of a process by itself the current one;
        else the CPU."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count() if self.size > 1 else torch.cuda.current_device())

    def barrier(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def max(self, value: int) -> int:
        """The highest of the ranks' values, on all of them. A collective: every rank must come here."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        told = torch.tensor(value, dtype=torch.int32)  # on the CPU: gloo carries it, the GPU is not waited for
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told.item())

    def together(self, error: BaseException | None) -> None:
        """Raises on all ranks when one has an error: its own there, and on the others a ``UserError`` that tells it. A collective."""
        if not self.max(error is not None):
            return
        told = self.gather(f"{type(error).__name__}: {error}" if error else "")
        if error:
            raise error
        rank = next(rank for rank, words in enumerate(told) if words)
        raise UserError(f"rank {rank} stopped: {told[rank]}")

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank. A collective."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def note_stop(self, signum: int, frame: Any) -> None:
        """The handler of a gang: only sets ``stop``, since no collective may run inside a handler."""
        self.stop = True


def place() -> tuple[World, dict[str, str]]:
    """This process's place and the ``torch.distributed`` variables that go with it."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun, or a site that exports them itself
        local = env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(local)), {"LOCAL_RANK": local}
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        world = World(int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"]), int(env["SUBMITIT_LOCAL_LOCALID"]))
        return world, _variables(world, "127.0.0.1", env["SUBMITIT_LOCAL_JOB_ID"])
    # The step's tasks, which srun started: a batch script has the job's SLURM_NTASKS and a SLURM_PROCID, too, and is alone.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        world = World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
        from submitit.slurm.slurm import SlurmJobEnvironment  # reads the list itself: a container has no scontrol

        hosts = SlurmJobEnvironment().hostnames
        job = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}"  # ranks of its last life may not be gone yet
        return world, _variables(world, env.get("MASTER_ADDR", hosts[0]), job)
    return World(), {}


def _variables(world: World, host: str, job: str) -> dict[str, str]:
    port = random.Random(job).randint(20000, 60000)  # all ranks must find the same one without talking
    return {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(world.local_rank),
            "MASTER_ADDR": host, "MASTER_PORT": os.environ.get("MASTER_PORT", str(port))}


@contextmanager
def join(world: World, variables: dict[str, str]) -> Iterator[None]:
    """Enters the gang: exports the variables, starts the process group, leaves it in the end.

    Not where something was raised: NCCL's leave waits for peers that may sit in a collective, and the reason would be told to nobody. The
    end of the process tells them.
    """
    if world.size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # with them accelerate would wrap the model for a gang of one
            os.environ.pop(name, None)
        yield
        return
    os.environ.update(variables)
    import torch.distributed as dist

    _take_gpu(world)
    with _waiting(world):
        dist.init_process_group(_backend(), timeout=timedelta(minutes=30))
    yield
    dist.destroy_process_group()


@contextmanager
def _waiting(world: World) -> Iterator[None]:
    """For the other ranks. A stop signal ends the process: nothing is to be saved yet, and as long as torch waits for ranks that may never come,
    no handler of ours would run.

    Raises:
        Stopped: a signal came before.
    """
    with on_stop(signal.SIG_DFL):
        if world.stop:
            raise Stopped("stopped before it began; the same command goes on")
        yield


def join_alone(world: World) -> None:
    """A process group of a single rank, for DeepSpeed, which does nothing without one. Harmless twice."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)


def _backend() -> str:
    """gloo carries the flags and the Python objects also where NCCL carries the gradients."""
    import torch

    if torch.cuda.is_available():
        return "cpu:gloo,cuda:nccl"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
    return "gloo"


def _take_gpu(world: World) -> None:
    """Makes the rank's GPU the current one, for this process and for the libraries that take ``LOCAL_RANK`` for its number."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(world.device)
        os.environ["LOCAL_RANK"] = str(world.device.index)


@contextmanager
def take_turns(world: World, variables: dict[str, str]) -> Iterator[Callable[[], int]]:
    """A counter that all ranks of a gang share: each call gives the next number, 0 first, to one rank alone. No process group: the ranks
    need not wait for each other but at the end, for the one that keeps the counter."""
    os.environ.update(variables)
    if world.size == 1:
        yield count().__next__
        return
    from torch.distributed import rendezvous

    _take_gpu(world)
    with _waiting(world):
        store, _, _ = next(rendezvous("env://", world.rank, world.size))
    yield lambda: store.add("turn", 1) - 1
    ended = store.add("ended", 1)
    while world.is_main and ended < world.size:
        time.sleep(0.2)
        ended = store.add("ended", 0)


def lost_peer(error: BaseException) -> bool:
    """True when a collective failed because another rank went away: no fault of this one. What NCCL says of a wrong set-up is none."""
    if any(words in str(error) for words in ("invalid usage", "Duplicate GPU", "invalid argument")):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "TCPStore", "recvValue", "sendBytes")
    return type(error).__name__.startswith("Dist") or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
