"""Which sample comes when: a pure function of (seed, position), so that it is the same on any number of ranks, with any
number of loader workers, after any restart, and found without reading what came before.

Position k counts samples over the whole run. Step s of a run with global batch B takes positions s*B .. s*B+B-1, whoever of
the ranks reads them (``share`` deals them). A ``Mixture`` says which source a position draws from and which of its samples.

An epoch's order is that of *canonical streams*, after MosaicML Streaming's elastic determinism: the shards are permuted and
laid end to end, the line is cut into a fixed number of equal streams, each stream is shuffled within windows alone, and the
streams are read in turn. So each stream goes through its tars from front to back, in steps of one window, as a disk or a
download likes it, while a batch holds samples from all streams. The number of streams comes from the configuration and the
data; ranks share the streams, and a rank whose number divides that of the streams reads only its own in an epoch of one source.
A set of up to two windows is one stream; up to one window, it is shuffled as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np

from skinsynth.knobs import proportion


def _generator(seed: int, epoch: int, count: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, count])))


@lru_cache(maxsize=64)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (count,): numbers 0 .. count-1 in a random order."""
    return _generator(seed, epoch, count).permutation(count)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The sample's own randomness: noise, timestep, flips depend on (seed, position) and on nothing else."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def stream_bounds(count: int, streams: int, window: int) -> np.ndarray:
    """int64 (streams + 1,): where each canonical stream begins on the line of ``count`` samples, and the end of the last.

    Lengths differ by one at most. There are fewer streams than asked for where one would not fill a window.
    """
    number = max(1, min(streams, count // window))
    return np.arange(number + 1, dtype=np.int64) * count // number


def epoch_order(shards: tuple[int, ...], seed: int, epoch: int, streams: int, window: int) -> np.ndarray:
    """int64 (samples,): place in the epoch -> number of the sample; every sample once.

    ``shards``: how many of the samples lie in each shard; samples are numbered in the order of the shards.
    A million samples take about 20 ms, once an epoch.
    """
    sizes = np.array(shards, dtype=np.int64)
    count, rng = int(sizes.sum()), _generator(seed, epoch, int(sizes.sum()))
    chosen = rng.permutation(len(sizes))
    first = np.cumsum(sizes) - sizes  # of each shard, its first sample
    begins = np.cumsum(sizes[chosen]) - sizes[chosen]  # of each chosen shard, its place on the line
    line = np.arange(count) + np.repeat(first[chosen] - begins, sizes[chosen])
    bounds = stream_bounds(count, streams, window)
    longest = int(np.diff(bounds).max(initial=0))
    turns = np.full((longest, len(bounds) - 1), -1, dtype=np.int64)  # row by row: one sample of each stream
    for stream, (begin, end) in enumerate(pairwise(bounds)):
        for at in range(begin, end, window):
            rng.shuffle(line[at : min(at + window, end)])
        turns[: end - begin, stream] = line[begin:end]
    return turns[turns >= 0]  # only the last row has gaps


def share(step: int, global_batch: int, micro: int, rank: int, ranks: int) -> list[range]:
    """The positions of a step that a rank reads, one range of ``micro`` positions for each pass (gradient accumulation).

    Ranks take every ``ranks``-th position, so that each keeps to its own streams. All ranks' ranges together are the global batch.
    """
    begins = range(step * global_batch, (step + 1) * global_batch, micro * ranks)
    return [range(begin + rank, begin + micro * ranks, ranks) for begin in begins]


@dataclass(frozen=True)
class Mixture:
    """Sources drawn from in exact proportion: in every window of one cycle each source has exactly its share.

    ``counts``: samples in each source; ``weights``: its share (any scale). A source of weight 0 is never drawn.
    ``shards``: of each source, how many of its samples lie in each shard; left out, a source is taken as one shard.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shards: tuple[tuple[int, ...], ...] = ()
    streams: int = 16
    window: int = 2048
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def cycle(self) -> Cycle:
        return _cycle(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """(source, sample in it) at a position of the run. Safe under threads; O(1) but for the first of an epoch."""
        cycle = self.cycle
        turn, place = divmod(position, len(cycle.pattern))
        source = cycle.pattern[place]
        drawn = turn * cycle.given[source] + cycle.before[place]
        epoch, place = divmod(drawn, self.counts[source])
        return source, int(self._order(source, epoch)[place])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Kept for the epoch and its neighbours, since workers may stand on both sides of its end."""
        found = self._orders.get((source, epoch))
        if found is None:  # two threads may both make it: the same array
            shards = self.shards[source] if self.shards else (self.counts[source],)
            found = epoch_order(shards, self.seed + 7919 * (source + 1), epoch, self.streams, self.window)
            for old in [key for key in list(self._orders) if key[0] == source and abs(key[1] - epoch) > 1]:
                self._orders.pop(old, None)
            self._orders[source, epoch] = found
        return found


@dataclass(frozen=True)
class Cycle:
    """``pattern``: place -> source; ``before``: how often that source was drawn in the cycle before the place; ``given``: how often each
    is in all."""

    pattern: tuple[int, ...]
    before: tuple[int, ...]
    given: tuple[int, ...]


@lru_cache(maxsize=64)
def _cycle(weights: tuple[float, ...]) -> Cycle:
    """The shortest pattern with the exact shares, each source spread evenly over it (largest remainder first)."""
    whole = proportion(weights)
    total, given, pattern, before = sum(whole), [0] * len(whole), [], []
    for place in range(1, total + 1):
        source = max(range(len(whole)), key=lambda i: (whole[i] * place - given[i] * total, -i))
        pattern.append(source)
        before.append(given[source])
        given[source] += 1
    return Cycle(tuple(pattern), tuple(before), tuple(given))
