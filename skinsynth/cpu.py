"""How a process uses CPU cores and memory; torch reads it when it is imported."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
AT_ONCE = 4096  # calls handed to the threads at a time: each takes a kilobyte while it waits
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def before_torch(threads: int) -> None:
    """``threads`` for the operations of torch. What the environment says already stays."""
    # Threads that spin long while they wait stand still beside any other work on the cores; those that never do make a step of many small
    # operations half as fast again as it could be. Some ten microseconds of spinning cost little and serve as well as the default.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Every step allocates and frees the same tensors. glibc gives them back to the kernel, which hands them out again page by page, zeroed:
    16,000 pages and a tenth of the time of a step of the built-in UNet. So what is freed is kept for the next step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        for option, size in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            set_option(option, size)


def threads() -> int:
    """For work that torch does not do: those that the job was given (OpenMP's list for nested levels begins with them), else all cores."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))


def loaders(asked: int | None) -> int:
    """Threads that read and decode for a rank (``data.workers``)."""
    return asked or min(8, max(2, threads()))


def in_threads(work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """Results in the order of the items; what ``work`` raises is raised in its place, and what has not begun then is left."""
    with ThreadPoolExecutor(threads()) as pool:
        try:
            for start in range(0, len(items), AT_ONCE):
                yield from pool.map(work, items[start:start + AT_ONCE])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For code that imports thousands of modules. All they make stays for good, yet Python's garbage collector would look through it again and
    again: a fifth of the time that the imports take. Also a decorator."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
