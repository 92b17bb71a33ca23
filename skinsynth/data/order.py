"""Which sample comes when: a pure function of (seed, position), so that it is the same on any number of ranks,
after any restart, and found without reading what came before.

Position k counts samples over the whole run. Step s of a run with global batch B takes positions s*B .. s*B+B-1,
whoever of the ranks reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np


@lru_cache(maxsize=64)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (count,): the order of one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, count]))).permutation(count)


def nth(count: int, seed: int, position: int) -> int:
    """The sample at a position: every epoch of ``count`` positions holds each sample once."""
    return int(permutation(count, seed, position // count)[position % count])


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The sample's own randomness: noise, timestep, flips depend on (seed, position) and on nothing else."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


@dataclass(frozen=True)
class Mixture:
    """Sources drawn from in exact proportion: in every window of one cycle each source has exactly its share.

    ``counts``: samples in each source; ``weights``: its share (any scale). A source of weight 0 is never drawn.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def cycle(self) -> tuple[int, ...]:
        return _cycle(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """(source, sample in it) at a position of the run."""
        cycle = self.cycle
        turn, place = divmod(position, len(cycle))
        source = cycle[place]
        drawn = turn * cycle.count(source) + cycle[:place].count(source)
        return source, nth(self.counts[source], self.seed + 7919 * (source + 1), drawn)


@lru_cache(maxsize=64)
def _cycle(weights: tuple[float, ...]) -> tuple[int, ...]:
    """The shortest pattern with the exact shares, each source spread evenly over it (largest remainder first)."""
    shares = [Fraction(w).limit_denominator(1000) for w in weights]
    scale = lcm(*(s.denominator for s in shares))
    whole = [int(s * scale) for s in shares]
    whole = [w // gcd(*whole) for w in whole]
    total, given, pattern = sum(whole), [0] * len(whole), []
    for place in range(1, total + 1):
        source = max(range(len(whole)), key=lambda i: (Fraction(whole[i] * place, total) - given[i], -i))
        given[source] += 1
        pattern.append(source)
    return tuple(pattern)
