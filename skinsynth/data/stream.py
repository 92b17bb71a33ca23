"""From samples on disk to batches in memory: what to do with a bad sample (``Source``), and loading ahead of the training (``Feed``).

Loader workers are threads, not processes: reading a file and decoding a JPEG let go of the interpreter's lock, and a batch
that is made in the same process need not be copied through a pipe.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

from skinsynth.data.dataset import BadSample, Dataset
from skinsynth.errors import UserError

P = TypeVar("P", bound=Sequence[int])
T = TypeVar("T")
TURN = 8  # steps; with fewer the cores change from one work to the other, and their caches with them, more often than is worth it


class Source:
    """Samples of a dataset that are drawn by their number in ``samples`` (ascending numbers of the dataset).

    ``on_error``: ``stop`` lets a ``BadSample`` rise; ``skip`` takes the next good one of ``samples`` instead, whatever rank asks,
    so that the batches stay the same on any number of ranks.
    """

    def __init__(self, dataset: Dataset, samples: Sequence[int], on_error: str = "stop"):
        self.dataset, self.samples, self.on_error = dataset, samples, on_error
        self._bad: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shards(self) -> tuple[int, ...]:
        """How many of the samples lie in each shard, for ``Mixture``."""
        return self.dataset.shard_counts(self.samples)

    @property
    def bad(self) -> list[BadSample]:
        """Every bad sample met so far, once each, by its number in the dataset."""
        return [error for _, error in sorted(self._bad.items())]

    def read(self, index: int, how: Callable[[Dataset, int], T]) -> T:
        """``how(dataset, number)`` of the sample at ``index``, or of the one that stands in for it. Safe under threads.

        Raises:
            BadSample: with ``stop``.
            UserError: with ``skip``, when no sample is good.
        """
        for step in range(len(self.samples)):
            number = self.samples[(index + step) % len(self.samples)]
            if number in self._bad:
                continue
            try:
                return how(self.dataset, number)
            except BadSample as error:
                if self.on_error == "stop":
                    raise
                self._bad.setdefault(number, error)
        first = f"; the first {self.bad[0]}" if self._bad else ""
        raise UserError(f"{self.dataset.folder}: none of the {len(self.samples)} samples to train on can be read{first}")


class Feed(Generic[P, T]):
    """Batches made ahead by ``workers`` threads, given in order: ``(step, [a batch for each of the step's positions])``.

    ``todo`` gives (step, [positions, ...]); ``ahead`` steps, one for each worker at least, are in the making while one is used. What ``make_batch``
    raises is raised where that step would have been given. ``pin`` puts dicts of tensors into page-locked memory, from where a GPU
    copies them faster.
    ``turns``: loading and training take turns, ``TURN`` steps at a time whatever ``ahead`` says, for a training on the CPU: side by side each
    would take the cores from the other, and a step is as slow as its slowest core.
    ``waited`` is how many seconds the consumer has waited in all: with loading fast enough, little more than the first step's.

    Use it in a ``with`` block, or read it to its end: both leave no thread behind.
    """

    def __init__(self, make_batch: Callable[[P], T], todo: Iterable[tuple[int, list[P]]], workers: int = 2, ahead: int = 2,
                 pin: bool = False, turns: bool = False):
        import cv2

        cv2.setNumThreads(1)  # the workers run side by side already
        self.waited = 0.0
        self._make = _pinned(make_batch) if pin else make_batch
        self._todo, self._ahead, self._turns = iter(todo), max(TURN if turns else ahead, workers), turns
        self._waiting: deque[tuple[int, list[Future[T]]]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feed")
        self._fill()

    def _fill(self) -> bool:
        """Begins what there is room for; whether anything is to come."""
        for step, ranges in itertools.islice(self._todo, self._ahead - len(self._waiting)):
            self._waiting.append((step, [self._pool.submit(self._make, positions) for positions in ranges]))
        return bool(self._waiting)

    def __iter__(self) -> Iterator[tuple[int, list[T]]]:
        try:
            while self._waiting or self._fill():
                since = time.perf_counter()
                if self._turns:
                    wait([future for _, futures in self._waiting for future in futures])
                step, futures = self._waiting.popleft()
                batches = [future.result() for future in futures]
                self.waited += time.perf_counter() - since
                if not self._turns:
                    self._fill()
                yield step, batches
        finally:
            self.close()

    def close(self) -> None:
        """Drops what is not begun, waits for what is. Harmless twice."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Feed[P, T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown(wait=False, cancel_futures=True)


def _pinned(make_batch: Callable[[P], Any]) -> Callable[[P], Any]:
    return lambda positions: {name: tensor.pin_memory() for name, tensor in make_batch(positions).items()}
