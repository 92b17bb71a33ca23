"""What asks this process to stop (Ctrl-C, a polite kill), and what must not be broken off by it. No torch here."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block. From a process that is started inside, Ctrl-C is held back for good: it is for the
    launch, which then stops its jobs in order."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in STOPS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for the processes, which inherit it, but no handler
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard in dict.fromkeys(came):
            signal.raise_signal(heard)
