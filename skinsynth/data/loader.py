"""A ``Feed`` in a process of its own, for a training on a GPU.

The thread that trains hands the GPU a thousand small operations a step. Each lets go of the interpreter's lock and takes it again, and beside threads
that load in the same process it has to wait for it again and again: nothing waits for data, and the GPU has nothing to do all the same
(``benchmarks/launching.py``). Here that process has one more thread alone, which copies whole batches.

The batches lie in memory that both processes share, in slots: the loader fills one and says so, the rank copies it (to page-locked memory, from where
a GPU takes it) and gives the slot back when the batch is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import torch

from skinsynth.data.dataset import BadSample
from skinsynth.data.stream import Feed
from skinsynth.world import STOP_SIGNALS

Batch = dict[str, torch.Tensor]
ALIGN = 64  # bytes
PATIENCE = 5.0  # seconds that a loader may take to leave
PR_SET_PDEATHSIG = 1  # prctl.h


class Reads(Protocol):
    """What is read from. ``workers``: threads that load; ``bad``: the samples that could not be read and were skipped."""

    workers: int

    @property
    def bad(self) -> list[BadSample]: ...

    def batch(self, positions: range) -> Batch:
        """All batches have the same names, shapes and dtypes, and torch does no work for them: it is not safe after a fork."""


class LoaderProcess:
    """Reads as a ``Feed`` does: ``(step, [a batch for each of the step's positions])`` in order, ``waited``, errors where their step would have
    been given. ``bad``: what of ``data.bad`` the process has told. ``pin``: the batches come in page-locked memory.

    Begun by a fork, so it is to be made where no other thread of this process holds a lock for long. Use it in a ``with`` block.

    Raises:
        RuntimeError: the process ended without a word (killed, perhaps for want of memory).
    """

    def __init__(self, data: Reads, todo: Iterable[tuple[int, list[range]]], ahead: int = 2, pin: bool = False):
        import cv2

        cv2.setNumThreads(1)  # before the fork: in the process, OpenCV would wait for the end of threads that did not come along
        self.waited, self.bad = 0.0, list[BadSample]()
        self._pin, self._closed = pin, False
        context = multiprocessing.get_context("fork")
        self._told, its = context.Pipe()
        self._memory = os.memfd_create("skinsynth-loader")
        self._process = context.Process(target=_serve, args=(its, self._told, self._memory, data, todo, ahead), name="loader", daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a fork beside threads; the child uses nothing of theirs
            self._process.start()
        its.close()
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive, name="loader", daemon=True)
        self._receiver.start()
        weakref.finalize(self, _end, self._process, self._receiver)  # where nobody closes it

    def _receive(self) -> None:
        shared: Any = None
        try:
            while (told := self._told.recv()) is not None:
                if isinstance(told, BaseException):
                    self._ready.put(told)
                    return
                step, last, slot, begin, layout, size, bad = told
                shared = shared or mmap.mmap(self._memory, size)
                batch = {name: self._copy(_tensor(shared, begin, where)) for name, where in layout.items()}
                self._ready.put((step, last, slot, batch, bad))
            self._ready.put(None)
        except (EOFError, OSError) as error:
            if self._closed:
                return
            self._process.join(PATIENCE)
            code = self._process.exitcode
            how = f"killed by signal {-code}: out of memory?" if code and code < 0 else f"exit code {code}: {error}"
            self._ready.put(RuntimeError(f"the process that loads the data has ended ({how})"))
        except BaseException as error:  # no page-locked memory, say
            self._ready.put(error)

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if not self._pin:
            return values.clone()
        return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, pin_memory=True).copy_(values)

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        while True:
            since, batches, last = time.perf_counter(), list[Batch](), False
            while not last:
                told = self._ready.get()
                if told is None:
                    return
                if isinstance(told, BaseException):
                    raise told
                step, last, slot, batch, bad = told
                batches.append(batch)
                self.bad += bad
                with contextlib.suppress(OSError):  # it has given all, and left
                    self._told.send(slot)
            self.waited += time.perf_counter() - since
            yield step, batches

    def close(self) -> None:
        """Ends the process, by force where it sits in a read that does not return. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()  # it has nothing to lose
        self._process.join()
        self._receiver.join()
        self._told.close()
        os.close(self._memory)

    def __enter__(self) -> LoaderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end(process: Any, receiver: threading.Thread) -> None:
    """At exit: multiprocessing would wait for the process after a signal that it does not hear, and a thread that is cut off within torch aborts."""
    process.kill()
    receiver.join()


# ---- in the process ----

def _serve(told: Connection, theirs: Connection, memory: int, data: Reads, todo: Iterable[tuple[int, list[range]]], ahead: int) -> None:
    theirs.close()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank that is killed must not leave its connections open here
    for number in (*STOP_SIGNALS, signal.SIGINT):  # a scheduler sends them to every process of a job; the rank decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # the threads that it had did not come along
    with contextlib.suppress(BrokenPipeError, EOFError):  # the rank has left
        try:
            _give(told, memory, data, todo, ahead)
            told.send(None)
        except (BrokenPipeError, EOFError):
            raise
        except Exception as error:
            told.send(_sendable(error))


def _give(told: Connection, memory: int, data: Reads, todo: Iterable[tuple[int, list[range]]], ahead: int) -> None:
    shared, free, known = None, list[int](), 0
    with Feed(data.batch, todo, data.workers, ahead) as feed:
        for step, batches in feed:
            bad = data.bad
            for number, batch in enumerate(batches, 1):
                layout, size = _layout(batch)
                if shared is None:
                    free = list(range((ahead + 1) * len(batches)))
                    os.ftruncate(memory, room := size * len(free))
                    shared = mmap.mmap(memory, room)
                while told.poll():
                    free.append(told.recv())
                slot = free.pop() if free else told.recv()
                for name, where in layout.items():
                    _tensor(shared, slot * size, where).copy_(batch[name])
                told.send((step, number == len(batches), slot, slot * size, layout, room, bad[known:]))
                known = len(bad)


def _sendable(error: Exception) -> Exception:
    with contextlib.suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


class Where(NamedTuple):
    """A tensor's place in its slot, in bytes, and how it lies there."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _layout(batch: Batch) -> tuple[dict[str, Where], int]:
    """Name -> where its values lie in a slot; and the size of a slot in bytes."""
    found, at = {}, 0
    for name, values in batch.items():
        dense = values.is_contiguous() or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last))
        found[name] = Where(at, values.dtype, tuple(values.shape), (values if dense else values.contiguous()).stride())
        at += math.ceil(values.numel() * values.element_size() / ALIGN) * ALIGN
    return found, at


def _tensor(shared: mmap.mmap, slot: int, where: Where) -> torch.Tensor:
    """The tensor in the slot that begins at a byte."""
    return torch.frombuffer(shared, dtype=where.dtype, count=math.prod(where.shape), offset=slot + where.at).as_strided(where.shape, where.strides)
