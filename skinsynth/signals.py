"""What asks this process to stop (Ctrl-C, a polite kill, a terminal that is closed), and what must not be broken off by it. No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def listen() -> None:
    """A polite kill is a Ctrl-C, and so is a terminal that is closed, except under nohup."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hung_up)


def _hung_up(number: int, frame: Any) -> None:
    """Nobody reads any more what is told, and telling it to a terminal that is gone would be an error amid the stopping."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # a log is still there
                os.dup2(nowhere.fileno(), stream)
    raise KeyboardInterrupt


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """They wait for the end of the block. From a process that is started inside, what a terminal sends to all of its processes is held back for
    good: it is for the launch, which then stops its jobs in order."""
    came: list[int] = []
    heeded = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # what is started inside ignores the others, too
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in heeded}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})  # for the processes, which inherit it, but no handler
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard in dict.fromkeys(came):
            signal.raise_signal(heard)
